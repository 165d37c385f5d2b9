"""The rooms: CONTRIBUTING.md tells what import-linter enforces, and the tests have the same rooms."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "dtt_plugin"


def modules(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.py") if path.name != "__init__.py"]


def rooms() -> set[str]:
    """The package's folders and the modules beside them."""
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    return folders | {path.stem for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}


def test_the_table_has_the_rows_that_import_linter_enforces() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = content["tool"]["importlinter"]["contracts"][0]["layers"]
    rows = [set(re.findall(r"dtt_plugin\.(\w+)", layer)) for layer in reversed(layers)]
    assert set().union(*rows) == rooms()
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| room | what |") : text.index("A room imports from rooms above")]
    cells = [line.split("|")[1] for line in table.splitlines()[2:] if line]
    told = [room for cell in cells for room in re.findall(r"`(\w+)/?`", cell)]
    assert sorted(told) == sorted(rooms())
    places = [next(place for place, row in enumerate(rows) if room in row) for room in told]
    assert places == sorted(places)


def test_a_room_has_more_than_one_file() -> None:
    assert [name for name in rooms() if (PACKAGE / name).is_dir() and len(modules(PACKAGE / name)) < 2] == []


def test_the_tests_have_the_rooms_of_the_package() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if modules(path)} - {"__pycache__"}
    own = {name for name in rooms() if (PACKAGE / name).is_dir()}
    assert folders == own - {"cli"}, "a command's tests stand where what it does is tested"
