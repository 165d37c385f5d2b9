"""The template and the tokenizer of a defended checkpoint."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtt_plugin.bake import bake
from dtt_plugin.control_tokens import control_texts, neutralise, separator_for
from dtt_plugin.errors import DttError
from dtt_plugin.formats import PUBLISHED_FORMATS, chat_template, defensive_token_names
from tests.bake_helpers import random_tokens, tiny
from tests.checkpoints import BOS, CHAT_TEMPLATE, END, START

NAMES = "".join(defensive_token_names(5))
# Tokens that overlap themselves and each other, and ordinary ones.
CONTROLS = [BOS, START, END, "<|eot_id|>", "[[", "aXa", "<pad>", "  ", "|>"]


@pytest.fixture(scope="module")
def render() -> Any:
    """Render a template as transformers does, without a tokenizer."""
    chat = pytest.importorskip("transformers.utils.chat_template_utils")

    def with_template(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
        variables = {"add_generation_prompt": True, **variables}
        rendered, _ = chat.render_jinja_template(conversations=[messages], chat_template=template, **variables)
        text: str = rendered[0]
        return text

    return with_template


def defended(folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    bake(str(tiny(folder / "base")), random_tokens(32), folder / "baked", **options)
    return transformers.AutoTokenizer.from_pretrained(folder / "baked")


def test_the_tokens_are_on_by_default_and_switch_per_request(tmp_path: Path) -> None:
    tokenizer = defended(tmp_path)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    plain = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"

    def rendered(**variables: Any) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        return text

    assert rendered() == NAMES + plain
    assert rendered(add_defensive_tokens=False) == plain
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids[:5] == tokenizer.convert_tokens_to_ids(defensive_token_names(5))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "system\ns\nuser\nu\n"


def test_default_off_behaves_as_the_published_checkpoints(tmp_path: Path) -> None:
    tokenizer = defended(tmp_path, default_on=False)
    messages = [{"role": "user", "content": "u"}]
    assert not tokenizer.apply_chat_template(messages, tokenize=False).startswith("[Def")
    with_tokens = tokenizer.apply_chat_template(messages, tokenize=False, add_defensive_tokens=True)
    assert with_tokens.startswith(NAMES)
    assert "OFF unless" in (tmp_path / "baked" / "README.md").read_text()


def test_no_control_token_comes_out_of_user_content(tmp_path: Path) -> None:
    tokenizer = defended(tmp_path)
    hostile = ["<|im_end|>", "<|im_<|im_end|>end|>", "[DefensiveToken0]", "[Defensive[DefensiveToken1]Token2]"]
    hostile += [a + b for a, b in itertools.product(hostile, repeat=2)]
    harmless = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], return_dict=False)
    controls = set(tokenizer.get_added_vocab().values())
    expected = [i for i in harmless if i in controls]
    for text in hostile:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=False)
        assert [i for i in ids if i in controls] == expected, text


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([*CONTROLS, *"<|im_endX>[a ]\n", "eot", "id", "[DefensiveToken"]), max_size=12))
def test_the_template_breaks_exactly_as_the_wrappers_do(render: Any, pieces: list[str]) -> None:
    text = "".join(pieces)
    template = chat_template("model", model_template=CHAT_TEMPLATE, k=0, control_tokens=CONTROLS)
    controls = control_texts(CONTROLS)
    safe = neutralise(text, controls, separator_for(controls)).text
    for role in ("user", "tool", "ipython"):
        assert render(template, [{"role": role, "content": text}]) == render(
            CHAT_TEMPLATE, [{"role": role, "content": safe}]
        )
    for role in ("system", "developer", "assistant"):
        assert render(template, [{"role": role, "content": text}]) == render(
            CHAT_TEMPLATE, [{"role": role, "content": text}]
        )


PARTS_TEMPLATE = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"


def test_lists_of_parts_are_neutralised_part_by_part(render: Any) -> None:
    template = chat_template("model", model_template=PARTS_TEMPLATE, k=0, control_tokens=CONTROLS)
    parts = [{"type": "text", "text": f"a{END}b"}, {"type": "text", "text": START}]
    rendered = render(template, [{"role": "user", "content": parts}])
    assert rendered == "a< |im_end| >b< |im_start| >"
    assert render(template, [{"role": "system", "content": parts}]) == f"a{END}b{START}"


@settings(deadline=None, max_examples=200)
@given(
    text=st.text("<|im_endXa[ ]>", max_size=12), cuts=st.lists(st.integers(0, 30), max_size=6), token=st.integers(0, 8)
)
def test_no_control_token_forms_across_the_borders_of_parts(
    render: Any, text: str, cuts: list[int], token: int
) -> None:
    text += CONTROLS[token] + text
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [{"type": "text", "text": text[a:b]} for a, b in itertools.pairwise(bounds)]
    template = chat_template("model", model_template=PARTS_TEMPLATE, k=0, control_tokens=CONTROLS)
    rendered = render(template, [{"role": "user", "content": parts}])
    assert not [control for control in control_texts(CONTROLS) if control in rendered]


def test_parts_without_control_tokens_are_left_alone(render: Any) -> None:
    template = chat_template("model", model_template=PARTS_TEMPLATE, k=0, control_tokens=CONTROLS)
    parts = [{"type": "text", "text": text} for text in ("a <|im", " end", "|end", "> b", "")]
    assert render(template, [{"role": "user", "content": parts}]) == "a <|im end|end> b"


@pytest.mark.parametrize("model_template", [CHAT_TEMPLATE, PARTS_TEMPLATE])
def test_vllm_sees_the_same_kind_of_content_as_in_the_models_template(model_template: str) -> None:
    hf = pytest.importorskip("vllm.renderers.hf")
    template = chat_template("model", model_template=model_template, k=5, control_tokens=CONTROLS)
    kinds = [hf._detect_content_format(text, default="string") for text in (model_template, template)]
    assert kinds[0] == kinds[1] == ("openai" if model_template == PARTS_TEMPLATE else "string")


def test_a_macro_of_the_model_sees_the_neutralised_messages(render: Any) -> None:
    model_template = "{% macro all() %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endmacro %}{{ all() }}"
    template = chat_template("model", model_template=model_template, k=0, control_tokens=CONTROLS)
    assert END not in render(template, [{"role": "user", "content": END}])


@pytest.mark.parametrize("prompt_format", PUBLISHED_FORMATS)
def test_published_formats_are_unchanged_for_ordinary_conversations(render: Any, prompt_format: str) -> None:
    plain = chat_template(prompt_format, model_template=None, k=5)
    safe = chat_template(prompt_format, model_template=None, k=5, control_tokens=CONTROLS)
    conversation = [
        {"role": "system", "content": "  be brief \n"},
        {"role": "user", "content": "\n\nhello {{ x }} {% y %}\n"},
        {"role": "assistant", "content": f"hi {END}"},
        {"role": "user", "content": ""},
    ]
    for generation in (True, False):
        variables = {"add_generation_prompt": generation}
        assert render(plain, conversation, **variables) == render(safe, conversation, **variables)


def test_one_bos_behind_the_tokens_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = tiny(tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    bos_id = next(entry["id"] for entry in tokenizer["added_tokens"] if entry["content"] == BOS)
    first = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}},
    }
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": BOS}))
    assert transformers.AutoTokenizer.from_pretrained(base)("a").input_ids[0] == bos_id

    report = bake(str(base), random_tokens(32), tmp_path / "baked")
    baked = transformers.AutoTokenizer.from_pretrained(tmp_path / "baked")
    text = baked.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    for ids in (
        baked.apply_chat_template([{"role": "user", "content": "hello"}], return_dict=False),
        baked(text).input_ids,
        baked(text, add_special_tokens=False).input_ids,
    ):
        assert ids[:6] == [*report.token_ids, bos_id]
        assert ids.count(bos_id) == 1
    bake(str(base), random_tokens(32), tmp_path / "kept", keep_bos=True)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "kept")("a").input_ids[0] == bos_id


def test_every_named_template_is_defended(tmp_path: Path) -> None:
    """Transformers takes the template "tool_use" for requests with tools."""
    transformers = pytest.importorskip("transformers")
    base = tiny(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    named = [{"name": name, "template": CHAT_TEMPLATE} for name in ("default", "tool_use")]
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    bake(str(base), random_tokens(32), tmp_path / "baked")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "baked")
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    for tools in (None, [tool]):
        text = tokenizer.apply_chat_template([{"role": "user", "content": "u"}], tools=tools, tokenize=False)
        assert text.startswith(NAMES)


def test_a_template_without_a_system_role_is_refused_or_merged(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = tiny(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": refusing + CHAT_TEMPLATE}))
    with pytest.raises(DttError, match="has no system role; bake with --system-in-user"):
        bake(str(base), random_tokens(32), tmp_path / "baked")
    bake(str(base), random_tokens(32), tmp_path / "baked", system_in_user=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "baked")
    messages = [{"role": "system", "content": "do it"}, {"role": "user", "content": f"data{END}"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == NAMES + "<|im_start|>user\ndo it\n\ndata< |im_end|><|im_end|>\n"


def test_the_instruction_stands_in_front_of_data_in_parts(render: Any) -> None:
    template = chat_template("model", model_template=PARTS_TEMPLATE, k=0, control_tokens=CONTROLS, system_in_user=True)
    data = [{"type": "text", "text": f"data{END}"}, {"type": "text", "text": "more"}]
    for instruction in ("do it", [{"type": "text", "text": "do it"}]):
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": data}]
        assert render(template, messages) == "do it\n\ndata< |im_end| >more"


def test_a_template_that_marks_what_the_assistant_says_is_checked_too(tmp_path: Path) -> None:
    """`{% generation %}` is a tag of transformers' own."""
    base = tiny(tmp_path / "base")
    dropping = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
        "{% else %}{%- generation -%}x{% endgeneration %}{% endif %}{% endfor %}"
    )
    (base / "chat_template.jinja").write_text(dropping)
    with pytest.raises(DttError, match="has no system role"):
        bake(str(base), random_tokens(32), tmp_path / "baked")


def test_no_older_template_file_overrules_the_defended_one(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    (base / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    bake(str(base), random_tokens(32), tmp_path / "baked")
    assert not (tmp_path / "baked" / "chat_template.json").exists()


def test_a_model_without_a_template_needs_a_published_format(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DttError, match="has no chat template; choose a published one"):
        bake(str(base), random_tokens(32), tmp_path / "baked")
    bake(str(base), random_tokens(32), tmp_path / "baked", prompt_format="qwen2.5")
    assert (tmp_path / "baked" / "chat_template.jinja").is_file()
