"""mkdocs hooks: the README is the site's first page, and every link of a page leads to something in the site.

Pages link to files of the repository as the forge shows them. A file outside of docs/ that a page links to becomes a
part of the site: Markdown as a page, a folder as a list of its files, anything else as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_OUTSIDE = "project"
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_CODE = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def _place(path: Path) -> str:
    """Return where a file of the repository stands in the site's sources."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_dir():
        path /= "index.md"
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"{_OUTSIDE}/{path.relative_to(ROOT).as_posix()}"


def _linked(path: Path) -> set[Path]:
    """Return the files and folders of the repository that a page links to."""
    text = _CODE.sub("", path.read_text(encoding="utf-8"))
    targets = (path.parent / match[2] for match in _LINK.finditer(text) if "://" not in match[2])
    return {target.resolve() for target in targets if target.exists() and target.resolve().is_relative_to(ROOT)}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the README, and all that is linked from outside of docs/."""
    todo = {ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
    todo |= set(DOCS.glob("*.md"))
    done: set[Path] = set()
    while todo:
        path = todo.pop()
        done.add(path)
        place = _place(path)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            names = [file.relative_to(path).as_posix() for file in inside]
            listed = [f"# {path.name}", "", *(f"- [{name}]({name})" for name in names)]
            files.append(File.generated(config, place, content="\n".join(listed)))
            todo |= set(inside) - done
        elif files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(path)))
        if path.suffix == ".md":
            todo |= _linked(path) - done
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn a page's links, which are those of the repository, into the site's."""
    if page.file.abs_src_path is None:  # a folder's list
        return markdown
    source = Path(page.file.abs_src_path)
    here = Path(page.file.src_uri).parent

    def turned(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        if "://" in match[2] or not target.exists():
            return match[0]
        return f"{match[1]}{Path(os.path.relpath(_place(target), here)).as_posix()}{match[3] or ''}{match[4]}"

    parts, position = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_LINK.sub(turned, markdown[position : code.start()]), code[0]]
        position = code.end()
    return "".join([*parts, _LINK.sub(turned, markdown[position:])])
