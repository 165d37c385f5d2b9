"""`dtt fetch` against a server on loopback: digests, nothing executed, nothing half-written."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dtt_plugin.cli import main
from dtt_plugin.data.fetch import SOURCES, Source, fetch
from dtt_plugin.data.records import RECORDS_FILE, SENTENCES_FILE, TOKENS_FILE
from dtt_plugin.errors import DttError


@pytest.fixture
def home(tmp_path: Path, data_dir: Path) -> Iterator[tuple[Path, list[Source]]]:
    """The files' homes on loopback: a folder that can be spoilt, and sources that point there."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in (RECORDS_FILE, TOKENS_FILE):
        (folder / name).write_bytes((data_dir / name).read_bytes())
    sentences = json.loads((data_dir / SENTENCES_FILE).read_text())
    (folder / SENTENCES_FILE).write_text(
        f"import os\nraise SystemExit('executed')\nX = 1\nIGNORE_ATTACK_SENTENCES = {sentences!r}\n"
    )
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield folder, [replace(source, url=f"{url}/{source.name}") for source in SOURCES]
    server.shutdown()
    server.server_close()


def test_fetched_files_are_the_checked_ones(home: tuple[Path, list[Source]], tmp_path: Path, data_dir: Path) -> None:
    digests = fetch(tmp_path / "data", home[1])
    assert set(digests) == {RECORDS_FILE, SENTENCES_FILE, TOKENS_FILE}
    for name in digests:
        assert json.loads((tmp_path / "data" / name).read_text()) == json.loads((data_dir / name).read_text())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (RECORDS_FILE, b"[]", "no record with an input"),
        (RECORDS_FILE, b"{", "not readable JSON"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = open('/etc/passwd').read()", "no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = {'train': ['x'], 'test': ['y']}", "lacks the placeholder"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = {'train': {'x'}, 'test': ['y']}", "no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = {'train': [b'x'], 'test': ['y']}", "no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = {[]: 1}", "no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = {(1, 2): 1}", "no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = ...", "no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = 3 + 4j", "no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = " + b"-" * 60_000 + b"1", "no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = 1" + b" + 1" * 60_000, "no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = " + b"[" * 60_000, "no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = " + b"(" * 150 + b")" * 150, "no list of sentences|no literal"),
        (SENTENCES_FILE, b"IGNORE_ATTACK_SENTENCES = " + b"9" * 5000, "no literal"),
        (SENTENCES_FILE, b"X = 1\xff", "no literal"),
        (SENTENCES_FILE, b"X = 1\x00", "no literal"),
        (SENTENCES_FILE, b"", "no literal"),
        (TOKENS_FILE, b"{}", "has the SHA-256"),
    ],
)
def test_wrong_content_is_refused_and_not_kept(
    name: str, content: bytes, message: str, home: tuple[Path, list[Source]], tmp_path: Path
) -> None:
    (home[0] / name).write_bytes(content)
    with pytest.raises(DttError, match=message):
        fetch(tmp_path / "data", home[1])
    assert not (tmp_path / "data" / name).exists()


def test_an_unreachable_home_says_what_to_do(tmp_path: Path) -> None:
    source = replace(SOURCES[0], url="http://127.0.0.1:9/nothing")
    with pytest.raises(DttError, match=r"could not be downloaded .* DTT_DATA_DIR"):
        fetch(tmp_path / "data", [source])


def test_the_command_names_folder_and_digests(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DTT_DATA_DIR", str(data_dir))
    assert main(["fetch", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"][TOKENS_FILE]["sha256"].startswith("e82e56dd")
