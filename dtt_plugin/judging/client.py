"""Asking an OpenAI-compatible server, many questions at a time; answers are kept, so that a run can be resumed.

The key comes from the environment alone. It goes to the server and nowhere else: into no file, no message.
"""

from __future__ import annotations

import ipaddress
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_json
from dtt_plugin.files.locks import LOCK_SUFFIX, locked
from dtt_plugin.files.reading import read_bytes
from dtt_plugin.paths import cache_folder
from dtt_plugin.safe_text import one_line

KEY_VARIABLE = "DTT_JUDGE_API_KEY"
_NO_KEY = "none"
"""What a server without keys gets: the client insists on one."""
_AT_ONCE = 8
_RETRIES = 4
_TIMEOUT = 120.0
_LARGEST_CACHE = 1 << 30
_MOST_TOKENS = 512
"""A judge that thinks first needs some room; others stop behind a word."""


class Judge:
    """A model behind a server, and the answers that it gave before."""

    def __init__(self, url: str, model: str, *, timeout: float = _TIMEOUT) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            url: the server's base, such as "http://localhost:8000/v1".
            model: its name there.
            timeout: seconds for one answer.

        Raises:
            DttError: the address is none, or a key would go over the network in clear.
        """
        try:
            import openai
        except ImportError as error:
            raise DttError("--judge needs openai; install it with pip install 'dtt-plugin[judge]'.") from error
        self._key = os.environ.get(KEY_VARIABLE, "")
        _check_address(url, self._key)
        self.url, self.model = url.rstrip("/"), model
        self._errors = openai
        self._client = openai.OpenAI(
            base_url=self.url, api_key=self._key or _NO_KEY, max_retries=_RETRIES, timeout=timeout
        )
        self._kept = cache_folder("judge") / f"{sha256_json([self.url, model])[:16]}.jsonl"
        self._writing = threading.Lock()

    def answers(self, questions: Sequence[str]) -> dict[str, str]:
        """Return the judge's answer to every question; those that were answered before are not asked again.

        Raises:
            DttError: some have no answer. The others' are kept, and the next call asks only for the rest.
        """
        known = self._read_kept()
        found = {question: known[key] for question in questions if (key := self._key_of(question)) in known}
        missing = [question for question in questions if question not in found]
        failures: list[Exception] = []
        stop = threading.Event()

        def ask(question: str) -> None:
            if stop.is_set():
                return
            try:
                found[question] = self._ask(question)
            except (self._errors.OpenAIError, ValueError) as error:  # the latter: the reply is no JSON
                failures.append(error)
                if self._is_hopeless(error):
                    stop.set()

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                list(pool.map(ask, missing))
            except BaseException:
                stop.set()
                raise
        if failures:
            left = sum(question not in found for question in missing)
            raise DttError(
                f"{self.url} did not answer {left} of {len(questions)} questions ({self._told(failures[0])}); its"
                " answers to the others are kept, so run the command again for the rest."
            )
        return found

    def _ask(self, question: str) -> str:
        reply = self._client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=_MOST_TOKENS,
        )
        choices = getattr(reply, "choices", None)  # a server may answer with any JSON
        message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        text = getattr(message, "content", None)
        if not isinstance(text, str):
            raise self._errors.OpenAIError("the reply holds no message")
        self._keep(question, text)
        return text

    def _is_hopeless(self, error: Exception) -> bool:
        """Return whether every other question would fail the same way."""
        refused = (
            self._errors.AuthenticationError,
            self._errors.PermissionDeniedError,
            self._errors.NotFoundError,
        )
        unreachable = isinstance(error, self._errors.APIConnectionError)
        return isinstance(error, refused) or (unreachable and not isinstance(error, self._errors.APITimeoutError))

    def _told(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {one_line(str(error))[:300]}"
        return text.replace(self._key, "***") if self._key else text

    def _key_of(self, question: str) -> str:
        return sha256_json([self.url, self.model, _MOST_TOKENS, question])

    def _read_kept(self) -> dict[str, str]:
        if not self._kept.is_file():
            return {}
        known: dict[str, str] = {}
        for line in read_bytes(self._kept, most=_LARGEST_CACHE).splitlines():
            try:
                entry = json.loads(line)
                known[str(entry["key"])] = str(entry["answer"])
            except (ValueError, KeyError, TypeError):  # a line that was cut short when the disk was full
                continue
        return known

    def _keep(self, question: str, answer: str) -> None:
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": self._key_of(question), "answer": answer}).encode() + b"\n"
        lock = self._kept.with_suffix(LOCK_SUFFIX)
        with self._writing, locked(lock), self._appending() as file:
            file.write(line)

    @contextmanager
    def _appending(self) -> Iterator[Any]:
        with open(self._kept, "ab+") as file:
            if file.tell() and not _ends_a_line(file):
                file.write(b"\n")
            yield file


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _check_address(url: str, key: str) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        raise DttError(f"--judge {url[:200]!r} is no address of a server; give one such as http://localhost:8000/v1.")
    if parts.username or parts.password or parts.query:
        raise DttError(f"--judge takes an address without a name, password or query; put a key into {KEY_VARIABLE}.")
    if key and parts.scheme == "http" and not _is_loopback(host):
        raise DttError(
            f"{KEY_VARIABLE} is set, and --judge http://{host} would send it over the network in clear; use https, or"
            " unset it."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
