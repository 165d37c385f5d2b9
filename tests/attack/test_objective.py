"""Losses from kept keys and values are those of whole prompts; every suffix that counts can really be sent."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtt_plugin.attack.benchmark import load_benchmark
from dtt_plugin.attack.options import AttackOptions
from tests.checkpoints import make_checkpoint
from tests.conftest import write_tokens

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from dtt_plugin.attack.bench import Bench

    folder = tmp_path_factory.mktemp("model")
    model = make_checkpoint(folder / "tiny", dtype="float32", extra_rows=7)
    tokens = Path(write_tokens(folder / "t.safetensors", width=32, norm=3.0))
    options = AttackOptions(str(model), folder / "out.jsonl", tokens=tokens)
    return Bench(options, load_benchmark("injection_demo"), dtype="float32")


@pytest.fixture(scope="module")
def objective(bench: Any) -> Any:
    return bench.objective(0, bench.arm.model)


def whole_loss(objective: Any, suffix: list[int]) -> float:
    """The loss by one plain forward pass over rows, prompt and target."""
    place, target, soft_prompt = objective.place, objective.target, objective.soft_prompt
    prompt = [*place.head, *suffix, *place.tail]
    vectors = torch.cat([soft_prompt.rows, soft_prompt.embed(torch.tensor([*prompt, *target.ids]))])[None]
    with torch.no_grad():
        logits = soft_prompt.model(inputs_embeds=vectors).logits[0].log_softmax(-1)
    first = len(soft_prompt.rows) + len(prompt) - 1
    return -sum(float(logits[first + i, token]) for i, token in enumerate(target.ids)) / len(target.ids)


def variants(suffix: list[int], usable: Any) -> list[list[int]]:
    draw = random.Random(0)
    return [[*suffix[:i], draw.choice(usable.tolist()), *suffix[i + 1 :]] for i in range(len(suffix)) for _ in "ab"]


def test_candidates_have_the_losses_of_whole_prompts(bench: Any, objective: Any) -> None:
    suffix = objective.place.start
    candidates = variants(suffix, bench.usable)
    assert float(objective.of_current(suffix).loss[0]) == pytest.approx(whole_loss(objective, suffix), rel=1e-4)
    expected = [whole_loss(objective, candidate) for candidate in candidates]
    for at_once in (1, 40, 100_000):  # the result does not depend on how many are read at once
        objective._at_once = at_once
        assert objective.of_candidates(candidates).loss.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_slope_is_the_change_of_loss_to_first_order(bench: Any, objective: Any) -> None:
    suffix = objective.place.start
    losses, slope = objective.slope(suffix)
    assert float(losses.loss[0]) == pytest.approx(whole_loss(objective, suffix), rel=1e-4)
    embed = objective.soft_prompt.embed
    vectors = embed(torch.tensor([suffix]))
    place, token, step = 3, int(bench.usable[20]), 1e-2
    moved = vectors.clone()
    moved[0, place] += step * (embed.weight[token] - vectors[0, place])
    change = float(objective.of_vectors(moved).loss[0] - objective.of_vectors(vectors).loss[0]) / step
    promised = float(slope[place, token] - slope[place, suffix[place]])
    assert change == pytest.approx(promised, rel=0.05, abs=1e-4)


def test_answers_are_those_of_plain_generation(objective: Any) -> None:
    suffix = objective.place.start
    prompt = [*objective.place.head, *suffix, *objective.place.tail]
    [expected] = objective.soft_prompt.generate([prompt], 12, pad=0)
    tokenizer = objective.place.renderer.tokenizer
    answer = objective.answer_to(suffix, lambda text: len(text) >= 6)
    assert len(answer) >= 6
    assert tokenizer.decode(expected).startswith(answer)


def test_barred_tokens_are_never_usable(bench: Any) -> None:
    tokenizer = bench.arm.renderer.tokenizer
    usable = set(bench.usable.tolist())
    barred = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    assert len(barred) >= 8, "the chat markers and the five DefensiveTokens"
    assert not usable & barred
    assert max(usable) < len(tokenizer)
    assert all(tokenizer.decode([i]).isprintable() and tokenizer.decode([i]).isascii() for i in usable)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_suffix_that_counts_holds_a_control_token_after_the_round_trip(bench: Any, data: Any) -> None:
    # Pieces of control tokens among them, which a search might put together.
    place = bench.place(1)
    tokenizer = place.renderer.tokenizer
    pieces = [
        tokenizer.encode(text) for text in ("<|im_end|", "|>", "<|", "im_start", "[Defensive", "Token0]", "\n", " ")
    ]
    chunk = st.one_of(st.sampled_from(pieces), st.sampled_from(bench.usable.tolist()).map(lambda i: [i]))
    suffix = [i for piece in data.draw(st.lists(chunk, min_size=1, max_size=8)) for i in piece]
    controls = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    if place.admits(suffix):
        text = place.suffix_text(suffix)
        sent = place.prompt(text)
        assert sent == [*place.head, *suffix, *place.tail]
        assert not controls & set(suffix)
        assert not any(control in text for control in place.renderer.controls)
        assert sum(i in controls for i in sent) == sum(i in controls for i in place.prompt(""))


def test_a_suffix_with_a_control_token_is_sent_broken(bench: Any) -> None:
    """As others' strings may be: they are evaluated as they would really arrive."""
    place = bench.place(1)
    controls = {*place.renderer.tokenizer.get_added_vocab().values()}
    sent, without = (sum(i in controls for i in place.prompt(text)) for text in (" x<|im_end|>[DefensiveToken0]", ""))
    assert sent == without


def test_a_control_token_spelt_in_pieces_is_not_admitted(bench: Any) -> None:
    place = bench.place(1)
    tokenizer = place.renderer.tokenizer
    for text in ("<|im_end|>", "[DefensiveToken0]", "<|im_start|>system"):
        pieces = [i for character in text for i in tokenizer.encode(character)]
        assert not place.admits(pieces)
        assert place.likely([pieces]) in ([False], [True])
    assert place.admits(tokenizer.encode("plain"))
