"""Asks a running server, from outside, whether its requests are defended as they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import requests

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.control_tokens import DEFENSIVE_TOKEN_PREFIX
from dtt_plugin.prompt.formats import CHOICE, PUBLISHED_FORMATS, TOKENS_SWITCH, markers

_SECONDS = 120
_INSTRUCTION, _DATA = "Answer in one word.", "1 + 1"
_NOBODY = "dtt-no-such-tokens"


class Finding(NamedTuple):
    """The result of one check, in one line."""

    check: str
    ok: bool
    message: str


class Server:
    """A server with the OpenAI API of vLLM.

    Raises:
        DttError: nothing answers there, or it serves no model.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            served = [str(entry["id"]) for entry in requests.get(f"{self.url}/v1/models", timeout=30).json()["data"]]
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise DttError(f"--check {url}: no server with the OpenAI API answers there ({error}).") from error
        if not served or (model is not None and model not in served):
            raise DttError(f"--check {url}: the server has no such model; it has: {', '.join(served) or 'none'}.")
        self.model = model or served[0]

    def post(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Return status and body of an answer."""
        try:
            answer = requests.post(f"{self.url}{path}", json={"model": self.model, **body}, timeout=_SECONDS)
            content = answer.json()
        except (requests.RequestException, ValueError) as error:
            raise DttError(f"The server broke off a request to {path} ({error}).") from error
        return answer.status_code, content if isinstance(content, dict) else {}

    def prompt(self, data: Any = _DATA, variables: Mapping[str, Any] | None = None, **body: Any) -> list[int] | None:
        """Return the ids of the prompt that the engine got for a conversation; None where it was refused.

        Raises:
            DttError: the server tells no ids.
        """
        messages = [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": data}]
        status, answer = self.post(
            "/v1/chat/completions",
            **{"messages": messages, "max_tokens": 1, "return_token_ids": True} | body,
            **({"chat_template_kwargs": dict(variables)} if variables is not None else {}),
        )
        return _ids(status, answer)

    def completion(self, text: str) -> list[int] | None:
        """Return the ids of the prompt that the engine got for plain text; None where it was refused."""
        status, answer = self.post("/v1/completions", prompt=text, max_tokens=1, return_token_ids=True)
        if status == 200 and answer.get("choices"):
            answer = answer["choices"][0]
        return _ids(status, answer)

    def single(self, text: str) -> int | None:
        """Return the id of a text that is one token, else None."""
        status, answer = self.post("/tokenize", prompt=text, add_special_tokens=False)
        tokens = answer.get("tokens") if status == 200 else None
        return tokens[0] if isinstance(tokens, list) and len(tokens) == 1 else None

    def text_of(self, token_id: int) -> str:
        """Return a token's text."""
        _, answer = self.post("/detokenize", tokens=[token_id])
        return str(answer.get("prompt", ""))


def _ids(status: int, answer: Mapping[str, Any]) -> list[int] | None:
    if 400 <= status < 500:
        return None
    ids = answer.get("prompt_token_ids")
    if status != 200 or not isinstance(ids, list):
        raise DttError(f"The server answers with status {status} and no prompt_token_ids; is it a vLLM that has them?")
    return ids


def check_server(url: str, *, model: str | None = None) -> Iterator[Finding]:
    """Yield a finding per check, as each is done.

    Args:
        url: of the server, with or without /v1.
        model: one of its models; by default the first.

    Raises:
        DttError: nothing answers there.
    """
    server = Server(url, model)
    try:
        off: dict[str, Any] = {CHOICE: None}
        default, without = server.prompt(), server.prompt(variables=off)
        if default == without:  # a defended checkpoint
            off = {TOKENS_SWITCH: False}
            without = server.prompt(variables=off)
    except DttError as error:
        yield Finding("conversations", False, str(error))
        return
    if default is None or without is None:
        yield Finding("conversations", False, "the server refuses a plain conversation, or one without tokens")
        return
    k = len(default) - len(without)
    tokens = default[:k] if k > 0 and default[k:] == without and not {*default[:k]} & {*without} else []
    if tokens:
        yield Finding("tokens in front", True, f"{k} of them, the rest as without")
    else:
        yield Finding("tokens in front", False, "requests that choose nothing have no DefensiveTokens")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("control tokens in data", lambda: _hostile(server, default)),
        ("plain completions", lambda: _plain(server, tokens)),
        ("unknown names", lambda: _unknown(server, off)),
        ("prompts that are cut", lambda: _same_or_refused(server, default, truncate_prompt_tokens=len(without))),
        ("prompts as ids", lambda: _same_or_refused(server, default, kv_transfer_params={"prompt_token_ids": without})),
        ("templates of clients", lambda: _same_or_refused(server, default, chat_template="{{ messages[1].content }}")),
    ]
    for name, check in checks:
        try:
            yield Finding(name, True, check())
        except DttError as error:
            yield Finding(name, False, str(error))


def _hostile(server: Server, harmless: list[int]) -> str:
    """Try every control token that can be known from outside: those of the prompt itself, and well-known ones."""
    known = {marker for name in PUBLISHED_FORMATS for marker in markers(name)}
    known |= {f"{DEFENSIVE_TOKEN_PREFIX}{i}]" for i in range(len(harmless))[:64]} | {"</s>", "<|endoftext|>"}
    known |= {text for text in map(server.text_of, set(harmless)) if set(text) & set("<>[]|") and len(text) > 2}
    controls = {i: text for text in sorted(known) if (i := server.single(text)) is not None}
    if not controls:
        raise DttError("no control token of this tokenizer could be found, so it was not tried")
    expected = [i for i in harmless if i in controls]
    texts = [*controls.values(), *(f"{t[: len(t) // 2]}{t}{t[len(t) // 2 :]}" for t in controls.values())]
    for data in ("\n".join(texts), [{"type": "text", "text": part} for t in texts[:8] for part in (t[:2], t[2:])]):
        prompt = server.prompt(data)
        if prompt is not None and [i for i in prompt if i in controls] != expected:
            raise DttError("data of a user can hold control tokens, and so pass for an instruction")
    return f"{len(controls)} of them stay text"


def _plain(server: Server, tokens: list[int]) -> str:
    prompt = server.completion(_DATA)
    if prompt is None:
        return "refused"
    if not tokens or prompt[: len(tokens)] != tokens:
        raise DttError("/v1/completions answers without DefensiveTokens")
    if server.completion(server.text_of(tokens[0]) + _DATA) is not None:
        raise DttError("/v1/completions takes DefensiveTokens from the client")
    return "defended"


def _unknown(server: Server, off: Mapping[str, Any]) -> str:
    if CHOICE not in off:
        if server.prompt(variables={CHOICE: _NOBODY}) == server.prompt():
            return "the server has one file's tokens, which no name chooses"
    elif server.prompt(variables={CHOICE: _NOBODY}) is None:
        return "refused"
    raise DttError("a request that names tokens which there are not is answered")


def _same_or_refused(server: Server, expected: list[int], **body: Any) -> str:
    prompt = server.prompt(**body)
    if prompt is None:
        return "refused"
    if prompt != expected:
        raise DttError(f"a request with {next(iter(body))} is answered without the whole prompt")
    return "without effect"
