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
from dtt_plugin.data.fetch import SETS, SOURCES, chosen_sources, fetch, git_blob_hash
from dtt_plugin.data.records import RECORDS_FILE, SENTENCES_FILE, TOKENS_FILE
from dtt_plugin.data.sources import BENCHMARKS, Source
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_bytes, sha256_file


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


def test_every_file_of_a_benchmark_has_a_licence_a_digest_and_a_pinned_home() -> None:
    assert len({source.name for source in BENCHMARKS}) == len(BENCHMARKS)
    for source in BENCHMARKS:
        assert source.licence, source
        assert source.sha256 or source.git_blob, source
        assert source.name.startswith(f"{source.set}/"), source
    assert set(SETS) == {"alpacafarm", "sep", "cyberseceval2", "bipia", "piarena", "injecagent", "utility"}


def test_the_files_at_hand_are_the_ones_that_fetch_would_accept(benchmark_data: Path) -> None:
    for source in BENCHMARKS:
        if source.sha256:
            assert (benchmark_data / source.name).stat().st_size == source.size, source.name
            assert sha256_file(benchmark_data / source.name) == source.sha256, source.name


def test_only_chooses_sets() -> None:
    assert {source.set for source in chosen_sources(["sep", "bipia"])} == {"sep", "bipia"}
    assert len(chosen_sources(["all"])) == len(SOURCES) + len(BENCHMARKS)
    with pytest.raises(DttError, match=r"--only 'ifeval' is nothing to fetch; choose from alpacafarm, sep"):
        chosen_sources(["sep", "ifeval"])
    assert main(["fetch", "--only", "nonsense"]) == 2


class _Ranges(SimpleHTTPRequestHandler):
    """A server that knows ranges, and hangs up in the middle of a file that is asked for whole."""

    asked: list[str]

    def do_GET(self) -> None:
        content = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.asked.append(f"{self.path} {start}")
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + 100_000 if start == 0 else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def ranges(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder, its address, and what was asked of it."""
    folder = tmp_path / "home"
    folder.mkdir()
    asked: list[str] = []
    handler = partial(type("Handler", (_Ranges,), {"asked": asked}), directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_an_interrupted_download_goes_on_and_is_told_of(ranges: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder, url, asked = ranges
    content = bytes(range(250)) * 800
    (folder / "f.json").write_bytes(content)
    source = Source("set/f.json", f"{url}/f.json", "MIT", set="set", size=200_000, sha256=sha256_bytes(content))
    told: list[str] = []
    with pytest.raises(DttError, match=r"could not be downloaded .* goes on where it stopped"):
        fetch(tmp_path / "data", [source], told.append)
    assert not (tmp_path / "data" / "set" / "f.json").exists()
    fetch(tmp_path / "data", [source], told.append)
    starts = [int(line.split()[1]) for line in asked]
    assert starts[0] == 0 < starts[1] <= 100_000
    assert (tmp_path / "data" / "set" / "f.json").read_bytes() == content
    assert [path.name for path in (tmp_path / "data" / "set").iterdir()] == ["f.json"]
    assert told[0] == f"set/f.json: 0.2 MB, licence: MIT; from {url}/f.json"


def test_a_beginning_of_another_file_is_not_kept(ranges: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder, url, asked = ranges
    (folder / "f.json").write_bytes(b"0123456789abcdef")
    source = Source("f.json", f"{url}/f.json", "MIT", size=16, sha256=sha256_bytes(b"0123456789abcdef"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".f.json.part").write_bytes(b"another....")
    with pytest.raises(DttError, match="has the SHA-256"):
        fetch(tmp_path / "data", [source])
    assert list((tmp_path / "data").iterdir()) == []
    (tmp_path / "data" / ".f.json.part").write_bytes(b"0123456789abcdef")  # complete, and not yet checked
    fetch(tmp_path / "data", [source])
    assert asked == ["/f.json 11", "/f.json 16"]


def test_a_file_is_known_by_its_git_blob_hash(home: tuple[Path, list[Source]], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello\n")
    assert git_blob_hash(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    folder, [source, *_] = home
    (folder / "a").write_bytes(b"hello\n")
    url = source.url.replace(source.name, "a")
    good = Source("a2", url, "none", git_blob="ce013625030ba8dba906f756967f9e9ca394464a")
    assert fetch(tmp_path / "data", [good])["a2"] == sha256_bytes(b"hello\n")
    with pytest.raises(DttError, match="has the git blob hash ce01"):
        fetch(tmp_path / "data", [replace(good, name="a3", git_blob="0" * 40)])


def test_a_commit_that_the_host_does_not_resolve_is_looked_for_at_its_head() -> None:
    urls = next(source for source in BENCHMARKS if source.set == "cyberseceval2").urls
    assert urls[1].split("/PurpleLlama/")[1].startswith("HEAD/CybersecurityBenchmarks/")
    assert len(Source("x", "https://example.org/x", "MIT").urls) == 1
