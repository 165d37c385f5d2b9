"""Untrusted data never becomes a control token: shown on token ids of real tokenizers."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.control_tokens import broken, control_texts, neutralise, separator_for
from dtt_plugin.prompt.formats import defensive_token_names
from dtt_plugin.prompt.renderer import PromptRenderer

HOSTILE_STRINGS = 10_000
TOKENIZERS = ("smollm2_tokenizer", "qwen_tokenizer", "llama3_tokenizer")


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A real tokenizer that also knows five DefensiveTokens, as a defended arm's does."""
    import copy

    from transformers import AddedToken

    tokenizer = copy.deepcopy(request.getfixturevalue(request.param))
    names = [AddedToken(name, special=True, normalized=False) for name in defensive_token_names(5)]
    tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer


def controls_of(tokenizer: Any) -> list[str]:
    return control_texts([*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens])


@cache  # to ask a tokenizer for its added tokens takes it longer than to read a text
def control_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(tokenizer.get_added_vocab().values()) | frozenset(tokenizer.all_special_ids)


def control_ids_of_each(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    known = control_ids(tokenizer)
    return [[i for i in ids if i in known] for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def control_ids_in(tokenizer: Any, text: str) -> list[int]:
    return control_ids_of_each(tokenizer, [text])[0]


def hostile_string(rng: random.Random, controls: list[str]) -> str:
    """Join whole, nested, split and repeated control tokens, as an attacker would try."""
    pieces = []
    for _ in range(rng.randint(1, 6)):
        token = rng.choice(controls)
        if token == "[DefensiveToken":
            token = f"[DefensiveToken{rng.randint(0, 9)}]"
        cut = rng.randint(0, len(token))
        other = rng.choice(controls)
        shape = rng.randrange(6)
        pieces.append(
            [
                token,
                token[:cut] + other + token[cut:],  # nested: deleting `other` would form `token`
                token[:cut] + " " + token[cut:],
                token[:cut],
                token[cut:] + token[:cut],
                token * 2,
            ][shape]
        )
        pieces.append(rng.choice(["", "", " ", "\n", "data", "\u200b", "<", "|", ">", "[", "Ü"]))
    return "".join(pieces)


def test_hostile_strings_yield_no_control_token(tokenizer: Any) -> None:
    controls = controls_of(tokenizer)
    separator = separator_for(controls)
    rng = random.Random(0)
    texts = [hostile_string(rng, controls) for _ in range(HOSTILE_STRINGS)]
    dangerous = sum(map(bool, control_ids_of_each(tokenizer, texts)))
    safe = [neutralise(text, controls, separator).text for text in texts]
    for text, made, ids in zip(texts, safe, control_ids_of_each(tokenizer, safe), strict=True):
        assert ids == [], (text, made)
    assert dangerous > HOSTILE_STRINGS / 3, "the strings would not have been dangerous: the test shows nothing"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_added_token_nested_in_any_text_yields_no_control_token(tokenizer: Any, data: st.DataObject) -> None:
    controls = controls_of(tokenizer)
    names = [*tokenizer.get_added_vocab(), *defensive_token_names(5)]
    parts = data.draw(st.lists(st.one_of(st.sampled_from(names), st.text(max_size=8)), min_size=1, max_size=8))
    text = "".join(parts)
    cut = data.draw(st.integers(0, len(text)))
    text = text[:cut] + data.draw(st.sampled_from(names)) + text[cut:]
    safe = neutralise(text, controls, separator_for(controls))
    assert control_ids_in(tokenizer, safe.text) == []
    assert neutralise(safe.text, controls, separator_for(controls)).occurrences == 0


def test_every_single_added_token_is_broken_and_counted(tokenizer: Any) -> None:
    controls = controls_of(tokenizer)
    separator = separator_for(controls)
    for token in tokenizer.get_added_vocab():
        if token.strip():
            safe = neutralise(f"a{token}b", controls, separator)
            assert safe.occurrences >= 1
            assert control_ids_in(tokenizer, safe.text) == []


def test_a_whole_prompt_has_the_control_ids_of_a_harmless_one(tokenizer: Any) -> None:
    template = tokenizer.chat_template or "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    renderer = PromptRenderer(tokenizer, prompt_format="model", model_template=template, defenses=("tokens",), k=5)
    rng = random.Random(1)
    known = set(tokenizer.get_added_vocab().values())

    def controls(text: str) -> list[int]:
        prompt = renderer.render([{"role": "system", "content": "Do it."}, {"role": "user", "content": text}])
        return [i for i in renderer.encode(prompt.text) if i in known]

    harmless = controls("nothing")
    for _ in range(300):
        assert controls(hostile_string(rng, renderer.controls)) == harmless


def test_text_without_control_tokens_is_left_alone() -> None:
    controls = control_texts(["<|im_end|>", "\n\n"])
    text = "5 < 6 | 7 > 2\n\n[Defensive] <|im end|>"
    assert neutralise(text, controls, " ") == (text, 0)


def test_deleting_would_re_form_a_token_and_breaking_does_not() -> None:
    controls = control_texts(["<|eot_id|>"])
    assert "<|eot_id|>" not in neutralise("<|eot<|eot_id|>_id|>", controls, " ").text


def test_a_token_that_overlaps_itself_is_broken_everywhere() -> None:
    assert "aa" not in neutralise("aaaa", control_texts(["aa"]), " ").text
    assert broken("#", " ") == " "


def test_no_separator_left_is_an_error() -> None:
    with pytest.raises(DttError, match="every separator"):
        separator_for(["a b", "a_b", "a\u2009b"])
