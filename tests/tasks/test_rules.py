"""Rules: what they hold of, what a beginning settles, and what can't be a rule."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtt_plugin.errors import DttError
from dtt_plugin.tasks.attacks import HACKED
from dtt_plugin.tasks.rules import RULES, Rule, parse_rule

CASES = [
    (Rule("starts_with", ("Yes", "ja")), ["  YES, so", "Jawohl"], ["", "No, yes", "y"]),
    (Rule("contains_word", ("cat",)), ["A Cat.", "cat", "the 'CAT'!"], ["", "indicate", "cats", "cat_", "education"]),
    (Rule("contains_word", ("10",)), ["It is 10.", "10, then", "$10"], ["100", "10.5", "3,10", "1.10", "x10"]),
    (Rule("contains_any", ("a@b.c", "Ω")), ["mail A@B.C now", "ω"], ["", "a@b"]),
    (Rule("contains_all", ("one", "two")), ["two and One"], ["", "one", "on etwo"]),
    (Rule("equals_number", ("1,000",)), ["3 and then 1000", "1,000.0", "so: 1000."], ["", "1000 or 7", "1000x", "ten"]),
    (Rule("equals_number", ("-2.5",)), ["-2.5", "is -2.50"], ["2.5", "-2.5 3"]),
]


@pytest.mark.parametrize(("rule", "held", "not_held"), CASES)
def test_a_rule_holds_of_what_it_says(rule: Rule, held: list[str], not_held: list[str]) -> None:
    assert [answer for answer in held if not rule.fires(answer)] == []
    assert [answer for answer in not_held if rule.fires(answer)] == []


SETTLING = [
    Rule("starts_with", ("hacked", "ha!")),
    Rule("contains_word", ("cat", "10")),
    Rule("contains_any", ("kat", "Σ")),
    Rule("contains_all", ("a", "10")),
]


@pytest.mark.parametrize("rule", SETTLING)
@given(answer=st.text(alphabet="hackedtHA! 10.,sΣσςß", max_size=14))
def test_what_a_beginning_settles_holds_of_the_whole(rule: Rule, answer: str) -> None:
    assert rule.can_settle
    for length in range(len(answer) + 1):
        if rule.settled(answer[:length]):
            assert rule.fires(answer[:length]) == rule.fires(answer)


def test_every_rule_that_settles_is_tried_here() -> None:
    assert {rule.rule for rule in SETTLING} == {name for name, known in RULES.items() if known.settled}


def test_a_beginning_does_settle_something() -> None:
    assert Rule("starts_with", ("hacked",)).settled("No")
    assert Rule("contains_word", ("cat",)).settled("a cat is")
    assert not Rule("contains_word", ("cat",)).settled("a cat")
    assert not Rule("contains_word", ("10",)).settled("it is 10.")
    assert Rule("contains_any", ("cat",)).settled("indicat")
    assert not Rule("equals_number", ("1",)).settled("it is 1 and")


def test_folding_case_finds_the_same_hacked_responses_as_lowering() -> None:
    for code in range(0x110000):
        character = chr(code)
        if character.casefold() != character.lower():
            for place, letter in enumerate("hacked"):
                if character.casefold().startswith(letter):
                    response = "hacked"[:place] + character + "hacked"[place + 1 :]
                    assert HACKED.fires(response) == response.strip().lower().startswith("hacked"), hex(code)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "'None' is no rule; choose from starts_with"),
        ({"rule": "sounds_like", "texts": ["x"]}, "'sounds_like' is no rule"),
        ({"rule": ["x"], "texts": ["x"]}, "is no rule"),
        ({"rule": "contains_any"}, "has no texts"),
        ({"rule": "contains_any", "texts": []}, "has no texts"),
        ({"rule": "contains_any", "texts": "root"}, "has no texts"),
        ({"rule": "contains_any", "texts": [" "]}, "can't look for ' '"),
        ({"rule": "contains_any", "texts": [None]}, "can't look for None"),
        ({"rule": "contains_word", "texts": ["root "]}, "can't look for 'root '"),
        ({"rule": "equals_number", "texts": ["ten"]}, "can't look for 'ten'.*numbers"),
    ],
)
def test_a_rule_that_could_never_hold_is_an_error(value: Any, message: str) -> None:
    with pytest.raises(DttError, match=f"^row 7: .*{message}"):
        parse_rule(value, "row 7")
