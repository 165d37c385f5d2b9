"""What the published setup script and the published templates make, a bake makes as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtt_plugin.bake import bake
from dtt_plugin.prompt.formats import PUBLISHED_FORMATS, chat_template, defensive_token_names
from dtt_plugin.tokens.files import load_tokens, save_upstream_json
from tests.bake.test_bake_template import CONTROLS, render
from tests.bake_helpers import random_tokens, tiny

__all__ = ["render"]

DT = "[DefensiveToken0][DefensiveToken1][DefensiveToken2][DefensiveToken3][DefensiveToken4]"
# Per format, as the protocol's table has it: the start, the message, the generation prompt.
TABLE = {
    "llama3": (
        "<|begin_of_text|>",
        "<|start_header_id|>{role}<|end_header_id|>\n{c}\n\n<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n",
    ),
    "falcon3": ("", "<|{role}|>\n{c}\n\n", "<|assistant|>\n"),
    "qwen2.5": ("", "<|im_start|>{role}\n{c}\n\n<|im_end|>\n", "<|im_start|>assistant\n"),
}
# Any text but what opens a control token: those are broken on purpose, and tested elsewhere.
CONTENT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[|>a "), max_size=40) | st.sampled_from(
    ["", " ", "\n\nx\n", "{{ messages }}", "{% if %}", "naïve 漢字 🙂", "\\n'\""]
)
TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENT), min_size=1, max_size=6)


@pytest.mark.parametrize("prompt_format", PUBLISHED_FORMATS)
@settings(max_examples=300, deadline=None)
@given(
    system=st.none() | CONTENT,
    turns=TURNS,
    on=st.none() | st.booleans(),
    end=st.sampled_from(["", "prompt", "prefill"]),
)
def test_published_formats_are_the_tables_for_any_conversation(
    render: Any, prompt_format: str, system: str | None, turns: list[tuple[str, str]], on: bool | None, end: str
) -> None:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": role, "content": content} for role, content in turns]
    if end == "prefill":  # transformers looks for a text to continue, so there must be one
        messages.append({"role": "assistant", "content": "Sure, the answer is 42"})
    start, message, prompt = TABLE[prompt_format]
    expected = (DT if on in (None, True) else "") + start
    for turn in messages:
        expected += message.replace("{role}", turn["role"]).replace("{c}", turn["content"].strip())
    expected += prompt if end == "prompt" else ""
    if end == "prefill":
        expected = expected[: expected.rindex("42") + 2]
    template = chat_template(prompt_format, model_template=None, k=5, control_tokens=CONTROLS)
    switches: dict[str, Any] = {} if on is None else {"add_defensive_tokens": on}
    ending = {"add_generation_prompt": end == "prompt", "continue_final_message": end == "prefill"}
    assert render(template, messages, **switches, **ending) == expected


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_and_ids_are_those_that_adding_tokens_resizing_and_setting_rows_gives(tmp_path: Path, tied: bool) -> None:
    """The procedure of the published setup script, on a model whose matrix has no spare rows."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = tiny(tmp_path / "base", tied=tied)
    save_upstream_json(tmp_path / "published.json", {"a model": random_tokens(32).rows})
    report = bake(str(base), load_tokens(tmp_path / "published.json"), tmp_path / "baked")

    rows = load_tokens(tmp_path / "published.json").rows
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    names = defensive_token_names(len(rows))
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    model.resize_token_embeddings(len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(names)
    with torch.no_grad():
        model.get_input_embeddings().weight[ids] = torch.tensor(rows).to(torch.bfloat16)

    assert list(report.token_ids) == ids
    baked_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "baked")
    assert baked_tokenizer.convert_tokens_to_ids(names) == ids
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.bfloat16)
    assert torch.equal(baked.get_input_embeddings().weight, model.get_input_embeddings().weight)
    stored = baked.get_input_embeddings().weight[ids].float().detach().numpy()
    assert np.array_equal(stored, rows.astype(ml_dtypes.bfloat16).astype(np.float32))
