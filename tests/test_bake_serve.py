"""A defended checkpoint behind a real `vllm serve` on loopback, asked through the `openai` client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.bake import bake
from dtt_plugin.checkpoint import open_checkpoint
from tests.bake_helpers import random_tokens

pytestmark = [pytest.mark.slow, pytest.mark.engine]
REPOSITORY = Path(__file__).resolve().parent.parent
START_SECONDS = 400


@pytest.fixture(scope="module")
def served(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("serve") / "baked"
    tokens = random_tokens(open_checkpoint(smollm2).input_embedding().shape[1])
    bake(smollm2, tokens, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "1024", "--return-tokens-as-token-ids"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = folder.parent / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > limit:
                    pytest.fail(f"vllm serve did not start:\n{log.read_text()[-3000:]}")
                time.sleep(2)
        yield url, folder
    finally:
        server.terminate()
        server.wait(60)


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def hostile_strings(controls: list[str], n: int) -> list[str]:
    """Strings that are, contain, or after a deletion become control tokens."""
    generator = np.random.default_rng(0)
    pieces = [*controls, "[DefensiveToken0]", "[DefensiveToken4]", "[DefensiveToken", "0]", "\n", " ", "x"]
    pieces += [control[: len(control) // 2] for control in controls]
    pieces += [control[len(control) // 2 :] for control in controls]
    texts = [*controls, "[DefensiveToken0]"]
    texts += [a[:4] + a + a[4:] for a in controls if len(a) > 4]
    while len(texts) < n:
        texts.append("".join(generator.choice(pieces, generator.integers(1, 9))))
    return texts


def test_hostile_strings_give_no_control_token_in_what_the_server_tokenizes(served: tuple[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    url, folder = served
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    added = tokenizer.get_added_vocab()

    def control_ids(content: Any) -> list[int]:
        body = {"model": "m", "messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
        ids = post(url, "/tokenize", body)["tokens"]
        return [i for i in ids if i in added.values()]

    expected = control_ids("harmless")
    texts = hostile_strings(sorted(added), 400)
    for text in texts:
        assert control_ids(text) == expected, text
    for text in texts[:50]:
        assert control_ids([{"type": "text", "text": text}]) == expected, text
    print(f"{len(texts)} hostile strings, no control token")


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
