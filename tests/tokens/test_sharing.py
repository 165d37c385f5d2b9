"""`dtt push` and `dtt pull` against a stand-in of the hub's API on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.tokens.files import DefensiveTokens, load_tokens, save_tokens
from dtt_plugin.tokens.licence import NON_COMMERCIAL, licence_of
from dtt_plugin.tokens.sharing import TOKENS_ON_HUB, card

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = "meta-llama/Llama-3.1-8B-Instruct"


class Hub(ThreadingHTTPServer):
    """As much of the hub's API as an upload of small files and a download need."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.may_write = True
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else self._chunked()
        parts = self.path.partition("?")[0].strip("/").split("/")
        if not self.server.may_write:
            self._answer(403, {"error": "no"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            table = json.loads(body)
            repo = f"{table.get('organization') or 'me'}/{table['name']}"
            self.server.repos.setdefault(repo, {})
            self._answer(200, {"url": f"http://127.0.0.1/{repo}", "name": repo})
        elif parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.repos[f"{parts[2]}/{parts[3]}"][value["path"]] = base64.b64decode(value["content"])
            self._answer(
                200, {"commitUrl": f"http://127.0.0.1/{parts[2]}/{parts[3]}/commit/{COMMIT}", "commitOid": COMMIT}
            )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        owner, name, *_, file = self.path.partition("?")[0].strip("/").split("/")
        repo = self.server.repos.get(f"{owner}/{name}")
        if repo is None or file not in repo:
            code = "RepoNotFound" if repo is None else "EntryNotFound"
            self._answer(404, {"error": code}, {"X-Error-Code": code})
            return
        self._answer(200, repo[file], {"ETag": f'"{hashlib.sha1(repo[file]).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def tokens_of(model: str = PUBLISHED, method: str = "native", source: str = "") -> DefensiveTokens:
    rows = np.random.default_rng(0).standard_normal((5, 4096)).astype(np.float32)
    return DefensiveTokens(rows, model, method, "llama3", source)


def dtt(hub: Hub, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder / "hf")}
    environment |= {"HF_TOKEN": "a-token", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", "import sys; from dtt_plugin.cli import main; sys.exit(main())", *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_what_is_pushed_is_pulled(hub: Hub, tmp_path: Path) -> None:
    save_tokens(tmp_path / "a.safetensors", tokens_of())
    pushed = dtt(hub, tmp_path, "push", tmp_path / "a.safetensors", "me/tokens", "--accept-license", "--json")
    assert pushed.returncode == 0, pushed.stderr
    report = json.loads(pushed.stdout)
    assert (report["commit"], report["licence"]) == (COMMIT, NON_COMMERCIAL)
    files = hub.repos["me/tokens"]
    assert files.keys() == {TOKENS_ON_HUB, "README.md"}
    assert len(files[TOKENS_ON_HUB]) < 100_000
    text = files["README.md"].decode()
    assert f"license: {NON_COMMERCIAL}" in text
    assert f"base_model: {PUBLISHED}" in text
    assert tokens_of().digest in text
    pulled = dtt(hub, tmp_path, "pull", "me/tokens", "--out", tmp_path / "b.safetensors", "--json")
    assert pulled.returncode == 0, pulled.stderr
    assert json.loads(pulled.stdout)["licence"] == NON_COMMERCIAL
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    again = dtt(hub, tmp_path, "pull", "me/tokens", "--out", tmp_path / "b.safetensors")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)


def test_published_tokens_are_not_pushed_without_their_licence(hub: Hub, tmp_path: Path) -> None:
    save_tokens(tmp_path / "a.safetensors", tokens_of("somewhere/else", "procrustes", PUBLISHED))
    refused = dtt(hub, tmp_path, "push", tmp_path / "a.safetensors", "me/tokens")
    assert refused.returncode == 2
    assert "--accept-license" in refused.stderr
    assert hub.repos == {}


def test_a_refusing_hub_and_missing_tokens_are_one_sentence(hub: Hub, tmp_path: Path) -> None:
    save_tokens(tmp_path / "a.safetensors", tokens_of("mine", "trained"))
    hub.repos["me/other"] = {"README.md": b"x"}
    hub.may_write = False
    cases = [
        (("push", tmp_path / "a.safetensors", "them/tokens"), "could not be written on the hub"),
        (("pull", "me/none", "--out", tmp_path / "c.safetensors"), "no public hub model"),
        (("pull", "me/other", "--out", tmp_path / "c.safetensors"), "lacks the file"),
    ]
    for arguments, words in cases:
        done = dtt(hub, tmp_path, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr
    hub.repos["me/bad"] = {TOKENS_ON_HUB: b"not a token file"}
    damaged = dtt(hub, tmp_path, "pull", "me/bad", "--out", tmp_path / "c.safetensors")
    assert damaged.returncode == 2
    assert not (tmp_path / "c.safetensors").exists()


def test_only_what_comes_from_the_published_tokens_has_their_licence() -> None:
    assert licence_of(tokens_of()) == NON_COMMERCIAL
    assert licence_of(tokens_of("/models/Llama-3.1-8B-Instruct/", "native")) == NON_COMMERCIAL
    assert licence_of(tokens_of("a/b", "adapted", PUBLISHED)) == NON_COMMERCIAL
    assert licence_of(tokens_of(PUBLISHED, "trained")) == ""
    assert licence_of(tokens_of("a/b", "procrustes", "c/d")) == ""
    assert "license:" not in card(tokens_of(PUBLISHED, "trained"), "me/tokens")
    assert "base_model:" not in card(tokens_of("./folder", "trained"), "me/tokens")


def test_a_pulled_file_keeps_every_field(hub: Hub, tmp_path: Path) -> None:
    tokens = tokens_of("somewhere/else", "procrustes", "c/d")
    save_tokens(tmp_path / "a.safetensors", tokens)
    assert dtt(hub, tmp_path, "push", tmp_path / "a.safetensors", "me/tokens").returncode == 0
    assert dtt(hub, tmp_path, "pull", "me/tokens", "--out", tmp_path / "b.safetensors").returncode == 0
    got = load_tokens(tmp_path / "b.safetensors")
    assert (got.model, got.method, got.source_model) == (tokens.model, tokens.method, tokens.source_model)
