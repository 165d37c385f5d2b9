"""What a defended checkpoint says about itself: dtt_checkpoint.json, and a README for people."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt_plugin import __version__
from dtt_plugin.bake.options import BakeOptions
from dtt_plugin.bake.plan import BakePlan
from dtt_plugin.bake.tokenizer import MORE_TEMPLATES, TEMPLATE_FILE
from dtt_plugin.bake.weights import blocks, indexed_tensors
from dtt_plugin.checkpoint.defended import FORMAT, MANIFEST
from dtt_plugin.checkpoint.folder import read_json_table
from dtt_plugin.files.digests import sha256_bytes
from dtt_plugin.files.reading import read_bytes
from dtt_plugin.files.replacing import write_json
from dtt_plugin.prompt.formats import default_of_template, protection
from dtt_plugin.public_names import card_name, public_name, public_text
from dtt_plugin.tokens.licence import inherited, licence_of

_SMALL = 64 << 20
_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10
_WHOLE = "sha256:"


@dataclass(frozen=True)
class Altered:
    """What differs from the manifest of a defended checkpoint."""

    missing: tuple[str, ...]
    changed: tuple[str, ...]
    added: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.changed or self.added)


def fingerprint(path: Path, *, whole: bool = False) -> str:
    """Return a digest of a file's contents.

    Up to 64 MiB, or if `whole`, it is the SHA-256 of all of it. Else 256 evenly spread blocks, the first and
    last among them, and the size are hashed: that takes milliseconds, and notices another file, a truncated
    one, or a changed header; it may miss a single changed value.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if whole or size <= _SMALL:
            return _WHOLE + hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for sample in range(_SAMPLES):
            position = (size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, position))
    return "sampled-sha256:" + digest.hexdigest()


def manifest_of(
    plan: BakePlan,
    options: BakeOptions,
    *,
    prompt_format: str,
    plain_markers: Sequence[str],
    template: str,
    tensor_digests: Mapping[str, str],
    how: Mapping[str, str],
) -> dict[str, Any]:
    """Return the manifest of a defended checkpoint, its files' digests excepted."""
    tokens = plan.tokens
    metadata = {key: public_text(value) for key, value in tokens.metadata.items()}
    return {
        "format": FORMAT,
        "dtt_plugin": __version__,
        "base_model": public_name(plan.checkpoint.name),
        "base_revision": plan.checkpoint.revision,
        "base_tied": plan.untie,
        "tokens": {
            "sha256": tokens.digest,
            "model": public_name(tokens.model),
            "method": tokens.method,
            "source_model": public_name(tokens.source_model),
            "k": tokens.k,
            "width": tokens.width,
            **inherited(tokens),
            **({"metadata": metadata} if metadata else {}),
        },
        "token_names": list(plan.names),
        "token_ids": list(plan.token_ids),
        "rows": plan.n_rows,
        "reuse_reserved": options.reuse_reserved,
        "prompt_format": prompt_format,
        "default_on": options.default_on,
        "trust_assistant": options.trust_assistant,
        "plain_text_markers": list(plain_markers),
        "chat_template_sha256": sha256_bytes(template.encode()),
        "changed_tensors": {
            change.name: {
                "shape": list(change.shape),
                "dtype": change.source.dtype,
                "sha256": tensor_digests.get(change.name),
            }
            for change in plan.changes
        },
        "weight_files": dict(how),
    }


def write_manifest(folder: Path, manifest: dict[str, Any], plan: BakePlan) -> None:
    """Write the manifest with the digests of every file in `folder`."""
    known = _digests_of_blobs(plan, folder)
    files = {name: known.get(name) or fingerprint(folder / name) for name in files_of(folder)}
    write_json(folder / MANIFEST, {**manifest, "files": files})


def _digests_of_blobs(plan: BakePlan, folder: Path) -> dict[str, str]:
    """Return the whole digests of linked files of a hub cache: each blob there is named after its SHA-256."""
    known = {}
    for file in plan.checkpoint.weight_files:
        blob, linked = file.resolve(), folder / file.name
        if re.fullmatch("[0-9a-f]{64}", blob.name) and linked.exists() and linked.samefile(blob):
            known[file.name] = _WHOLE + blob.name
    return known


def altered_since(folder: Path, manifest: Mapping[str, Any]) -> Altered:
    """Compare the files in `folder` with its manifest, and the changed tensors in full."""
    expected: dict[str, str] = manifest["files"]
    entries, files = _entries_of(folder), set(files_of(folder))
    # A dangling link (its model was moved away) counts as missing, a pipe in a file's place as changed.
    missing = {name for name in expected if name not in entries or not os.path.exists(folder / name)}
    changed = {
        name
        for name in expected.keys() - missing
        if name not in files or fingerprint(folder / name, whole=expected[name].startswith(_WHOLE)) != expected[name]
    }
    if not changed and not missing:
        changed = _files_of_altered_tensors(folder, manifest)
    return Altered(
        missing=tuple(sorted(missing)),
        changed=tuple(sorted(changed)),
        added=tuple(sorted(entries - expected.keys())),
    )


def sampled_files(manifest: Mapping[str, Any]) -> list[str]:
    """Return the files of which the manifest has the digest of samples only, see `fingerprint`."""
    return sorted(name for name, digest in manifest["files"].items() if not digest.startswith(_WHOLE))


def defaults_of_templates(folder: Path, manifest: Mapping[str, Any]) -> set[bool | None]:
    """Return whether the chat templates in `folder` have the tokens on by default; None for one that can't be told.

    Raises:
        DttError: a template file can't be read.
    """
    stored = read_json_table(folder / "tokenizer_config.json", missing={}).get("chat_template")
    texts = [entry.get("template") if isinstance(entry, dict) else entry for entry in _as_list(stored)]
    for path in (folder / TEMPLATE_FILE, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))):
        if path.is_file():
            texts.append(read_bytes(path).decode(errors="replace"))
    k = len(manifest["token_ids"])
    return {default_of_template(text, k) if isinstance(text, str) else None for text in texts} or {None}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _files_of_altered_tensors(folder: Path, manifest: Mapping[str, Any]) -> set[str]:
    """Hash the tensors that baking changed: files that are large are only sampled."""
    files = set()
    tensors = indexed_tensors(folder)
    for name, entry in manifest["changed_tensors"].items():
        location = tensors.get(name)
        if location is None:
            files.add(MANIFEST)
            continue
        if not entry["sha256"] or manifest["files"].get(location.file.name, "").startswith(_WHOLE):
            continue
        digest = hashlib.sha256()
        for _, block in blocks(location):
            digest.update(block.data)
        if digest.hexdigest() != entry["sha256"]:
            files.add(location.file.name)
    return files


def files_of(folder: Path) -> list[str]:
    """Return the files below `folder`, the manifest excepted, relative to it."""
    return sorted(name for name in _entries_of(folder) if (folder / name).is_file())


def _entries_of(folder: Path) -> set[str]:
    """Return everything below `folder` that is more than a folder of other things, the manifest excepted.

    That is files, links to anything or nothing, pipes, sockets, devices, and empty folders, which end in "/".
    """

    def refuse(error: OSError) -> None:
        raise error

    entries = set()
    for where, folders, files in os.walk(folder, onerror=refuse):
        below = Path(where).relative_to(folder)
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        entries |= {(below / name).as_posix() for name in (*links, *files)}
        if not folders and not files and where != str(folder):
            entries.add(f"{below.as_posix()}/")
    return entries - {MANIFEST}


def card(plan: BakePlan, options: BakeOptions, *, prompt_format: str, plain_markers: Sequence[str]) -> str:
    """Return the README.md of a defended checkpoint."""
    tokens, trust_assistant = plan.tokens, options.trust_assistant
    state = (
        "on unless a request passes `add_defensive_tokens=false` to the chat template"
        if options.default_on
        else "OFF unless a request passes `add_defensive_tokens=true` to the chat template"
    )
    name = card_name(plan.checkpoint.name)
    base = name + (f" (revision {plan.checkpoint.revision})" if plan.checkpoint.revision else "")
    source = f", from {card_name(tokens.source_model)}" if tokens.source_model else ""
    sentence = protection(prompt_format, plain_markers)
    unprotected = f"- {sentence}\n" if sentence else ""
    licence = licence_of(tokens)
    terms = f"The tokens come from published ones, which are {licence}: no commercial use.\n\n" if licence else ""
    return (
        f"# {Path(name).name} with DefensiveTokens\n\n"
        f"A copy of `{base}` with {tokens.k} DefensiveTokens ({tokens.method}{source}) against prompt\n"
        f"injection. They are {state}.\n\n"
        f"- Tokens: {', '.join(f'`{name}`' for name in plan.names)}, ids {plan.token_ids[0]} to "
        f"{plan.token_ids[-1]}, SHA-256 of their values {tokens.digest}\n"
        f"- Prompt format: {prompt_format}\n"
        f"- System and developer messages{' and the assistant' * trust_assistant} are trusted. All else is data:\n"
        f"  {'' if trust_assistant else 'assistant, '}user and tool messages, documents, tools. The chat template"
        " breaks control tokens in it.\n"
        f"{unprotected}"
        "- Without the tokens the logits of the original vocabulary are those of the base model.\n\n"
        f"{terms}Made by dtt-plugin {__version__}; `dtt inspect` on this folder checks it.\n"
    )
