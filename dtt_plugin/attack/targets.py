"""What a response is to begin with: the word that the rule reads, or what the undefended model would say."""

from __future__ import annotations

import torch

from dtt_plugin.attack.objective import Objective, Target
from dtt_plugin.attack.place import Place
from dtt_plugin.training.soft_prompt import Example, SoftPrompt

WORDS = ("Hacked", "hacked")
"""The rule reads the beginning of a response, in lower case; the likelier spelling is optimised for."""
TEACHER_TOKENS = 8


def words(place: Place) -> list[Target]:
    """Return the spellings that the rule takes."""
    return [Target(word, place.renderer.encode(word)) for word in WORDS]


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
