"""Which chat role carries what: trusted instruction and untrusted data, by default `system` and `user`.

A conversation keeps these two roles until it is rendered; what is trusted is decided by them. Only the template sees
other names, as a model needs them that was trained with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.control_tokens import trusted_roles
from dtt_plugin.prompt.defenses import Message

LoneUser = Literal["user", "system"]


@dataclass(frozen=True)
class Roles:
    """Where the instruction and the data stand in a prompt.

    Raises:
        DttError: a name that can't be one.
    """

    untrusted: str = "user"
    """The role of the untrusted data. With another than `user`, the instruction stands in `user`, as Meta SecAlign
    (arXiv 2507.02735) has it with `input`."""
    lone_user: LoneUser = "user"
    """The role of a user message that comes without a system message, as those of most lm-eval tasks do."""

    def __post_init__(self) -> None:
        if not self.untrusted.isidentifier() or self.untrusted in trusted_roles(trust_assistant=True):
            raise DttError(
                f"untrusted_role={self.untrusted!r} is no role for untrusted data; give the one that the model was"
                " trained with, such as input, or leave it out for user."
            )
        if self.lone_user not in get_args(LoneUser):
            raise DttError(f"lone_user={self.lone_user!r} is neither system (trusted) nor user (untrusted).")

    def placed(self, messages: Sequence[Message]) -> list[Message]:
        """Return `messages` with a lone user message in the role `lone_user`.

        Raises:
            DttError: it should be the trusted one, and there are several.
        """
        if self.lone_user == "user" or any(message.get("role") == "system" for message in messages):
            return list(messages)
        if sum(message.get("role") == "user" for message in messages) > 1:
            raise DttError(
                "lone_user=system is for conversations of one user message, and this one has several; add"
                " --fewshot_as_multiturn False, or leave lone_user out."
            )
        return [message | {"role": "system"} if message.get("role") == "user" else message for message in messages]

    def named(self, messages: Sequence[Message]) -> list[Message]:
        """Return `messages` with the role names that the template gets."""
        if self.untrusted == "user":
            return list(messages)
        names = {"system": "user", "user": self.untrusted}
        return [message | {"role": names.get(message["role"], message["role"])} for message in messages]
