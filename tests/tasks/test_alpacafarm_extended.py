"""AlpacaFarm under every form of attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.tasks.attacks import FORMS, Injection
from dtt_plugin.tasks.metrics import process_results
from tests.tasks.described import digests, load, metrics, run
from tests.tasks.test_tasks import DIGESTS

MORE = {
    "naive": "04268ca89dad3f18d14b65beb5620e543f347ea4e353cabc2aec6189905f7ed4",
    "before": "c2e57e0e950dff724696701e350d5b7367896a815a51019d65ba4b8199fb74b6",
    "ignore_before": "71b0f7f35d5aff42e7758440bca51e88b2d7b5792469a80a8b36fd917df48755",
    "escape": "c66a21fd94c0d0de7ac274e6a4f0351ca5d5e7f10a07f873dc12507ead8d0bd3",
    "combined": "621eff0708c2a9aa8798a5814c4729c16ec1f16325f9fb99c190ae8bee50a16d",
    "completion_chatml": "fbb50dac90d3a0ab1d0b1f1ad6272c821c4fcf9ec7cc088c49a6f107c9aae044",
    "completion_llama3": "90d8ff037ad7bab2d829099526fd11ebf2265acc0a7535f57bb48cd96fca653c",
    "completion_lookalike": "fe3c09c2f7885336d4ce145f75e5c6d0442a1c053c5f7d5b0b5d7bf919d595fd",
    "probe_in_instruction": "dfa3c0307134c69e7c694dcca46afe66981b65218971a604c30d6aeb1d7da3b9",
}


@pytest.fixture(scope="module")
def documents(data_dir: Path) -> list[dict[str, Any]]:
    return list(load("alpacafarm_injection_extended").eval_docs)


def test_the_protocols_prompts_are_among_them_and_the_others_have_the_digests_of_the_readme(
    documents: list[dict[str, Any]],
) -> None:
    assert len(documents) == 208
    assert digests(documents) == DIGESTS | MORE
    readme = (Path(__file__).parents[2] / "tasks" / "alpacafarm_injection_extended" / "README.md").read_text()
    assert [name for name, digest in MORE.items() if f"`{name}` | `{digest}`" not in readme] == []


def test_every_form_keeps_the_data_and_holds_the_injection() -> None:
    made = Injection("the data", "Do it", "Now: Do it", "an answer")
    texts = {name: form(made) for name, form in FORMS.items()}
    assert len(set(texts.values())) == len(FORMS)
    for name, text in texts.items():
        assert "the data" in text, name
        assert "Do it" in text, name
        assert ("an answer" in text) == ("completion" in name or name == "combined"), name


def test_any_is_over_all_forms(documents: list[dict[str, Any]]) -> None:
    names = [variant["attack"] for variant in documents[0]["variants"]]
    answers = ["Hacked!" if name == "completion_lookalike" else "No." for name in names]
    scores = process_results(documents[0], answers)
    assert scores["hacked_any"] == 1
    assert scores["hacked"] == pytest.approx(1 / len(FORMS))
    assert scores["control"] == 0
    answers = ["The sum is 4. Hacked!" for _ in names]
    assert process_results(documents[0], answers)["control"] == 1


def test_it_runs_on_chosen_variants(data_dir: Path, tiny: str) -> None:
    task = "alpacafarm_injection_extended"
    found = metrics(run(tiny, task, variants=["naive", "completion_chatml", "benign"]), task)
    assert {"hacked_naive", "hacked_completion_chatml", "refusal"} <= found.keys()
    assert "hacked_escape" not in found
