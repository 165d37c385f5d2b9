"""An arm is what its name says: the tokens stand in every prompt, none is cut, and nothing else differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from dtt_plugin.bake import BakeOptions, bake
from dtt_plugin.errors import DttError
from dtt_plugin.leaderboard.comparison import build
from dtt_plugin.leaderboard.differences import differences
from dtt_plugin.leaderboard.lm_eval_files import read_runs
from dtt_plugin.prompt.formats import defensive_token_names
from dtt_plugin.tokens.files import load_tokens
from tests.bake_helpers import load
from tests.checkpoints import CHAT_TEMPLATE, make_checkpoint
from tests.conftest import evaluate, write_tokens

CONVERSATION = [{"role": "system", "content": "Sum up."}, {"role": "user", "content": "Some data"}]
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
NAMES = "".join(defensive_token_names(5))


def dtt_hf(pretrained: str, **arguments: Any) -> Any:
    return get_model("dtt_hf").create_from_arg_obj(
        {"pretrained": pretrained, "dtype": "float32", **arguments}, {"device": "cpu"}
    )


def change(folder: str, file: str, **values: Any) -> str:
    """Change keys of a JSON file of a checkpoint and return its folder."""
    path = Path(folder) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def with_template(folder: str, template: str | list[dict[str, str]]) -> str:
    return change(folder, "tokenizer_config.json", chat_template=template)


def ids_of(model: Any) -> list[int]:
    ids: list[int] = model.renderer.encode(model.renderer.render(CONVERSATION).text)
    return ids


# The tokens are there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [False, 0, "", None])
@pytest.mark.parametrize("prompt_format", ["model", "llama3", "falcon3", "qwen2.5"])
def test_tokens_that_the_template_arguments_switch_off_are_refused(
    value: Any, prompt_format: str, tiny: str, tiny_tokens: str
) -> None:
    arguments = {"tokens": tiny_tokens, "chat_template_args": {"add_defensive_tokens": value}}
    with pytest.raises(DttError, match=r"begin with the 5 of them, and this one holds 0 \(chat_template_args sets"):
        dtt_hf(tiny, prompt_format=prompt_format, **arguments)
    dtt_hf(tiny, prompt_format=prompt_format, **arguments | {"defense": "none"})


@pytest.mark.parametrize("template", [NAMES + CHAT_TEMPLATE, CHAT_TEMPLATE + "[DefensiveToken2]"])
def test_a_template_that_holds_the_tokens_itself_is_refused(template: str, tiny: str, tiny_tokens: str) -> None:
    with pytest.raises(DttError, match=r"this one holds (10|6) \(the chat template drops, moves or doubles them"):
        dtt_hf(with_template(tiny, template), tokens=tiny_tokens)


def test_a_tokenizer_that_splits_special_tokens_is_refused(tiny: str, tiny_tokens: str) -> None:
    change(tiny, "tokenizer_config.json", split_special_tokens=True)
    with pytest.raises(DttError, match="this one holds 0"):
        dtt_hf(tiny, tokens=tiny_tokens)


def test_every_prompt_that_is_sent_is_checked(tiny: str, tiny_tokens: str) -> None:
    """This template doubles a token where the instruction is long, which the check at the start can't see."""
    twice = "{% if messages[0].content | length > 40 %}[DefensiveToken0]{% endif %}"
    model = dtt_hf(with_template(tiny, twice + CHAT_TEMPLATE), tokens=tiny_tokens)
    text = model.apply_chat_template([{"role": "system", "content": "long " * 20}, CONVERSATION[1]])
    for kind, arguments in (("generate_until", (text, {"max_gen_toks": 1})), ("loglikelihood", (text, " a"))):
        with pytest.raises(DttError, match="this one holds 6"):
            getattr(model, kind)([Instance(kind, {}, arguments, 0, ("task", 0, 1))])


def test_a_second_bos_may_stand_in_front_of_the_tokens(tiny: str, tiny_tokens: str) -> None:
    change(tiny, "tokenizer_config.json", bos_token="<|endoftext|>")
    ids = ids_of(dtt_hf(tiny, tokens=tiny_tokens, add_bos_token=True))
    assert ids[0] == 265
    assert ids[1:6] == list(range(268, 273))


def test_a_defended_checkpoint_is_told_with_what_its_template_does(
    tiny: str, tiny_tokens: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    baked = bake(tiny, load_tokens(tiny_tokens), tmp_path / "baked").folder
    dtt_hf(str(baked))
    assert "defended checkpoint, whose own template decides about its tokens: it puts 5 of them" in caplog.text
    dtt_hf(str(baked), chat_template_args={"add_defensive_tokens": False})
    assert "it puts none of them into a prompt" in caplog.text


# Nothing else differs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beginning",
    ["\n\n", "\n", "  ", "   {% if true %}x{% endif %}", "\n  {%- if true -%}\n y{% endif %}", "{# x #}\n\n"],
)
def test_the_arms_differ_by_the_tokens_alone_whatever_the_template_begins_with(
    beginning: str, tiny: str, tiny_tokens: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    with_template(tiny, beginning + PLAIN_TEMPLATE)
    undefended = ids_of(dtt_hf(tiny))
    own = AutoTokenizer.from_pretrained(tiny)
    assert undefended == own.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    defended = ids_of(dtt_hf(tiny, tokens=tiny_tokens))
    assert defended[5:] == undefended
    baked = AutoTokenizer.from_pretrained(bake(tiny, load_tokens(tiny_tokens), tmp_path / "baked").folder)
    for switch, expected in ((True, defended), (False, undefended)):
        assert expected == baked.apply_chat_template(
            CONVERSATION, add_generation_prompt=True, add_defensive_tokens=switch, return_dict=False
        )


def test_a_tokenizer_that_treats_the_beginning_differently_is_told(
    tiny: str, tiny_tokens: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SentencePiece's newer form puts a space in front of a text, and none behind a special token."""
    path = Path(tiny) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    first = {"type": "Metaspace", "replacement": "\u0120", "prepend_scheme": "first", "split": False}
    tokenizer["pre_tokenizer"] = first
    path.write_text(json.dumps(tokenizer))
    dtt_hf(tiny, tokens=tiny_tokens)  # its template begins with a special token: nothing differs
    assert "differ by more" not in caplog.text
    dtt_hf(with_template(tiny, "w" + PLAIN_TEMPLATE), tokens=tiny_tokens)
    assert "differ by more than these tokens: from token 0 of the prompt on they read ['w'" in caplog.text
    assert "and ['\u0120w'" in caplog.text


# Log-likelihoods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "extra_rows"), [(True, 0), (False, 8)])
def test_log_likelihoods_are_those_of_the_rows_in_front_of_the_embedded_prompt(
    tied: bool, extra_rows: int, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "m", tied=tied, extra_rows=extra_rows, dtype="float32")
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    model, plain = dtt_hf(str(folder), tokens=tokens), load(folder)
    undefended = dtt_hf(str(folder))
    answers = [" world", " hello", "he", "x y z", "or ld"]
    context = model.apply_chat_template(CONVERSATION)
    requests = [Instance("loglikelihood", {}, (context, answer), i, ("task", 0, 1)) for i, answer in enumerate(answers)]
    rows = torch.from_numpy(load_tokens(tokens).rows)[None]
    text = undefended.renderer.render(CONVERSATION).text
    # lm-eval counts the white space at the end of a prompt to the continuation.
    prompt = undefended.renderer.encode(text.rstrip())
    found = model.loglikelihood(requests)
    assert len({round(value, 3) for value, _ in found}) == len(answers)
    for answer, (value, greedy) in zip(answers, found, strict=True):
        more = undefended.renderer.encode(text + answer)[len(prompt) :]
        with torch.no_grad():
            embedded = plain.get_input_embeddings()(torch.tensor([prompt + more]))
            logits = plain(inputs_embeds=torch.cat([rows, embedded], dim=1)).logits[0]
        scores = torch.log_softmax(logits, dim=-1)[-len(more) - 1 : -1]
        expected = scores[range(len(more)), more].sum().item()
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == (scores.argmax(dim=-1).tolist() == more)


@pytest.mark.parametrize("defended", [True, False])
def test_a_log_likelihood_that_does_not_fit_is_refused_and_not_cut(defended: bool, tiny: str, tiny_tokens: str) -> None:
    model = dtt_hf(tiny, max_length=64, **({"tokens": tiny_tokens} if defended else {}))
    context = model.apply_chat_template([{"role": "user", "content": "a"}])
    n_context = len(model.renderer.encode(context))
    assert n_context < 40

    def score(answer: str, content: str = "a") -> Any:
        context = model.apply_chat_template([{"role": "user", "content": content}])
        return model.loglikelihood([Instance("loglikelihood", {}, (context, answer), 0, ("choice", 7, 1))])

    assert len(score("x" * (64 - n_context))) == 1  # just fits
    with pytest.raises(DttError, match=r"choice, document 7: \d+ prompt tokens and \d+ of the continuation exceed the"):
        score("x" * (65 - n_context))
    with pytest.raises(DttError, match="the model's 64, and cutting the prompt would cut the defense"):
        score("x", content="b" * 80)


# And so they stand in one table ----------------------------------------------------------------------------------


def run_arm(folder: Path, pretrained: str, **arguments: Any) -> Path:
    """Evaluate an arm, and write lm-eval's results and samples."""
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(folder))
    arguments = {"pretrained": pretrained, "dtype": "float32", "max_length": 4096, **arguments}
    results = evaluate("dtt_hf", arguments, evaluation_tracker=tracker, gen_kwargs={"max_gen_toks": 1})
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples(task_name="injection_demo", samples=samples["injection_demo"])
    return folder


@pytest.mark.parametrize("arm", [{}, {"add_bos_token": True}, {"prompt_format": "llama3"}], ids=str)
@pytest.mark.parametrize("baked", [False, True])
def test_the_arms_of_one_model_share_a_table(
    arm: dict[str, Any], baked: bool, tiny: str, tiny_tokens: str, tmp_path: Path
) -> None:
    change(tiny, "tokenizer_config.json", bos_token="<|endoftext|>")
    undefended, defended = arm, arm | {"tokens": tiny_tokens}
    if baked:  # where its own template has a switch
        options = BakeOptions(prompt_format=arm.get("prompt_format"))
        tiny = str(bake(tiny, load_tokens(tiny_tokens), tmp_path / "baked", options).folder)
        defended = {name: value for name, value in arm.items() if name != "prompt_format"}
        undefended = defended | {"chat_template_args": {"add_defensive_tokens": False}}
    paths = [run_arm(tmp_path / "none", tiny, **undefended), run_arm(tmp_path / "tokens", tiny, **defended)]
    runs, problems = read_runs(paths)
    assert problems == []
    assert [run.defense for run in runs] == ["none", "tokens (random)"]
    assert [found.name for found in differences(*runs)] == []
    [group] = build(runs).to_dict()["groups"]
    assert sum(row["vs_undefended"] is not None for row in group["rows"]) == 1
