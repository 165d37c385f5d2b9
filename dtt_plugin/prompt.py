"""From a conversation to the exact prompt: defenses, neutralised untrusted data, one format, token ids.

Both model wrappers render through this module, so their prompts are the same
token for token.
"""

from __future__ import annotations

import logging
import os.path
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtt_plugin.control_tokens import (
    DEFENSIVE_TOKEN_PREFIX,
    Neutraliser,
    control_texts,
    separator_for,
    strings_in,
    trusted_roles,
)
from dtt_plugin.defenses import TOKENS, Message, apply_prompt_defenses
from dtt_plugin.errors import DttError
from dtt_plugin.files import sha256_json
from dtt_plugin.formats import (
    MODEL_FORMAT,
    chat_template,
    markers,
    plain_text_markers,
    protection,
    request_variables,
)

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
        prompt_format: see `dtt_plugin.formats`.
        model_template: the model's own chat template, for the format "model".
        defenses: from `parse_defense`.
        k: number of DefensiveTokens; used with the defense "tokens" only.
        extra_bos: put one more BOS in front of everything, as the reference run had it.
        template_args: variables for the chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt_format: str,
        model_template: str | None,
        defenses: Collection[str],
        k: int = 0,
        extra_bos: bool = False,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.defenses = tuple(defenses)
        self.template_args = dict(template_args or {})
        self.template = chat_template(
            prompt_format,
            model_template=model_template,
            k=k if TOKENS in self.defenses else 0,
            bos=self._missing_bos(model_template) if prompt_format == MODEL_FORMAT else "",
        )
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
        self._opening = self._common_opening()

    def _try(self, messages: Sequence[Message]) -> str | None:
        try:
            return self._apply(self.template, messages)
        except DttError:
            return None

    def _missing_bos(self, model_template: str | None) -> str:
        """Return the BOS text where the tokenizer adds a BOS to plain text and the template renders none."""
        bos = self.tokenizer.bos_token
        if not bos or not model_template or self.tokenizer("a").input_ids[0] != self.tokenizer.bos_token_id:
            return ""
        rendered = self._apply(model_template, [{"role": "user", "content": _INNOCUOUS}])
        return "" if rendered.startswith(bos) else str(bos)

    def _apply(self, template: str | None, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        import jinja2

        try:
            rendered: str = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                continue_final_message=not generation_prompt,
                **self.template_args,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DttError(
                f"The chat template (prompt_format={self.prompt_format}) refuses a conversation with the roles"
                f" {roles}: {error}. Choose a published format with prompt_format=, or another model."
            ) from error
        return rendered

    def _common_opening(self) -> str:
        conversations: list[list[Message]] = [
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
            [{"role": "system", "content": "c"}, {"role": "user", "content": "d"}],
            [{"role": "user", "content": "e"}],
        ]
        rendered = []
        for conversation in conversations:
            try:
                rendered.append(self._front + self._apply(self.template, conversation))
            except DttError:  # no system role: the conversations that the format can render decide
                continue
        return os.path.commonprefix(rendered)  # noqa: RUF071  these are texts, not paths

    def is_rendered(self, text: str) -> bool:
        """Return whether `text` begins as every prompt of this renderer does."""
        return bool(text) and text.startswith(self._opening)

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
        safe: list[Message] = neutraliser.messages(messages)
        defended = apply_prompt_defenses(safe, self.defenses)
        text = self._front + self._apply(self.template, defended, generation_prompt)
        self._check_complete(text, defended)
        self._check_control_ids(text, safe, generation_prompt)
        return Prompt(text, defended, neutraliser.occurrences)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered prompt, or of a continuation: nothing is added."""
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
            [self.template, self.defenses, self._front, self.template_args, self.controls, self.separator]
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


def model_template(tokenizer: Any) -> str | None:
    """Return a tokenizer's own chat template; of several the one called "default"."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def has_defensive_tokens(tokenizer: Any) -> bool:
    """Return whether a tokenizer already knows DefensiveTokens (a defended checkpoint's does)."""
    return any(text.startswith(DEFENSIVE_TOKEN_PREFIX) for text in tokenizer.get_added_vocab())
