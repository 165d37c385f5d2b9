"""The cache, and what two processes do with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dtt_plugin.alignment import AlignmentCache, AlignmentOptions, align, save_alignment
from dtt_plugin.checkpoint.opening import Checkpoint, open_checkpoint
from dtt_plugin.errors import DttError
from tests.checkpoints import default_vocab_tokens, make_checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    return (
        open_checkpoint(str(make_checkpoint(tmp_path / "source", seed=1))),
        open_checkpoint(str(make_checkpoint(tmp_path / "target", seed=2))),
    )


@pytest.fixture
def cache(tmp_path: Path) -> AlignmentCache:
    return AlignmentCache(tmp_path / "cache")


def test_a_second_run_is_taken_from_the_cache(
    pair: tuple[Checkpoint, Checkpoint], cache: AlignmentCache, tmp_path: Path
) -> None:
    first, second = align(*pair, cache=cache), align(*pair, cache=cache)
    assert (first.cached, second.cached) == (False, True)
    save_alignment(tmp_path / "1", first)
    save_alignment(tmp_path / "2", second)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert not align(*pair).cached


def test_other_options_other_values_and_another_vocabulary_are_solved_anew(
    pair: tuple[Checkpoint, Checkpoint], cache: AlignmentCache, tmp_path: Path
) -> None:
    align(*pair, cache=cache)
    assert not align(*pair, AlignmentOptions(center=True), cache=cache).cached
    assert not align(pair[1], pair[0], cache=cache).cached
    other_values = open_checkpoint(str(make_checkpoint(tmp_path / "other", seed=3)))
    assert not align(pair[0], other_values, cache=cache).cached
    tokens = default_vocab_tokens()[::-1]
    reordered = open_checkpoint(str(make_checkpoint(tmp_path / "t2", seed=2, vocab_tokens=tokens)))
    again = align(pair[0], reordered, cache=cache)
    assert not again.cached
    # The values are those of `target`: only the tokenizer differs.
    assert again.report.target_sha256 == align(*pair, cache=cache).report.target_sha256


def test_a_copy_of_the_files_is_recognised_and_named_as_given(
    pair: tuple[Checkpoint, Checkpoint], cache: AlignmentCache, tmp_path: Path
) -> None:
    align(*pair, cache=cache)
    copy = open_checkpoint(str(make_checkpoint(tmp_path / "copy", seed=2)))
    alignment = align(pair[0], copy, cache=cache)
    assert alignment.cached
    assert alignment.target_model == str(tmp_path / "copy")


def test_a_changed_file_is_noticed_behind_the_noted_digest(
    pair: tuple[Checkpoint, Checkpoint], cache: AlignmentCache
) -> None:
    location = pair[1].input_embedding()
    os.utime(location.file, (1, 1))  # old enough for its digest to be noted
    before = cache.digest(location)
    assert len(list((cache.folder / "digests").iterdir())) == 1
    data = bytearray(location.file.read_bytes())
    data[location.offset] ^= 1
    location.file.write_bytes(data)
    assert cache.digest(location) != before


def test_a_damaged_entry_is_solved_anew(pair: tuple[Checkpoint, Checkpoint], cache: AlignmentCache) -> None:
    first = align(*pair, cache=cache)
    (entry,) = cache.folder.glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-8])
    second = align(*pair, cache=cache)
    assert not second.cached
    np.testing.assert_array_equal(first.W, second.W)
    assert align(*pair, cache=cache).cached


def test_the_least_recently_used_make_room(
    pair: tuple[Checkpoint, Checkpoint], cache: AlignmentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtt_plugin.alignment.cache.MOST_ENTRIES", 2)
    for seed in range(4):
        align(*pair, AlignmentOptions(seed=seed), cache=cache)
    assert len(list(cache.folder.glob("*.safetensors"))) == 2
    assert align(*pair, AlignmentOptions(seed=3), cache=cache).cached


def test_two_processes_at_once_solve_once(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from dtt_plugin.alignment import AlignmentCache, align, solve\n"
        "from dtt_plugin.checkpoint.opening import open_checkpoint\n"
        "plain = solve.measure\n"
        "def slow(*args, **kwargs):\n"
        "    time.sleep(1)\n"
        "    return plain(*args, **kwargs)\n"
        "solve.measure = slow\n"
        "pair = [open_checkpoint(name) for name in sys.argv[2:]]\n"
        "print(align(*pair, cache=AlignmentCache(Path(sys.argv[1]))).cached)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cache"), pair[0].name, pair[1].name]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert said == ["False", "True"]
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def aligned_where_no_file_grows(models: list[str], cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """As on a full disk, where an empty lock file still has room.

    In a process of its own: the limit would count for pytest's own output, where that goes to a file.
    """
    script = (
        "import resource, sys\n"
        "from dtt_plugin.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "align", *models, *options]
    environment = os.environ | {"DTT_CACHE_DIR": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.usefixtures("pair")
def test_a_full_cache_names_the_option_that_does_without(tmp_path: Path) -> None:
    models = [str(tmp_path / name) for name in ("source", "target")]
    for model in models:
        os.utime(Path(model) / "model.safetensors", (1, 1))  # old enough for its digest to be noted
    full = aligned_where_no_file_grows(models, tmp_path / "cache")
    assert full.returncode == 2
    assert "use --no-cache" in full.stderr
    assert aligned_where_no_file_grows(models, tmp_path / "cache", "--no-cache").returncode == 0
    assert not list((tmp_path / "cache").rglob("*.dtt-tmp"))


def test_a_digest_that_can_t_be_noted_is_only_read_again(
    pair: tuple[Checkpoint, Checkpoint], cache: AlignmentCache
) -> None:
    os.utime(pair[0].input_embedding().file, (1, 1))
    cache.folder.mkdir()
    (cache.folder / "digests").write_text("no folder")
    align(*pair, cache=cache)
    assert align(*pair, cache=cache).cached


def test_a_cache_folder_that_can_t_be_written_is_said(pair: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DttError, match="set DTT_CACHE_DIR"):
        align(*pair, cache=AlignmentCache(tmp_path / "file" / "cache"))
