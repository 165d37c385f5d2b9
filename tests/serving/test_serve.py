"""`dtt serve` on a tiny model: the check from outside, and many clients at once."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.cli import main
from tests.checkpoints import make_checkpoint
from tests.conftest import write_tokens
from tests.servers import server

NAMES = ("a", "b", "c", "d")
CLIENTS, REQUESTS = 64, 2000
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model with 20 reserved tokens, and four token files."""
    folder = tmp_path_factory.mktemp("serve")
    make_checkpoint(folder / "model", width=64, reserved=20)  # narrower heads vLLM refuses
    for name in NAMES:
        write_tokens(folder / f"{name}.safetensors", width=64, seed=ord(name))
    return folder


def dtt_serve(models: Path, *more: str) -> list[str]:
    files = [str(models / f"{name}.safetensors") for name in NAMES]
    start = [sys.executable, "-c", "from dtt_plugin.cli import main; raise SystemExit(main())", "serve"]
    own = [str(models / "model"), "--tokens", *files, "--port", "PORT", *more]
    return [*start, *own, "--vllm", "--enforce-eager", "--max-model-len", "512", "--served-model-name", "m"]


def check(url: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["serve", "--check", url, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


@needs_vllm
@pytest.mark.slow
@pytest.mark.engine
def test_many_clients_at_once_get_what_each_gets_alone(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    openai = pytest.importorskip("openai")
    with server(dtt_serve(models), tmp_path / "log") as url:
        code, found = check(url, capsys)
        assert code == 0, found
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)

        async def ask(name: str | None, question: str) -> tuple[tuple[int, ...], str]:
            messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": question}]
            variables = {"chat_template_kwargs": {"defensive_tokens": name}, "return_token_ids": True}
            answer = await client.chat.completions.create(
                model="m", messages=messages, temperature=0, max_tokens=8, extra_body=variables
            )
            return tuple(answer.prompt_token_ids), str(answer.choices[0].message.content)

        kinds = [(name, f"{n} + {n}?") for name in (*NAMES, None) for n in range(8)]

        async def every() -> tuple[dict[Any, Any], list[tuple[Any, Any]]]:
            alone = {kind: await ask(*kind) for kind in kinds}
            order = random.Random(0).choices(kinds, k=REQUESTS)
            free = asyncio.Semaphore(CLIENTS)

            async def one(kind: Any) -> Any:
                async with free:
                    return kind, await ask(*kind)

            return alone, await asyncio.gather(*(one(kind) for kind in order))

        alone, answers = asyncio.run(every())
    prompts = [kind for kind, (ids, _) in answers if ids != alone[kind][0]]
    texts = [kind for kind, (_, text) in answers if text != alone[kind][1]]
    counts = Counter(str(name) for (name, _), _ in answers)
    print(
        f"{len(answers)} answers to {CLIENTS} clients ({dict(counts)}):"
        f" {len(prompts)} prompts and {len(texts)} texts are not those of the request alone"
    )
    assert len(answers) == REQUESTS
    assert not prompts
    assert not texts
    by_name = [tuple(alone[name, question][1] for _, question in kinds[:8]) for name in (*NAMES, None)]
    assert len(set(by_name)) == 5, "the arms answer alike, so a mix would not be seen"


@needs_vllm
@pytest.mark.slow
@pytest.mark.engine
def test_badly_configured_servers_are_told_apart(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(models / "model"),
        "--port",
        "PORT",
    ]
    stock += ["--enforce-eager", "--max-model-len", "512"]
    soft = ["--additional-config", json.dumps({"dtt": {"tokens": [str(models / "a.safetensors")]}})]
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    bad = {
        "no tokens": (stock, "tokens in front"),
        "off by default": (dtt_serve(models, "--default", "none"), "tokens in front"),
        "another template": (
            [*stock, *soft, "--chat-template", str(tmp_path / "template.jinja")],
            "conversations",
        ),
    }
    for name, (command, failing) in bad.items():
        with server(command, tmp_path / "log") as url:
            code, found = check(url, capsys)
            print(name, code, found)
            assert code == 1
            assert not found[failing]["ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a model and --tokens FILE, or --check URL"),
        (["MODEL"], "Give a model and --tokens FILE"),
        (["MODEL", "--tokens", "a", "--vllm", "--chat-template=x"], "--chat-template: `dtt serve` sets this itself"),
        (["MODEL", "--tokens", "a", "--vllm", "--trust_request_chat_template"], "--trust-request-chat-template"),
        (["--check", "http://127.0.0.1:9"], "no server with the OpenAI API answers there"),
    ],
)
def test_what_can_not_be_served_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_free_ids_a_missing_name_and_a_vllm_that_has_moved_are_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full, file = str(make_checkpoint(tmp_path / "full", width=64)), str(models / "a.safetensors")
    monkeypatch.setattr("dtt_plugin.serving.hooks.problem", lambda: None)  # whatever vLLM is installed
    assert main(["serve", full, "--tokens", file]) == 2
    assert "has 0 free ids and 5 are needed" in capsys.readouterr().err
    assert main(["serve", str(models / "model"), "--tokens", file, "--default", "b"]) == 2
    assert "--default b: there are no tokens of this name; there are: a, none." in capsys.readouterr().err
    monkeypatch.setattr("dtt_plugin.serving.hooks.problem", lambda: "vLLM 9.9 has moved a thing.")
    assert main(["serve", str(models / "model"), "--tokens", file]) == 2
    assert "vLLM 9.9 has moved a thing. A baked checkpoint (`dtt bake`) runs in any vLLM." in capsys.readouterr().err
