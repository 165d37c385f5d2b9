"""lm-eval's samples file of an injection task: one line per record, one response per variant of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.leaderboard.runs import Response, Run
from dtt_plugin.leaderboard.untrusted import as_list, as_table, as_text, load_json, read_file
from dtt_plugin.tasks.description import ATTACK, BENIGN, CONTROL
from dtt_plugin.tasks.metrics import REFUSAL
from dtt_plugin.tasks.rules import RULES, Rule
from dtt_plugin.tasks.thoughts import Reading, read

_TOKENS_IN_FRONT = re.compile(r"(\[DefensiveToken\d+\])+", re.ASCII)
_MOST_RECORD_ID = 2**31


def sorted_samples(path: Path) -> list[dict[str, Any]]:
    """Return the samples by record id, each checked to have the shape that everything else relies on.

    Raises:
        DttError: the first line that is no sample of an injection task.
    """
    lines = [line for line in read_file(path).splitlines() if line.strip()]
    if not lines:
        raise DttError(f"{path} is empty; run lm-eval again.")
    samples = []
    for number, line in enumerate(lines, 1):
        sample = load_json(line, f"{path}, line {number},")
        if not _is_sample(sample):
            raise DttError(f"{path}, line {number}, is not a sample of an injection task; run lm-eval again.")
        samples.append(sample)
    samples.sort(key=record_id_of)
    ids = [record_id_of(sample) for sample in samples]
    if len(set(ids)) < len(ids):
        twice = next(a for a, b in pairwise(ids) if a == b)
        raise DttError(f"{path} has record {twice} twice; give the samples of one run.")
    described = [all("kind" in variant for variant in sample["doc"]["variants"]) for sample in samples]
    alike = len({tuple(variant_names(sample)) for sample in samples}) == 1
    if not (alike or all(described)) or len(set(described)) > 1:
        raise DttError(f"{path}: its records are not all under the same attacks; give the samples of one run.")
    return samples


def _is_sample(sample: Any) -> bool:
    document = as_table(sample, "doc")
    record_id, variants = document.get("record_id"), document.get("variants")
    answers = sample.get("filtered_resps") if isinstance(sample, dict) else None
    return (
        type(record_id) is int
        and 0 <= record_id < _MOST_RECORD_ID
        and all(isinstance(document.get(name), str) for name in ("instruction", "input"))
        and isinstance(variants, list)
        and bool(variants)
        and all(_is_variant(variant) for variant in variants)
        and len({variant["attack"] for variant in variants}) == len(variants)
        and isinstance(answers, list)
        and len(answers) == len(variants)
        and isinstance(sample.get("arguments"), dict)
    )


def _is_variant(variant: Any) -> bool:
    messages = variant.get("messages") if isinstance(variant, dict) else None
    attack = variant.get("attack") if isinstance(variant, dict) else None
    return (
        isinstance(attack, str)
        and attack != REFUSAL  # an outcome's name, not an attack's
        and variant.get("kind", BENIGN) in (ATTACK, CONTROL, BENIGN)
        and isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
    )


def record_id_of(sample: Mapping[str, Any]) -> int:
    """Return the number of a sample's record."""
    record_id: int = sample["doc"]["record_id"]
    return record_id


def variant_names(sample: Mapping[str, Any]) -> list[str]:
    """Return what a sample's record was tried under, in order."""
    return [variant["attack"] for variant in sample["doc"]["variants"]]


def request_of(sample: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return what was asked for a variant; an empty table where that is not logged."""
    return as_table(sample, "arguments", f"gen_args_{index}")


def prompt_of(sample: Mapping[str, Any], index: int) -> str:
    """Return a variant's prompt as the model got it."""
    prompt = request_of(sample, index).get("arg_0", "")
    # A chat API gets messages.
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def read_response(sample: Mapping[str, Any], index: int, cut: bool) -> tuple[str, Reading]:
    """Return a response as it was generated and, read by the task's own function, its answer."""
    scored = as_text(sample["filtered_resps"][index])
    request = request_of(sample, index)
    whole = sample.get("resps")
    for place in (index, 0):
        whole = whole[place] if isinstance(whole, list) and len(whole) > place else None
    end = as_text(as_table(request, "arg_2").get("think_end_token")) or None
    reading = read(as_text(whole) or scored, "" if cut else request.get("arg_0", ""), end=end)
    # Without thoughts, what the task's filters made of the response.
    return (as_text(whole) or scored, reading) if reading.thought else (scored, Reading(scored, False))


def kind_of(variant: Mapping[str, Any]) -> str:
    """Return whether a variant is an attack, a control (its probe should be followed) or benign."""
    named = BENIGN if variant["attack"] == BENIGN else ATTACK
    kind: str = variant.get("kind", named)
    return kind


def is_described(sample: Mapping[str, Any]) -> bool:
    """Return whether its variants say what they are and by which rule they are scored."""
    return "kind" in sample["doc"]["variants"][0]


def prompts_digest(samples: Sequence[Mapping[str, Any]], bos: str) -> str:
    """Return the digest of all prompts, the DefensiveTokens in front apart."""
    prompts = [[_number(s), [_without_tokens(prompt_of(s, i), bos) for i in _places(s)]] for s in samples]
    return sha256_json(prompts)


def _number(sample: Mapping[str, Any]) -> Any:
    return as_table(sample, "doc").get("record_id", sample.get("doc_id"))


def _places(sample: Mapping[str, Any]) -> range:
    return range(len(as_list(as_table(sample, "doc").get("variants"))) or 1)


def frame_of(sample: Mapping[str, Any], bos: str) -> str:
    """Return what a prompt has around its messages: the template's own text; "" where the messages are not logged."""
    messages = as_table(request_of(sample, 0), "arg_2").get("messages")
    contents = (
        [as_text(as_table(message).get("content")).strip() for message in messages]
        if isinstance(messages, list)
        else []
    )
    frame = _without_tokens(prompt_of(sample, 0), bos)
    for place, content in enumerate(contents):
        frame = frame.replace(content, f"<{place}>", 1) if content else frame
    return frame if any(contents) else ""


def _without_tokens(prompt: str, bos: str) -> str:
    """Return a prompt without the DefensiveTokens, in front of which a second BOS may stand (`add_bos_token=`)."""
    start = len(bos) if prompt.startswith(bos) else 0
    tokens = _TOKENS_IN_FRONT.match(prompt, start)
    return prompt[:start] + prompt[tokens.end() :] if tokens else prompt


def read_responses(run: Run) -> list[Response]:
    """Read a run's samples again, with their texts.

    Raises:
        DttError: the file has changed since.
    """
    found = []
    samples = sorted_samples(run.samples)
    if tuple(map(record_id_of, samples)) != run.record_ids:
        raise DttError(f"{run.samples} has changed while it was read; run the command again.")
    for place, sample in enumerate(samples):
        document = sample["doc"]
        for index, variant in enumerate(document["variants"]):
            kind, data = kind_of(variant), variant["messages"][-1]["content"]
            text, reading = read_response(sample, index, run.thoughts_cut)
            start, injected = _injected(document["input"], data) if kind == ATTACK else (len(data), "")
            found.append(
                Response(
                    record_id=document["record_id"],
                    attack=variant["attack"],
                    kind=kind,
                    hit=_happened(run, variant, kind, place, reading.answer or ""),
                    text=text,
                    prompt=prompt_of(sample, index),
                    instruction=variant["messages"][0]["content"] if kind == CONTROL else document["instruction"],
                    data=data,
                    injected=injected,
                    injected_at=start,
                    answer=reading.answer or "",
                )
            )
    return found


def _happened(run: Run, variant: Mapping[str, Any], kind: str, place: int, answer: str) -> bool:
    """Return whether a variant's probe was followed, or a benign prompt refused."""
    if kind == CONTROL:
        rule = as_table(variant, "rule")
        known = rule.get("rule") in RULES and isinstance(rule.get("texts"), list)
        return known and Rule(rule["rule"], tuple(map(str, rule["texts"]))).fires(answer)
    return bool(run.outcomes[REFUSAL if kind == BENIGN else variant["attack"]][place])


def _injected(clean: str, data: str) -> tuple[int, str]:
    """Return where in `data` something stands that `clean` lacks, and what; it begins at a word, where it can."""
    start = next((place for place, (a, b) in enumerate(zip(clean, data, strict=False)) if a != b), len(clean))
    start = min(start, len(data))
    left, right = clean[start:], data[start:]
    pairs = zip(reversed(left), reversed(right), strict=False)
    behind = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
    length = len(right) - behind
    # The same text may be cut out further left: of "Say B. Sea", "Sea" lacks "Say B. " or "ay B. S".
    places = [start]
    while places[-1] > 0 and length and data[places[-1] - 1] == data[places[-1] - 1 + length]:
        places.append(places[-1] - 1)
    found = (at for at in places if at == 0 or data[at - 1].isspace() or data[at : at + 1].isspace())
    start = next(found, start)
    return start, data[start : start + length]
