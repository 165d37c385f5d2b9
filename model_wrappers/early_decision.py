"""`early_decision=true`: end every generation as soon as the task's metrics can no longer change.

A task that can vouch for it gives each request a rule, `decided(beginning)`:
whatever follows that beginning of a response, the metrics stay as they are. The
wrappers ask the rule about text that no later token can change, and end the
generation when it says yes. Greedy decoding only: the tokens up to there are
those of the full generation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtt_plugin.errors import DttError

if TYPE_CHECKING:
    import torch
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

Rule = Callable[[str], bool]

# What a rule can be used with: a text that only grows. Beams, for instance, are reordered later.
_ALLOWED = frozenset(
    ["until", "do_sample", "temperature", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"]
)
# " n't" becomes "n't" where a tokenizer cleans up spaces: its last three characters can still change.
_CLEANED_UP_LATER = 3


def rule_of(request: Any) -> Rule:
    """Return the rule that the request's task declares.

    Args:
        request: an lm-eval `Instance` whose arguments are a prompt and generation arguments.

    Raises:
        DttError: the task declares no rule, or the generation is not plain greedy.
    """
    rule: Rule | None = getattr(request, "decided", None)
    if rule is None:
        raise DttError(
            f"{request.task_name} does not say when a response decides its metrics, so early_decision=true can't give"
            " the same values; leave early_decision out."
        )
    generation: Mapping[str, Any] = request.arguments[1]
    greedy = not generation.get("do_sample") and not float(generation.get("temperature") or 0)
    if not greedy or not generation.keys() <= _ALLOWED:
        names = ", ".join(sorted(generation.keys() - _ALLOWED)) or "sampling"
        raise DttError(
            f"{request.task_name} is run with {names}, and early_decision=true knows only greedy decoding with until"
            " and max_gen_toks; change --gen_kwargs or leave early_decision out."
        )
    return rule


def all_of(rules: Sequence[Rule]) -> Rule:
    """Return the rule that says yes once all of them do."""
    return rules[0] if len(rules) == 1 else lambda text: all(rule(text) for rule in rules)


class SettledText:
    """The part of a partial response that no later token changes.

    `decode` must read a run of ids from its start alone; that is every Hugging Face tokenizer, save for the
    last few characters: half a UTF-8 character, a byte run, spaces that are cleaned up later, a stop sequence
    that has only begun.

    Args:
        tokenizer: a Hugging Face tokenizer.
        decode: how the engine turns new token ids into text.
        until: stop sequences; the response ends before the first of them.
    """

    def __init__(self, tokenizer: Any, decode: Callable[[list[int]], str], until: Sequence[str]) -> None:
        self._decode = decode
        self._until = [stop for stop in until if stop]
        self._held_back = max(map(len, self._until), default=1) - 1
        # SentencePiece's byte tokens are decoded as one run, and one that is no UTF-8 spoils the whole run.
        self._bytes = {i for token, i in tokenizer.get_vocab().items() if len(token) == 6 and token[:3] == "<0x"}

    def of(self, ids: list[int]) -> str:
        """Return the settled beginning of the response whose first tokens are `ids`."""
        end = len(ids)
        while end and ids[end - 1] in self._bytes:
            end -= 1
        text = self._decode(ids[:end]).rstrip("\N{REPLACEMENT CHARACTER}")[:-_CLEANED_UP_LATER]
        settled = text[: max(len(text) - self._held_back, 0)]
        # A stop sequence that begins inside `settled` is complete inside `text`.
        return settled[: min((text.find(stop) for stop in self._until if stop in text), default=None)]


class EndDecided:
    """A transformers logits processor that makes a row whose response is decided end.

    Args:
        prompt_length: columns of the batch that are prompt.
        ends: the model's ids that end a generation; the first is the one to end with.
        settled: reads the new ids of a row.
        decided: each row's rule.
    """

    def __init__(self, prompt_length: int, ends: Sequence[int], settled: SettledText, decided: Sequence[Rule]) -> None:
        self._prompt_length = prompt_length
        self._ends = ends
        self._settled = settled
        self._decided = decided
        self._over: set[int] = set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores`, float [batch, vocabulary], with rows that can only end; `input_ids` int [batch, length]."""
        for row, ids in enumerate(input_ids[:, self._prompt_length :].tolist()):
            if row in self._over or (ids and ids[-1] in self._ends):
                self._over.add(row)
            elif self._decided[row](self._settled.of(ids)):
                self._over.add(row)
                scores[row] = float("-inf")
                scores[row, self._ends[0]] = 0
        return scores


def count_generated(rows: Sequence[Sequence[int]], ends: Collection[int]) -> int:
    """Return how many tokens were generated: per row all up to the first that ends it; the rest is padding."""
    return sum(next((n for n, token in enumerate(row, 1) if token in ends), len(row)) for row in rows)


def generate_decided(
    engine: LLMEngine,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    decided: Sequence[Rule],
    *,
    lora_request: LoRARequest | None = None,
    progress: bool = True,
) -> list[RequestOutput]:
    """Generate with a vLLM engine as `LLM.generate` does, but abort each request once its response is decided.

    vLLM's partial text holds back half characters and what may become a stop sequence.

    Args:
        engine: a vLLM engine without other requests.
        prompts: token ids.
        params: sampling parameters, one for each prompt.
        decided: rules, one for each prompt.
        lora_request: adapter to generate with.
        progress: show a bar.

    Returns:
        Per prompt, vLLM's last output.
    """
    from tqdm import tqdm
    from vllm import TokensPrompt

    for index, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(index), TokensPrompt(prompt_token_ids=list(prompt)), sampling, lora_request=lora_request)
    outputs: dict[int, RequestOutput] = {}
    running = set(range(len(prompts)))
    # Reading prompts takes most of the time, and no response is decided before: each of the two is one step of the bar.
    with tqdm(total=2 * len(running), disable=not progress, desc="Deciding") as bar:
        while engine.has_unfinished_requests():
            over = []
            for output in engine.step():
                index = int(output.request_id)
                if index not in running:
                    continue
                bar.update(index not in outputs)
                outputs[index] = output
                if output.finished or decided[index](output.outputs[0].text):
                    running.discard(index)
                    bar.update()
                    over += [] if output.finished else [output.request_id]
            if over:
                engine.abort_request(over)
    return [outputs[index] for index in range(len(prompts))]
