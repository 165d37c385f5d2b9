"""One BOS, behind the tokens: the same ids in both wrappers, in the baked checkpoint's own template and in training."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.bake import BakeOptions, bake
from dtt_plugin.prompt.bos import bos_to_render
from dtt_plugin.prompt.formats import PUBLISHED_FORMATS, defensive_token_names
from dtt_plugin.tokens.files import load_tokens
from tests.checkpoints import BOS, CHAT_TEMPLATE, make_checkpoint
from tests.conftest import write_tokens
from tests.zephyr import BEGINNINGS, make_zephyr

CONVERSATION = [{"role": "system", "content": "Sum up."}, {"role": "user", "content": "Some data"}]
ADDED = {"post_processor": True}
# What the tokenizer says about its BOS, and whether a prompt has to begin with one.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "adds it": ({"config": {"bos_token": BOS}, **ADDED}, True),
    "a table": ({"config": {"bos_token": {"content": BOS, "__type": "AddedToken"}}, **ADDED}, True),
    "special_tokens_map only": ({"map": {"bos_token": BOS}, **ADDED}, True),
    "special_tokens_map, a table": ({"map": {"bos_token": {"content": BOS, "lstrip": False}}, **ADDED}, True),
    "whatever its settings say": ({"config": {"bos_token": BOS, "add_bos_token": False}, **ADDED}, True),
    "for all its settings none": ({"config": {"bos_token": BOS, "add_bos_token": True}}, False),
    "the template renders it": ({"config": {"bos_token": BOS}, "template": "{{ bos_token }}", **ADDED}, True),
    "behind a line feed": ({"config": {"bos_token": BOS}, "template": "\n\n{{ bos_token }}", **ADDED}, True),
    "with a system message": (
        {"config": {"bos_token": BOS}, "template": "{% if messages|length > 1 %}{{ bos_token }}{% endif %}", **ADDED},
        True,
    ),
    "the template's alone": ({"config": {"bos_token": BOS}, "template": "{{ bos_token }}"}, True),
    "adds none": ({"config": {"bos_token": BOS}}, False),
    "has none": ({}, False),
}


def make_model(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    map: dict[str, Any] | None = None,
    template: str = "",
    post_processor: bool = False,
) -> str:
    make_checkpoint(folder, width=32, dtype="float32")
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text()) | {"chat_template": template + CHAT_TEMPLATE} | (config or {})
    path.write_text(json.dumps(stored))
    if map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(map))
    if post_processor:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        bos_id = next(entry["id"] for entry in tokenizer["added_tokens"] if entry["content"] == BOS)
        single = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}},
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


def ids_of_wrapper(name: str, model: str, tokens: str, defense: str, prompt_format: str) -> list[int]:
    """Return the ids that a wrapper sends, by its real class."""
    from lm_eval.api.registry import get_model

    arguments = {"pretrained": model, "tokens": tokens, "defense": defense, "prompt_format": prompt_format}
    renderer = get_model(name).create_from_arg_obj(arguments, {"device": "cpu"}).renderer
    ids: list[int] = renderer.encode(renderer.render(CONVERSATION).text)
    return ids


def check_ids(model: str, folder: Path, prompt_format: str, *, vllm: bool) -> list[int]:
    """Compare what the wrappers, the baked checkpoint and the trainer make of a conversation; return the ids."""
    from transformers import AutoTokenizer

    from dtt_plugin.training.chat_model import load_chat_model

    tokens = write_tokens(folder / "tokens.safetensors", width=32)
    bake(model, load_tokens(tokens), folder / "baked", BakeOptions(prompt_format=prompt_format))
    baked = AutoTokenizer.from_pretrained(folder / "baked")
    names = baked.convert_tokens_to_ids(defensive_token_names(5))
    trained = load_chat_model(model, prompt_format=prompt_format).encode("Sum up.", "Some data")
    for defense, expected in (("none", trained), ("tokens", names + trained)):
        for wrapper in ("dtt_hf", "dtt_vllm") if vllm else ("dtt_hf",):
            assert ids_of_wrapper(wrapper, model, tokens, defense, prompt_format) == expected, (wrapper, defense)
        text = baked.apply_chat_template(
            CONVERSATION, tokenize=False, add_generation_prompt=True, add_defensive_tokens=defense == "tokens"
        )
        assert baked(text).input_ids == expected, "the baked tokenizer adds a BOS"
        assert baked(text, add_special_tokens=False).input_ids == expected
    return trained


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_a_prompt_has_the_same_ids(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if vllm := importlib.util.find_spec("vllm") is not None:
        request.getfixturevalue("no_engine")
    files, expects_bos = KINDS[kind]
    ids = check_ids(make_model(tmp_path / "m", **files), tmp_path, "model", vllm=vllm)
    bos = 265  # behind the vocabulary of 265 tokens
    assert ids.count(bos) == expects_bos
    assert not expects_bos or bos in ids[:3], "not in front of the messages"


@pytest.mark.parametrize("prompt_format", PUBLISHED_FORMATS)
def test_a_published_format_says_itself_whether_it_has_a_bos(
    prompt_format: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if vllm := importlib.util.find_spec("vllm") is not None:
        request.getfixturevalue("no_engine")
    model = make_model(tmp_path / "m", **KINDS["adds it"][0])
    assert 265 not in check_ids(model, tmp_path, prompt_format, vllm=vllm)


def test_the_first_conversation_that_the_template_can_render_decides() -> None:
    def without_system(messages: list[dict[str, Any]]) -> str | None:
        return None if len(messages) > 1 else "[INST] x"

    assert bos_to_render("model", bos="<s>", adds_bos=True, render=without_system) == "<s>"
    assert bos_to_render("model", bos="<s>", adds_bos=False, render=without_system) == ""
    assert bos_to_render("model", bos="<s>", adds_bos=True, render=lambda _: None) == ""
    assert bos_to_render("llama3", bos="<s>", adds_bos=True, render=without_system) == ""


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_model_of_zephyrs_kind_has_the_same_ids_everywhere_or_says_where_not(
    beginning: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the baked checkpoint's own tokenizer makes of its own template is what lm-eval's hf sends."""
    from transformers import AutoTokenizer

    model = make_zephyr(tmp_path / "m", beginning)
    ids = check_ids(str(model), tmp_path, "model", vllm=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    stock = tokenizer(tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)).input_ids
    assert ids[0] == stock[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ("lm-eval's own models begin this undefended model's prompts otherwise" in caplog.text) == (ids != stock)
    assert (ids == stock) == (beginning == "a space in front of every text")
