"""From a conversation to the exact prompt: defenses, neutralised untrusted data, one format, token ids.

Both model wrappers render through this module, so their prompts are the same
token for token.
"""

from __future__ import annotations

import json
import logging
import os.path
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.prompt.bos import PROBES, bos_to_render
from dtt_plugin.prompt.control_tokens import (
    DEFENSIVE_TOKEN_PREFIX,
    Neutraliser,
    control_texts,
    separator_for,
    strings_in,
    trusted_roles,
)
from dtt_plugin.prompt.defenses import TOKENS, Message, add_trusted_words, apply_prompt_defenses, mark_data
from dtt_plugin.prompt.formats import (
    DEFAULT_TEMPLATE,
    TOKENS_SWITCH,
    chat_template,
    defensive_token_names,
    markers,
    plain_text_markers,
    protection,
    request_variables,
)
from dtt_plugin.prompt.roles import Roles
from dtt_plugin.safe_text import HALF_PAIR

logger = logging.getLogger("dtt_plugin")

_INNOCUOUS = "data"


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation."""

    text: str
    """The prompt; `PromptRenderer.encode` turns it into the ids that the engine gets."""
    messages: list[Message]
    """The conversation as rendered: defenses applied, untrusted data neutralised."""
    neutralised: int
    """Control tokens that were broken in untrusted data."""


class PromptRenderer:
    """Renders conversations for one tokenizer, prompt format and defense.

    Args:
        tokenizer: a Hugging Face tokenizer. With the defense "tokens" it knows the DefensiveTokens' names.
        prompt_format: see `dtt_plugin.prompt.formats`.
        model_template: the model's own chat template, for the format "model".
        defenses: from `parse_defense`.
        k: number of DefensiveTokens; used with the defense "tokens" only.
        bos: the BOS text that the model's template lacks, from `missing_bos` on the undefended tokenizer; None:
            `tokenizer` is that one, or has got the names only.
        extra_bos: put one more BOS in front of everything, as the reference run had it.
        template_args: variables for the chat template.
        roles: under which names instruction and data stand in the prompt.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt_format: str,
        model_template: str | None,
        defenses: Collection[str],
        k: int = 0,
        bos: str | None = None,
        extra_bos: bool = False,
        template_args: Mapping[str, Any] | None = None,
        roles: Roles = Roles(),  # noqa: B008  it is frozen
    ) -> None:
        self.tokenizer = tokenizer
        self.roles = roles
        self.prompt_format = prompt_format
        self.defenses = tuple(defenses)
        self.template_args = dict(template_args or {})
        if bos is None:
            bos = missing_bos(tokenizer, model_template, prompt_format)
        self._bos = bos
        names = defensive_token_names(k) if TOKENS in self.defenses else []
        self.template, self._undefended_template = (
            chat_template(prompt_format, model_template=model_template, k=n, bos=bos) for n in (len(names), 0)
        )
        _check_whole(self.template, "The chat template")
        _check_whole(json.dumps(self.template_args, ensure_ascii=False, default=str), "chat_template_args")
        if extra_bos and not tokenizer.bos_token:
            raise DttError("add_bos_token=True: this model's tokenizer has no BOS token; leave the argument out.")
        self._front = tokenizer.bos_token if extra_bos else ""
        added = tokenizer.get_added_vocab()
        tokens = [*added, *tokenizer.all_special_tokens]
        self.controls = control_texts([*tokens, *markers(prompt_format)])
        if said := protection(prompt_format, plain_text_markers(prompt_format, tokens, self._try)):
            logger.warning("%s", said)
        self.separator = separator_for(self.controls)
        self._control_ids = {i for text, i in added.items() if text.strip()} | set(tokenizer.all_special_ids)
        neutraliser = Neutraliser(self.controls)
        for name in self.template_args.keys() & set(request_variables(self.template)):
            self.template_args[name] = neutraliser.value(self.template_args[name])
        self._token_ids: list[int] = tokenizer.convert_tokens_to_ids(names)
        self._defensive_ids = set(defensive_token_ids(tokenizer))
        self._openings = self._find_openings()

    def _try(self, messages: Sequence[Message]) -> str | None:
        try:
            return self._apply(self.template, messages)
        except DttError:
            return None

    def _apply(self, template: str, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        messages = self.roles.named(messages)
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                continue_final_message=not generation_prompt,
                **self.template_args,
            )
        except Exception as error:  # a template is a program of the model's: it may raise anything
            names = ", ".join(str(message.get("role")) for message in messages)
            raise DttError(
                f"The chat template (prompt_format={self.prompt_format}) refuses a conversation with the roles"
                f" {names}: {error}. Choose a published format with prompt_format=, or another model."
            ) from error
        return rendered

    def _find_openings(self) -> list[str]:
        """Return how prompts begin, with a system message and without; a template may refuse either."""
        openings = []
        for roles in (["system", "user"], [self.roles.lone_user]):
            conversations = [[{"role": role, "content": content} for role in roles] for content in "ab"]
            try:
                rendered = [self._front + self._apply(self.template, messages) for messages in conversations]
            except DttError:
                continue
            openings.append(os.path.commonprefix(rendered))  # noqa: RUF071  these are texts, not paths
        return openings

    def is_rendered(self, text: str, *, asked: bool = True) -> bool:
        """Return whether `text` begins as a prompt of this renderer does.

        Args:
            text: that is to be sent.
            asked: whether the renderer was asked for prompts at all; a template that begins with the message
                itself, which tells nothing, is believed only then.
        """
        return bool(text) and any(text.startswith(opening) for opening in self._openings if opening or asked)

    def check_arm(self) -> int:
        """Check, before the first batch, that the arm's prompts are what its name says.

        Returns:
            How many DefensiveTokens stand in a prompt: k, or for a defended checkpoint as many as its own
            template renders.

        Raises:
            DttError: a prompt does not hold exactly the arm's DefensiveTokens, in front.
        """
        for messages in PROBES:
            try:
                ids = self.encode(self._front + self._apply(self.template, messages))
            except DttError:  # a role that the template refuses; the prompts that are sent are checked, too
                continue
            self.check_tokens(ids)
            undefended = self._apply(self._undefended_template, messages)
            if self._token_ids:
                self._compare_arms(ids, self.encode(self._front + undefended))
            if self._bos and not self._front:
                self._compare_with_stock(undefended)
            return sum(i in self._defensive_ids for i in ids)
        return 0

    def check_tokens(self, ids: Sequence[int]) -> None:
        """Check that a prompt of an arm with DefensiveTokens holds each of them once, in order, in front.

        Only the BOS of `extra_bos` may stand before them. Without tokens in the arm nothing is checked: the
        template of a defended checkpoint decides itself.

        Raises:
            DttError: it does not.
        """
        k, start = len(self._token_ids), self._start
        held = [i for i in ids if i in self._defensive_ids]
        if not k or held == self._token_ids == list(ids[start : start + k]):
            return
        found = f"holds {len(held)}" if len(held) != k else "holds them elsewhere"
        reason = "the chat template drops, moves or doubles them"
        if TOKENS_SWITCH in self.template_args:
            reason = f"chat_template_args sets {TOKENS_SWITCH}={self.template_args[TOKENS_SWITCH]}"
        raise DttError(
            f"A prompt of an arm with DefensiveTokens has to begin with the {k} of them, and this one {found}"
            f" ({reason}), so the results would not be those of the defense; correct that, or run defense=none."
        )

    @property
    def _start(self) -> int:
        """Where the DefensiveTokens begin: behind the second BOS, if there is one."""
        return len(self.encode(self._front)) if self._front else 0

    def _compare_arms(self, defended: Sequence[int], undefended: Sequence[int]) -> None:
        """Say where a prompt with DefensiveTokens differs from the one without by more than these tokens."""
        rest = [*defended[: self._start], *defended[self._start + len(self._token_ids) :]]
        if rest == undefended:
            return
        place, with_tokens, without = self._first_difference(rest, undefended)
        logger.warning(
            "The arms with and without DefensiveTokens differ by more than these tokens: from token %d of the prompt on"
            " they read %s with them and %s without, since this tokenizer treats the beginning of a text in a way of"
            " its own; compare them with that in mind, or choose a published format with prompt_format=.",
            place,
            with_tokens,
            without,
        )

    def _compare_with_stock(self, undefended: str) -> None:
        """Say where a tokenizer that adds the BOS by itself begins a prompt otherwise than behind a rendered one."""
        stock, ours = list(self.tokenizer(undefended.removeprefix(self._bos)).input_ids), self.encode(undefended)
        if stock[:1] != ours[:1] or stock == ours:  # a baked tokenizer adds none
            return
        place, theirs, here = self._first_difference(stock, ours)
        logger.warning(
            "lm-eval's own models begin this undefended model's prompts otherwise: from token %d on they read %s there"
            " and %s here, in every arm, since this tokenizer treats the beginning of a text in a way of its own;"
            " compare runs of the dtt_ models, or of a defended checkpoint, among each other.",
            place,
            theirs,
            here,
        )

    def _first_difference(self, one: Sequence[int], other: Sequence[int]) -> tuple[int, list[str], list[str]]:
        """Return the place from which two prompts differ, and what each of them has there."""
        place = len(os.path.commonprefix([list(one), list(other)]))  # noqa: RUF071  ids, not paths
        there, here = (self.tokenizer.convert_ids_to_tokens(list(ids[place : place + 3])) for ids in (one, other))
        return place, there, here

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> Prompt:
        """Return the prompt of a conversation.

        Args:
            messages: trusted system text, untrusted user (and tool) text, assistant turns.
            generation_prompt: end with the opening of the assistant's turn; else the last message stays open.

        Raises:
            DttError: the template drops the instruction or the data, a prompt defense does not apply, or
                untrusted data would still yield a control token.
        """
        neutraliser = Neutraliser(self.controls, template=self.template)
        safe: list[Message] = neutraliser.messages(mark_data(self.roles.placed(messages), self.defenses))
        defended = add_trusted_words(safe, self.defenses)
        text = self._front + self._apply(self.template, defended, generation_prompt)
        self._check_complete(text, defended)
        self._check_control_ids(text, safe, generation_prompt)
        return Prompt(text, self.roles.named(defended), neutraliser.occurrences)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered prompt, or of a continuation: nothing is added.

        Raises:
            DttError: the text holds half a surrogate pair, which no tokenizer takes.
        """
        _check_whole(text, "A text to send")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _check_complete(self, text: str, messages: Sequence[Message]) -> None:
        for message in messages:
            if message["role"] != "assistant" and any(
                part.strip() not in text for part in _texts(message.get("content"))
            ):
                raise DttError(
                    f"The chat template (prompt_format={self.prompt_format}) drops or rewrites the"
                    f" {message['role']} message; choose a published format with prompt_format=, or another model."
                )

    def _check_control_ids(self, text: str, messages: Sequence[Message], generation_prompt: bool) -> None:
        """Second line of defense: the prompt has the control ids of the same prompt with harmless data."""
        harmless: list[Message] = []
        surplus: Counter[int] = Counter()
        for message in messages:
            if message["role"] not in trusted_roles():
                # Of other fields and shapes a template may need any value, so each string is looked at by itself.
                content = message.get("content")
                plain = {"role", "content"} if isinstance(content, str) else {"role"}
                for string in strings_in({key: item for key, item in message.items() if key not in plain}):
                    surplus += self._count_controls(string)
                message = {**message, "content": _harmless(content)}
            harmless.append(message)
        expected = self._front + self._apply(
            self.template, apply_prompt_defenses(harmless, self.defenses), generation_prompt
        )
        surplus += self._count_controls(text) - self._count_controls(expected)
        if surplus:
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(list(surplus)))
            raise DttError(
                f"Untrusted data would yield the control tokens {names} in spite of neutralisation: this tokenizer"
                " normalises text into them; such a model can't be evaluated safely."
            )

    def _count_controls(self, text: str) -> Counter[int]:
        return Counter(i for i in self.encode(text) if i in self._control_ids)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides how a conversation becomes ids, the tokenizer's vocabulary apart."""
        return sha256_json(
            [
                self.template,
                self.defenses,
                self._front,
                self.template_args,
                self.controls,
                self.separator,
                [self.roles.untrusted, self.roles.lone_user],
            ]
        )


def _texts(content: Any) -> list[str]:
    """Return the texts of a content: it may be one, or parts as the OpenAI API has them."""
    if isinstance(content, str):
        return [content]
    if isinstance(content, Mapping):
        return _texts(content.get("text"))
    return [text for part in content for text in _texts(part)] if isinstance(content, list) else []


def _harmless(content: Any) -> Any:
    """Return a content of the same shape with other texts."""
    if isinstance(content, Mapping) and "text" in content:
        return {**content, "text": _harmless(content["text"])}
    if isinstance(content, list):
        return [_harmless(part) for part in content]
    return _INNOCUOUS if isinstance(content, str) else content


def _check_whole(text: str, what: str) -> None:
    """Refuse a text that no tokenizer takes and no file holds."""
    if half := HALF_PAIR.search(text):
        around = text[max(half.start() - 30, 0) : half.end() + 30]
        raise DttError(f"{what} holds half a surrogate pair, which is no text: {around!r}; correct it.")


class ModelTemplate(NamedTuple):
    """A chat template of a model's own."""

    text: str
    bos: str
    """The BOS text that has to be rendered in front of it, see `dtt_plugin.prompt.bos`; usually empty."""


def model_templates(tokenizer: Any, prompt_format: str) -> dict[str, ModelTemplate]:
    """Return the chat templates of an undefended tokenizer by name; the usual one is called "default"."""
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {DEFAULT_TEMPLATE: own} if own else {}
    return {name: ModelTemplate(text, missing_bos(tokenizer, text, prompt_format)) for name, text in named.items()}


def model_template(tokenizer: Any) -> str | None:
    """Return a tokenizer's own chat template; of several the one called "default"."""
    template = tokenizer.chat_template
    return template.get(DEFAULT_TEMPLATE) if isinstance(template, dict) else template


def missing_bos(tokenizer: Any, template: str | None, prompt_format: str) -> str:
    """Return the BOS text that `bos_to_render` decides on for an undefended Hugging Face tokenizer."""
    if template is None:
        return ""

    def render(messages: list[Message]) -> str | None:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception:  # a template is a program of the model's: whatever it raises, it does not render this
            return None

    bos_id = tokenizer.bos_token_id
    adds_bos = bos_id is not None and tokenizer("a").input_ids[:1] == [bos_id]
    return bos_to_render(prompt_format, bos=tokenizer.bos_token, adds_bos=adds_bos, render=render)


def defensive_token_ids(tokenizer: Any) -> list[int]:
    """Return the ids of the DefensiveTokens that a tokenizer knows, ascending."""
    added = tokenizer.get_added_vocab()
    return sorted(i for text, i in added.items() if text.startswith(DEFENSIVE_TOKEN_PREFIX))


def add_token_names(tokenizer: Any, k: int, *, name: str) -> list[int]:
    """Give a Hugging Face tokenizer the names of k DefensiveTokens, and return their ids.

    Args:
        tokenizer: of an undefended model; changed in place.
        k: how many.
        name: the model's name, for messages.

    Raises:
        DttError: it knows DefensiveTokens already.
    """
    from transformers import AddedToken

    if has_defensive_tokens(tokenizer):
        raise DttError(f"{name} already has DefensiveTokens; leave tokens= out, or give the undefended checkpoint.")
    names = defensive_token_names(k)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in names], special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)
    return ids


def has_defensive_tokens(tokenizer: Any) -> bool:
    """Return whether a tokenizer already knows DefensiveTokens (a defended checkpoint's does)."""
    return bool(defensive_token_ids(tokenizer))
