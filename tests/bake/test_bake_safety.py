"""Baking loses nothing: killed, out of disk, in competition, or pointed at the wrong folder."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtt_plugin.bake import (
    BakeOptions,
    altered_since,
    bake,
    bake_cached,
    cached_checkpoints,
    is_defended_checkpoint,
    prune,
    read_manifest,
)
from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import remove_leftovers
from dtt_plugin.files.staging import staged
from dtt_plugin.tokens.files import save_tokens
from tests.bake_helpers import random_tokens, tiny
from tests.checkpoints import change_in_place

REPOSITORY = Path(__file__).resolve().parents[2]
RUNS = int(os.environ.get("DTT_TEST_KILLS", "20"))


def digest_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def start(*arguments: str, cache: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    if cache:
        environment["DTT_CACHE_DIR"] = str(cache)
    command, pipe = [sys.executable, "-c", *arguments], subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


BAKE = (
    # Without transformers, whose import takes seconds in which nothing is written.
    "import sys; sys.modules['transformers'] = None; from pathlib import Path; "
    "from dtt_plugin.bake import BakeOptions, bake; "
    "from dtt_plugin.tokens.files import load_tokens; print('ready', flush=True); "
    "bake(sys.argv[1], load_tokens(sys.argv[2]), Path(sys.argv[3]), BakeOptions(copy=True), force=True)"
)
BAKE_CACHED = (
    "import sys; from dtt_plugin.bake import bake_cached; from dtt_plugin.tokens.files import load_tokens; "
    "print(bake_cached(sys.argv[1], load_tokens(sys.argv[2])))"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny(tmp_path / "base", width=512, shards=2)


def test_killed_at_any_moment_it_leaves_a_complete_checkpoint_or_none(tmp_path: Path, base: Path) -> None:
    save_tokens(tmp_path / "tokens.safetensors", random_tokens(512))
    arguments = (BAKE, str(base), str(tmp_path / "tokens.safetensors"))
    out = tmp_path / "out" / "baked"
    before = digest_of(base)

    def started() -> subprocess.Popen[str]:
        process = start(*arguments, str(out))
        line = process.stdout.readline() if process.stdout else ""
        assert line == "ready\n", process.stderr and process.stderr.read()
        return process

    process = started()
    began = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    duration = time.monotonic() - began
    shutil.rmtree(out)
    generator = random.Random(0)
    complete = writing = 0
    for _ in range(RUNS):
        process = started()
        time.sleep(duration * generator.uniform(0, 1.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for left in out.parent.glob(".*"):
            writing += 1
            shutil.rmtree(left)
        if out.exists():
            complete += 1
            manifest = read_manifest(out)
            assert not altered_since(out, manifest)
            assert all(entry["sha256"] for entry in manifest["changed_tensors"].values())
            if generator.random() < 0.5:  # the other half replaces it (--force)
                shutil.rmtree(out)
    assert digest_of(base) == before
    assert writing, "no kill fell into the writing: the test shows nothing"
    print(
        f"{RUNS} kills, {writing} of them while writing; a whole checkpoint at the name after {complete}, else nothing"
    )


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out" / "baked"
    left = out.parent / ".baked.x.dtt-tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    os.utime(left, (0, 0))
    bake(str(base), random_tokens(512), out)
    assert [path.name for path in out.parent.iterdir()] == ["baked"]


def test_a_temporary_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    with staged(tmp_path / "out", force=False, replaceable=lambda _: True) as folder:
        os.utime(folder, (0, 0))
        remove_leftovers(tmp_path)
        assert folder.is_dir()
        (folder / "file").write_text("x")
        os.utime(folder, (0, 0))
    assert (tmp_path / "out" / "file").read_text() == "x"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs privileges that this user lacks")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_gives_one_sentence_and_leaves_nothing(small_disk: Path, base: Path) -> None:
    (small_disk / "mine.txt").write_text("untouched")
    before = digest_of(base)
    with pytest.raises(DttError, match="the disk is full; free some space or choose another --out"):
        bake(str(base), random_tokens(512), small_disk / "baked", BakeOptions(copy=True))
    assert [path.name for path in small_disk.iterdir()] == ["mine.txt"]
    assert digest_of(base) == before


def test_another_file_system_gets_symbolic_links(tmp_path: Path, base: Path) -> None:
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    out = Path("/dev/shm") / f"dtt-test-{os.getpid()}"
    try:
        bake(str(base), random_tokens(512), out)
        links = [path for path in out.iterdir() if path.is_symlink()]
        assert [path.resolve().parent for path in links] == [base.resolve()]
        (base / links[0].name).rename(base / "moved")
        assert altered_since(out, read_manifest(out)).missing == (links[0].name,)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_eight_processes_that_bake_the_same_make_one(tmp_path: Path, base: Path) -> None:
    save_tokens(tmp_path / "tokens.safetensors", random_tokens(512))
    arguments = (BAKE_CACHED, str(base), str(tmp_path / "tokens.safetensors"))
    processes = [start(*arguments, cache=tmp_path / "cache") for _ in range(8)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, errors
    folders = [path for path in (tmp_path / "cache" / "baked").iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert not altered_since(folders[0], read_manifest(folders[0]))


def test_a_second_start_writes_nothing(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))
    tokens = random_tokens(512)
    first = bake_cached(str(base), tokens)
    written = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    (base / "model-00001-of-00002.safetensors").touch()  # the same contents
    assert bake_cached(str(base), tokens) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == written
    others = {
        bake_cached(str(base), random_tokens(512, seed=2)),
        bake_cached(str(base), tokens, BakeOptions(prompt_format="qwen2.5")),
        bake_cached(str(base), tokens, BakeOptions(default_on=False)),
    }
    change_in_place(base / "model-00001-of-00002.safetensors")
    others.add(bake_cached(str(base), tokens))
    assert len(others | {first}) == 5
    assert [entry.folder for entry in cached_checkpoints()][-1] == first
    linked = sum((first / name).stat().st_size for name in read_manifest(first)["weight_files"])
    assert 0 < cached_checkpoints()[0].disk_bytes < linked
    assert len(prune(keep=2)) == 3
    assert len(cached_checkpoints()) == 2
    assert prune(older_than_days=1) == []


def test_an_existing_folder_needs_force_and_only_a_defended_checkpoint_yields(tmp_path: Path, base: Path) -> None:
    tokens, out = random_tokens(512), tmp_path / "out"
    out.mkdir()
    bake(str(base), tokens, out)  # an empty folder is no loss
    with pytest.raises(DttError, match="already exists; choose another --out, or replace it with --force"):
        bake(str(base), random_tokens(512, seed=2), out)
    assert read_manifest(out)["tokens"]["sha256"] == tokens.digest
    bake(str(base), random_tokens(512, seed=2), out, force=True)
    assert read_manifest(out)["tokens"]["sha256"] != tokens.digest
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(DttError, match="is not a defended checkpoint, so --force does not remove it"):
        bake(str(base), tokens, other, force=True)
    with pytest.raises(DttError, match="is not a defended checkpoint"):
        bake(str(base), tokens, other / "thesis.tex", force=True)
    assert (other / "thesis.tex").read_text() == "years of work"
    assert is_defended_checkpoint(out)


def test_the_base_model_is_never_written_over(tmp_path: Path, base: Path) -> None:
    before = digest_of(base)
    (tmp_path / "link").symlink_to(base)
    tokens = random_tokens(512)
    cases = {
        base / "baked": "lies inside the base model's folder",
        tmp_path / "link" / "baked": "lies inside the base model's folder",
        base: "is not a defended checkpoint",
        tmp_path / "link": "is not a defended checkpoint",
        tmp_path: "is not a defended checkpoint",
    }
    for out, sentence in cases.items():
        with pytest.raises(DttError, match=sentence):
            bake(str(base), tokens, out, force=True)
    assert digest_of(base) == before


def test_a_defended_checkpoint_is_not_its_own_base(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    bake(str(base), random_tokens(512), out)
    before = digest_of(out)
    with pytest.raises(DttError, match="is the base model's own folder"):
        bake(str(out), random_tokens(512), out, force=True)
    assert digest_of(out) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, base: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DttError, match=r"file/out could not be written: "):
        bake(str(base), random_tokens(512), tmp_path / "file" / "out")
