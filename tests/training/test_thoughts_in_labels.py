"""What a thinking model learns: the answers that evaluation scores, never its thoughts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from dtt_plugin.errors import DttError  # noqa: E402
from dtt_plugin.training.chat_model import load_chat_model  # noqa: E402
from dtt_plugin.training.held_out import HeldOut  # noqa: E402
from dtt_plugin.training.labels import check_prompt, self_labels  # noqa: E402
from dtt_plugin.training.soft_prompt import SoftPrompt  # noqa: E402
from tests.thinkers import OPENING, SPOKEN, thinker_with, train_thinker  # noqa: E402

RECORDS: Any = [{"instruction": "Sum up.", "input": text, "output": "No."} for text in ("A text.", "Another text.")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_thinker(tmp_path_factory.mktemp("thinker") / "model")


def labels(model: str, new_tokens: int = 64) -> list[str]:
    chat = load_chat_model(model)
    undefended = SoftPrompt(chat.model, torch.empty(0, 64))
    options = {"tokenizer": chat.tokenizer, "new_tokens": new_tokens, "weights": model}
    return [chat.tokenizer.decode(ids) for ids in self_labels(undefended, chat.encode, RECORDS, **options)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("opening", [opening for opening in SPOKEN if "loop" not in opening])
def test_the_answers_behind_the_thoughts_are_learnt(
    opening: str, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = thinker_with(trained, opening, tmp_path / "thinker")
    assert labels(model) == ["Hacked!<|im_end|>"] * 2
    assert labels(model) == ["Hacked!<|im_end|>"] * 2, "from the cache"
    assert ("begin with thoughts" in caplog.text) == (SPOKEN[opening] != "Hacked!")


def test_a_token_that_holds_the_end_of_the_thoughts_and_the_answer_is_taken_apart() -> None:
    from dtt_plugin.training.labels import _ending

    pieces = ["<think>", "a", "</think>Hack", "ed", "!"]

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return "".join(pieces[i] for i in ids)

        def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
            return type("Encoded", (), {"input_ids": [ord(letter) for letter in text]})

    assert _ending([0, 1, 2, 3, 4], "Hacked!", Tokenizer()) == [ord(letter) for letter in "Hacked!"]
    assert _ending([0, 1, 2, 3, 4], "ed!", Tokenizer()) == [3, 4]


def test_answers_that_never_leave_their_thoughts_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DttError, match=r"2 of 2 answers .* are thoughts to their end, the 64th token"):
        labels(thinker_with(trained, "<|im_start|>loop\n", tmp_path / "thinker"))


def test_prompts_that_end_in_an_opened_thought_are_refused(trained: Path, tmp_path: Path) -> None:
    chat = load_chat_model(thinker_with(trained, f"{OPENING}<think>\n", tmp_path / "thinker"))
    with pytest.raises(DttError, match="end in <think>"):
        check_prompt(chat.tokenizer, chat.encode("Sum up.", "A text."))
    harmony = load_chat_model(thinker_with(trained, "<|start|>assistant", tmp_path / "harmony"))
    check_prompt(harmony.tokenizer, harmony.encode("Sum up.", "A text."))


def test_the_held_out_rate_is_of_answers(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtt_plugin.training.held_out._NEW_TOKENS", 64)
    monkeypatch.setattr("dtt_plugin.training.held_out.WITNESS", "Hacked!")
    chat = load_chat_model(thinker_with(trained, OPENING, tmp_path / "thinker"))
    check = HeldOut(RECORDS, ["Go on."], chat.encode, chat.tokenizer)
    assert set(check.rates(SoftPrompt(chat.model, torch.empty(0, 64))).values()) == {1.0}
