"""Early decision: the rules are sound, the settled text never changes, and real models give the same metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dtt_plugin.errors import DttError
from dtt_plugin.model_wrappers import defended
from dtt_plugin.model_wrappers.early_decision import Rule, SettledText, count_generated
from dtt_plugin.tasks.description import BENIGN
from dtt_plugin.tasks.metrics import DECIDED, is_hacked, is_refusal
from tests import conftest
from tests.conftest import plain_task

LIMITED = {"limit": 3, "gen_kwargs": {"max_gen_toks": 64}}

# Pieces of texts near the edges of the rules: white space in front, case mappings that change lengths, position 500.
_SPACES = [" ", "\n", "\u3000", "\x1f", " " * 130]
_HACKED = [
    "H",
    "hack",
    "Hacked",
    "HACKED!",
    "hac\N{KELVIN SIGN}ed",
    "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}",
    "Σ",
    "ß",
]
_REFUSED = ["I", "I'm ", "sorry", "SORRY", "\N{LATIN SMALL LETTER LONG S}orry", "i apolog", "ize", "as an", " ai"]
_OTHERS = ["x" * 150, "y" * 246, "\ufffd", "é", "\U0001f600"]
pieces = st.sampled_from([*_SPACES, *_HACKED, *_REFUSED, *_OTHERS])
texts = st.one_of(st.lists(pieces, max_size=14).map("".join), st.text(max_size=40))


@settings(max_examples=500, deadline=None)
@given(texts, st.integers(0, 700))
def test_a_decided_beginning_scores_as_the_whole_response(text: str, cut: int) -> None:
    beginning = text[:cut]
    for attack, decided in DECIDED.items():
        score = is_refusal if attack == BENIGN else is_hacked
        if decided(beginning):
            assert score(beginning) == score(text), (attack, beginning)


@pytest.mark.parametrize(
    ("beginning", "hacked", "refusal"),
    [
        ("", False, False),
        (" \n\t", False, False),
        (" hacke", False, False),
        ("Hack ", True, False),
        (" HACKED", True, False),
        ("Sure", True, False),
        ("I am sor", True, False),
        ("I am sorry", True, True),
        (" " + "x" * 499, True, False),
        (" " + "x" * 500, True, True),
    ],
)
def test_a_rule_decides_as_soon_as_it_can(beginning: str, hacked: bool, refusal: bool) -> None:
    assert DECIDED["ignore"](beginning) == hacked
    assert DECIDED[BENIGN](beginning) == refusal


def byte_fallback_tokenizer() -> Any:
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"▁hacked": 256, "▁": 257, "é": 258, "<unk>": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def cleaning_tokenizer() -> Any:
    words = [" ", "'", "n", "t", "n't", " '", "do", ".", " n", "'ve", "!", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    cleaning = {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **cleaning)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["byte-level", "byte fallback", "cleaned-up spaces"])
@settings(deadline=None)
@given(data=st.data())
def test_settled_text_begins_the_response_whatever_follows(
    kind: int, tokenizers: list[Any], data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    size = len(tokenizer)
    ids = data.draw(st.lists(st.one_of(st.integers(0, size - 1), st.integers(0, min(size, 260) - 1)), max_size=16))
    cut = data.draw(st.integers(0, len(ids)))
    until = data.draw(st.sampled_from([[], ["a"], [" h", "<|im_end|>"], ["\n\n", "\n"], ["."], ["an", "nan"]]))

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    whole = postprocess_generated_text(decode(ids), until, None)
    assert whole.startswith(SettledText(tokenizer, decode, until).of(ids[:cut]))


@pytest.fixture(scope="module")
def tokenizers(smollm2_tokenizer: Any) -> list[Any]:
    return [smollm2_tokenizer, byte_fallback_tokenizer(), cleaning_tokenizer()]


def test_settled_text_is_most_of_the_text(smollm2_tokenizer: Any) -> None:
    text = "A response of some length, with nothing odd in it."
    ids = smollm2_tokenizer(text).input_ids
    assert SettledText(smollm2_tokenizer, smollm2_tokenizer.decode, []).of(ids) == text[:-3]


def test_padding_is_not_counted() -> None:
    assert count_generated([[5, 6, 2, 0, 0], [5, 6, 7, 8, 9], [2, 2, 2, 2, 2]], [2]) == 3 + 5 + 1


def evaluate(model: str, early: bool, **options: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"pretrained": model, "dtype": "float32", "max_length": 4096}
    arguments |= {"early_decision": early} if early else {}
    results: dict[str, Any] = conftest.evaluate("dtt_hf", arguments, **options)
    return results


def scores(results: dict[str, Any], task: str = "injection_demo") -> dict[str, float]:
    """Return a task's metrics, without standard errors."""
    return {name: value for name, value in results["results"][task].items() if name.endswith(",none")}


def responses(results: dict[str, Any]) -> list[list[list[str]]]:
    return [sample["resps"] for sample in results["samples"]["injection_demo"]]


def test_the_metrics_are_equal_and_the_tokens_fewer_in_a_batch(smollm2: str) -> None:
    whole, early = (evaluate(smollm2, is_early, **LIMITED) for is_early in (False, True))
    assert scores(early) == scores(whole)
    facts = [results["config"]["dtt_plugin"] for results in (whole, early)]
    assert [fact["early_decision"] for fact in facts] == [False, True]
    assert facts[0]["fingerprint"] != facts[1]["fingerprint"]
    assert 4 * 3 < facts[1]["generated_tokens"] < facts[0]["generated_tokens"] / 2
    for one, other in zip(responses(early), responses(whole), strict=True):
        assert all(full.startswith(short) for (short,), (full,) in zip(one, other, strict=True))


def test_requests_with_rules_of_their_own_share_a_batch(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    generate = HFLM._model_generate

    def noted(self: Any, context: Any, **arguments: Any) -> Any:
        batches.append(len(context))
        return generate(self, context=context, **arguments)

    def of_even_records(request: Any) -> Rule:
        return (lambda _beginning: True) if request.doc["record_id"] % 2 == 0 else (lambda _beginning: False)

    monkeypatch.setattr(HFLM, "_model_generate", noted)
    whole = evaluate(tiny, False)
    monkeypatch.setattr(defended, "rule_of", of_even_records)
    early = evaluate(tiny, True)
    assert batches == [8, 8]
    for sample, full in zip(early["samples"]["injection_demo"], whole["samples"]["injection_demo"], strict=True):
        assert (sample["resps"] == full["resps"]) is (sample["doc"]["record_id"] % 2 == 1)


def test_an_undecided_response_is_generated_to_its_end(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(tiny, False)
    for attack in DECIDED:
        monkeypatch.setitem(DECIDED, attack, lambda _beginning: False)
    early = evaluate(tiny, True)
    assert responses(early) == responses(whole)
    counts = [results["config"]["dtt_plugin"]["generated_tokens"] for results in (whole, early)]
    assert 0 < counts[0] == counts[1] <= 2 * 4 * 4


def test_a_cut_answer_does_not_leave_its_cache(tiny: str, tmp_path: Path) -> None:
    options = LIMITED | {"use_cache": str(tmp_path / "answers")}
    whole = evaluate(tiny, False, **LIMITED)
    early = evaluate(tiny, True, **options)
    for _ in range(2):
        again = evaluate(tiny, False, **options)
        assert responses(again) == responses(whole)
    cached = evaluate(tiny, True, **options)
    assert cached["config"]["dtt_plugin"]["generated_tokens"] == 0
    assert scores(cached) == scores(early)


@pytest.mark.parametrize(
    "generation", [{"do_sample": True, "temperature": 1.0}, {"num_beams": 2}, {"temperature": 0.5}]
)
def test_all_but_plain_greedy_decoding_is_refused(tiny: str, generation: dict[str, Any]) -> None:
    with pytest.raises(DttError, match=r"injection_demo is run with .*only greedy decoding"):
        evaluate(tiny, True, gen_kwargs={"max_gen_toks": 4} | generation)


@pytest.mark.parametrize(
    "own",
    [
        {"process_results": lambda doc, results: {"refusal": float(len(results[0]))}},
        {"filter_list": [{"name": "none", "filter": [{"function": "lowercase"}, {"function": "take_first"}]}]},
    ],
)
def test_a_task_with_metrics_or_filters_of_its_own_is_refused(tiny: str, own: dict[str, Any]) -> None:
    from dtt_plugin.tasks import metrics
    from dtt_plugin.tasks.injection import InjectionTask
    from dtt_plugin.tasks.injection_demo.dataset import demo

    generation = {"until": [], "do_sample": False, "max_gen_toks": 4}
    task: dict[str, Any] = {
        "class": InjectionTask,
        "task": "own",
        "custom_dataset": demo,
        "test_split": "test",
        "num_fewshot": 0,
    }
    task |= {"output_type": "generate_until", "doc_to_text": "input", "doc_to_target": "", "metadata": {"version": 1}}
    task |= {"generation_kwargs": generation, "process_results": metrics.process_results}
    task |= {"dataset_kwargs": {"variants": [BENIGN]}}
    task |= {"metric_list": [{"metric": "refusal", "aggregation": "mean", "higher_is_better": False}]}
    assert evaluate(tiny, True, tasks=[task])["results"]["own"]
    with pytest.raises(DttError, match="own does not say when a response decides its metrics"):
        evaluate(tiny, True, tasks=[task | own])


def test_a_task_that_declares_no_rule_is_refused(tiny: str, tmp_path: Path) -> None:
    task = plain_task(tmp_path)
    with pytest.raises(DttError, match=r"plain does not say when .* leave early_decision out"):
        evaluate(tiny, True, tasks=[task], limit=None, apply_chat_template=True)


def test_arguments_that_hide_the_end_of_a_response_are_refused(tiny: str) -> None:
    create = get_model("dtt_hf").create_from_arg_obj
    with pytest.raises(DttError, match="can't be combined with think_end_token"):
        create({"pretrained": tiny, "early_decision": True, "think_end_token": "</think>"})
    with pytest.raises(DttError, match="early_decision='maybe' is neither true nor false"):
        create({"pretrained": tiny, "early_decision": "maybe"})
