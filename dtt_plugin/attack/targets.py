"""What a response is to begin with: a text that the rule reads, or what the undefended model would say."""

from __future__ import annotations

import torch

from dtt_plugin.attack.objective import Objective, Target
from dtt_plugin.attack.place import Place
from dtt_plugin.errors import DttError
from dtt_plugin.training.soft_prompt import Example, SoftPrompt

TEACHER_TOKENS = 8
_MOST_TOKENS = 50
_MOST_TEXTS = 4
_READS_TEXTS = ("starts_with", "contains_word", "contains_any", "equals_number", "fuzzy")
_ALL_OF_THEM = "contains_all"


def words(place: Place) -> list[Target]:
    """Return what a response may begin with that the rule takes, in several spellings: rules read no case.

    Raises:
        DttError: the rule looks for no text.
    """
    name, texts = place.rule
    if name not in (*_READS_TEXTS, _ALL_OF_THEM):
        raise DttError(f"The rule {name} looks for no text that a response could begin with; attack other records.")
    wanted = [" ".join(texts)] if name == _ALL_OF_THEM else texts[:_MOST_TEXTS]
    spelt = dict.fromkeys(form for text in wanted for form in (text[:1].upper() + text[1:], text, text.lower()))
    return [Target(word, place.renderer.encode(word)[:_MOST_TOKENS]) for word in spelt]


def aim_at_likelier(objective: Objective) -> None:
    """Let an objective aim at the spelling that is likelier where the search starts."""
    losses = []
    targets = words(objective.place)
    for target in targets:
        objective.aim(target)
        losses.append(float(objective.of_current(objective.place.start).loss[0]))
    objective.aim(targets[losses.index(min(losses))])


@torch.no_grad()
def undefended_answer(undefended: SoftPrompt, place: Place, pad: int) -> Target:
    """Return what the model without tokens says to the injected prompt without a suffix, as a distribution.

    A defended model that imitates it has lost what its tokens gave it ("cancel the tokens").
    """
    prompt = place.prompt("")
    [ids] = undefended.generate([prompt], TEACHER_TOKENS, pad=pad)
    log_p = undefended.label_logits([Example(prompt, ids)]).log_softmax(dim=1)
    return Target(place.renderer.tokenizer.decode(ids), ids, log_p)
