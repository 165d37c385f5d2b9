"""The caches below `DTT_CACHE_DIR`: listed with sizes and bounds, pruned by age and number, nothing else touched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.cli import cache as command
from dtt_plugin.cli import main
from dtt_plugin.files.cache import ALIGNMENTS, CACHES, LABELS, MODELS, disk_bytes


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four labels, the first the oldest; a lock, a model folder, and a file of somebody else's."""
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path))
    for place in range(4):
        path = tmp_path / "labels" / f"{place}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("x" * 5000)
        os.utime(path, (0, 1e9 + place))
    (tmp_path / "labels" / "other.txt").write_text("mine")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "weights").write_text("w" * 9000)
    (tmp_path / "models" / ".tiny.lock").touch()  # a killed process left it
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["cache", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_cache_is_listed_with_size_and_bound(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["cache"]: row for row in run(capsys, "list")["caches"]}
    assert tuple(found) == tuple(cache.name for cache in CACHES) == command._NAMES
    assert (found["labels"]["entries"], found["labels"]["most"]) == (4, LABELS.most)
    assert found["labels"]["disk_bytes"] >= 4 * 5000
    assert (found["models"]["entries"], found["models"]["most"]) == (1, None)
    assert found["models"]["disk_bytes"] == disk_bytes(filled / "models" / "tiny") >= 9000
    assert found["alignments"] | {"folder": ""} == {
        "cache": "alignments",
        "folder": "",
        "entries": 0,
        "disk_bytes": 0,
        "most": ALIGNMENTS.most,
    }
    assert main(["cache", "list"]) == 0
    assert "at most 64" in capsys.readouterr().out


def test_only_what_is_named_is_pruned_the_oldest_first(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "prune")["removed_of"] == {}
    removed = run(capsys, "prune", "--of", "labels", "--keep", "2")
    assert sorted(Path(path).name for path in removed["removed_of"]["labels"]) == ["0.json", "1.json"]
    assert removed["disk_bytes"] >= 2 * 5000
    assert sorted(os.listdir(filled / "labels")) == ["2.json", "3.json", "other.txt"]
    assert run(capsys, "prune", "--of", "models", "--older-than", "1")["removed_of"] == {"models": []}
    assert MODELS.entries()
    run(capsys, "prune", "--of", "models", "labels")
    assert sorted(os.listdir(filled / "labels")) == ["other.txt"]
    assert not os.listdir(filled / "models")


def test_what_is_linked_elsewhere_frees_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 5000)
    (tmp_path / "folder").mkdir()
    os.link(tmp_path / "a", tmp_path / "folder" / "a")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "a")
    assert disk_bytes(tmp_path / "folder") == 0
