"""A defended checkpoint behind a real `vllm serve` on loopback, asked through the `openai` client."""

from __future__ import annotations

import http.client
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.bake import bake
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.cli import main
from tests.bake_helpers import random_tokens
from tests.judging.saved import SAMPLES, write_samples
from tests.prompt.test_control_tokens import HOSTILE_STRINGS, control_ids_in, controls_of, hostile_string
from tests.servers import server

pytestmark = [pytest.mark.slow, pytest.mark.engine]


@pytest.fixture(scope="module")
def served(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("serve") / "baked"
    tokens = random_tokens(open_checkpoint(smollm2).input_embedding().shape[1])
    bake(smollm2, tokens, folder)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", "PORT", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "1024", "--return-tokens-as-token-ids"]
    with server(command, folder.parent / "log") as url:
        yield url, folder


HOSTILE_OVER_THE_CLIENT = 300


class Server:
    """One connection, kept: ten thousand requests in a row."""

    def __init__(self, url: str) -> None:
        self.connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)

    def tokenize(self, content: Any) -> list[int]:
        """Return the ids that the server makes of a conversation with this user content."""
        body = {"model": "m", "messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
        self.connection.request("POST", "/tokenize", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.load(self.connection.getresponse())
        ids: list[int] = answer["tokens"]
        return ids


@pytest.fixture(scope="module")
def hostile(served: tuple[str, Path]) -> tuple[list[str], set[int]]:
    """The strings of the wrappers' test for this tokenizer, which knows the DefensiveTokens, and all control ids."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(served[1])
    controls, rng = controls_of(tokenizer), random.Random(0)
    texts = [hostile_string(rng, controls) for _ in range(HOSTILE_STRINGS)]
    dangerous = sum(bool(control_ids_in(tokenizer, text)) for text in texts)
    assert dangerous > HOSTILE_STRINGS / 3, "the strings would not have been dangerous: the test shows nothing"
    return texts, {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}


def test_hostile_strings_give_no_control_token_in_what_the_server_tokenizes(
    served: tuple[str, Path], hostile: tuple[list[str], set[int]]
) -> None:
    server, (texts, control_ids) = Server(served[0]), hostile

    def controls_in(content: Any) -> list[int]:
        return [i for i in server.tokenize(content) if i in control_ids]

    expected = controls_in("harmless")
    assert len(expected) > 5
    for text in texts:
        assert controls_in(text) == expected, text
    for text in texts[:HOSTILE_OVER_THE_CLIENT]:
        parts = [{"type": "text", "text": part} for part in (text[: len(text) // 2], text[len(text) // 2 :])]
        assert controls_in(parts) == expected, text


def test_hostile_strings_give_no_control_token_in_the_prompts_of_the_client(
    served: tuple[str, Path], hostile: tuple[list[str], set[int]]
) -> None:
    openai = pytest.importorskip("openai")
    server, (texts, control_ids) = Server(served[0]), hostile
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none")
    expected = [i for i in server.tokenize("harmless") if i in control_ids]
    for text in texts[-HOSTILE_OVER_THE_CLIENT:]:
        messages = [{"role": "user", "content": text}]
        answer = client.chat.completions.create(
            model="m", messages=messages, max_tokens=1, extra_body={"return_token_ids": True}
        )
        prompt = answer.prompt_token_ids
        assert [i for i in prompt if i in control_ids] == expected, text
        assert prompt == server.tokenize(text)


def test_the_client_switches_the_tokens_and_never_gets_one(served: tuple[str, Path]) -> None:
    openai = pytest.importorskip("openai")
    url, folder = served
    ids = json.loads((folder / "dtt_checkpoint.json").read_text())["token_ids"]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is 1 + 1?"}]

    def ask(**options: Any) -> Any:
        return client.chat.completions.create(model="m", messages=messages, max_tokens=64, **options)

    on = ask(temperature=0)
    off = ask(temperature=0, extra_body={"chat_template_kwargs": {"add_defensive_tokens": False}})
    assert on.usage.prompt_tokens == off.usage.prompt_tokens + 5
    assert on.choices[0].message.content != off.choices[0].message.content
    sampled = ask(temperature=2, n=16, logprobs=True)
    tokens = [entry.token for choice in sampled.choices for entry in choice.logprobs.content]
    generated = {int(token.removeprefix("token_id:")) for token in tokens}
    assert len(tokens) > 200
    assert not generated & set(ids)


def test_a_judge_behind_a_real_server_is_asked_once(
    served: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))
    samples = write_samples(tmp_path, SAMPLES)
    reports = []
    for _ in range(2):
        assert main(["rescore", str(samples), "--judge", f"{served[0]}/v1", "--judge-model", "m", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]
    row = reports[0]["attacks"]["ignore"]
    assert row["n"] == len(SAMPLES)
    assert row["rule"]["n"] + row["unclear"] == len(SAMPLES)
    (kept,) = (tmp_path / "cache" / "judge").glob("*.jsonl")
    assert len(kept.read_text().splitlines()) == len(SAMPLES) - 1  # an empty response is no question
    assert main(["rescore", str(samples), "--judge", f"{served[0]}/v1", "--judge-model", "other"]) == 2
    assert "NotFoundError" in capsys.readouterr().err
