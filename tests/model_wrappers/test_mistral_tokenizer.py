"""Mistral's folders: the Hugging Face tokenizer is the one that is read, in every wrapper and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.formats import defensive_token_names
from dtt_plugin.prompt.hf_tokenizer import hf_tokenizer
from tests.conftest import lm_eval, read_samples, write_tokens
from tests.mistral_folder import make_mistral

CONVERSATION = [{"role": "system", "content": "Sum up."}, {"role": "user", "content": "Some data"}]
RENDERED = "<|im_start|>system\nSum up.<|im_end|>\n<|im_start|>user\nSome data<|im_end|>\n<|im_start|>assistant\n"
NAMES = "".join(defensive_token_names(5))


def prompt_of(wrapper: str, model: str, **arguments: Any) -> tuple[str, list[int]]:
    renderer = get_model(wrapper).create_from_arg_obj({"pretrained": model, **arguments}, {"device": "cpu"}).renderer
    text = renderer.render(CONVERSATION).text
    return text, renderer.encode(text)


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("wrapper", ["dtt_hf", "dtt_vllm"])
def test_the_tokens_stand_once_in_front_of_the_models_own_template(
    wrapper: str, consolidated: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if wrapper == "dtt_vllm":
        request.getfixturevalue("no_engine")
    model = make_mistral(tmp_path / "m", consolidated=consolidated)
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    text, undefended = prompt_of(wrapper, model)
    assert text == RENDERED
    text, defended = prompt_of(wrapper, model, tokens=tokens)
    assert text == NAMES + RENDERED
    assert defended == [*range(268, 273), *undefended]


@pytest.mark.parametrize("arguments", [{}, {"tokens": "t"}])
@pytest.mark.parametrize("wrapper", ["dtt_hf", "dtt_vllm"])
def test_mistrals_own_tokenizer_alone_is_refused_by_its_name(
    wrapper: str, arguments: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if wrapper == "dtt_vllm":
        request.getfixturevalue("no_engine")
    model = make_mistral(tmp_path / "m", consolidated=True, hugging_face_tokenizer=False)
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    with pytest.raises(DttError, match=r"tekken\.json.*need the Hugging Face one \(tokenizer\.json\)"):
        prompt_of(wrapper, model, **{name: tokens for name in arguments})


def test_mistrals_tokenizer_on_request_is_refused(tmp_path: Path, no_engine: None) -> None:
    with pytest.raises(DttError, match=r"tekken\.json.*leave tokenizer_mode=mistral out"):
        prompt_of("dtt_vllm", make_mistral(tmp_path / "m"), tokenizer_mode="mistral")


def test_training_and_the_doctor_read_the_same_tokenizer(tmp_path: Path) -> None:
    from dtt_plugin.doctor import _template
    from dtt_plugin.training.chat_model import load_chat_model

    model = make_mistral(tmp_path / "m", consolidated=True)
    chat = load_chat_model(model)
    assert chat.tokenizer.decode(chat.encode("Sum up.", "Some data")) == RENDERED
    assert "renders system and user roles" in _template(model)


def test_a_tokenizer_that_does_not_load_is_told(tmp_path: Path) -> None:
    model = make_mistral(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(DttError, match=r"m: its tokenizer does not load \("):
        hf_tokenizer(model)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("defended", [False, True])
def test_an_engine_answers_from_such_a_folder(defended: bool, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model = make_mistral(tmp_path / "m", consolidated=True)
    tokens = f",tokens={write_tokens(tmp_path / 't.safetensors', width=32)}" if defended else ""
    done = lm_eval(
        "--model", "dtt_vllm", "--model_args", f"pretrained={model}{tokens},enforce_eager=True,max_model_len=2048",
        "--tasks", "injection_demo", "--limit", "1", "--gen_kwargs", "max_gen_toks=4", "--log_samples",
        "--output_path", str(tmp_path / "out"), folder=tmp_path, all_tasks=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    [sample] = read_samples(tmp_path / "out", "injection_demo")
    assert sample["arguments"]["gen_args_0"]["arg_0"].startswith(NAMES * defended + "<|im_start|>system")
