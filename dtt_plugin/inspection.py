"""Telling what a path is: a token file, a published JSON, an alignment, a model or a defended checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dtt_plugin.bake.manifest import altered_since, is_defended_checkpoint, read_manifest
from dtt_plugin.checkpoint import open_checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.formats import protection
from dtt_plugin.peft_adapter import CONFIG_FILE as ADAPTER_CONFIG
from dtt_plugin.tensor_files import read_header
from dtt_plugin.tokens import FORMAT as TOKENS_FORMAT
from dtt_plugin.tokens import DefensiveTokens, load_tokens

ALIGNMENT_FORMAT = "dtt.alignment/1"


def inspect_path(path: Path, *, tokens_model: str | None = None) -> dict[str, Any]:
    """Return what is known of `path`, as plain values in the order in which to show them.

    Args:
        path: a file or a folder.
        tokens_model: which entry of a published JSON; without it, all of them are listed.

    Raises:
        DttError: it is nothing that this plugin knows, damaged, or unreadable.
    """
    try:
        return _inspected(path, tokens_model)
    except OSError as error:
        raise DttError(f"{error.filename or path} can't be read: {error.strerror or error}.") from error


def _inspected(path: Path, tokens_model: str | None) -> dict[str, Any]:
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise DttError(f"There is no file or folder {path}; check the path.")
    with path.open("rb") as file:
        start = file.read(16)
    if start[8:9] != b"{" or path.suffix == ".json":
        return _json(path, tokens_model)
    metadata = read_header(path)[1]
    if metadata.get("format") == TOKENS_FORMAT:
        return {"what": "token file", **_tokens(load_tokens(path, model=tokens_model))}
    if metadata.get("format") == ALIGNMENT_FORMAT:
        return _alignment(path)
    raise DttError(
        f"{path} is a safetensors file of neither format that this plugin writes ({TOKENS_FORMAT}, "
        f"{ALIGNMENT_FORMAT}); give a token file, an alignment file or a checkpoint's folder."
    )


def _tokens(tokens: DefensiveTokens) -> dict[str, Any]:
    norms = np.linalg.norm(tokens.rows.astype(np.float64), axis=1)
    return {
        "model": tokens.model,
        "method": tokens.method,
        "source_model": tokens.source_model,
        "prompt_format": tokens.prompt_format,
        "k": tokens.k,
        "width": tokens.width,
        "norms": [float(norm) for norm in norms],
        "sha256": tokens.digest,
        **tokens.metadata,
    }


def _json(path: Path, tokens_model: str | None) -> dict[str, Any]:
    if tokens_model:
        return {"what": "published tokens", **_tokens(load_tokens(path, model=tokens_model))}
    try:
        names = list(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise DttError(f"{path} is neither safetensors nor JSON; give a token file or a folder.") from error
    report: dict[str, Any] = {"what": "published tokens", "models": len(names)}
    for name in names:
        tokens = load_tokens(path, model=name)
        report[str(name)] = f"{tokens.k} x {tokens.width}, {tokens.prompt_format} format, sha256 {tokens.digest}"
    return report


def _alignment(path: Path) -> dict[str, Any]:
    tensors, metadata = read_header(path)
    if "W" not in tensors or len(tensors["W"].shape) != 2:
        raise DttError(f"{path} says it is an alignment file and has no matrix W; make it again with `dtt align`.")
    source_width, target_width = tensors["W"].shape
    facts = {name: _number(value) for name, value in sorted(metadata.items()) if name != "format"}
    return {"what": "alignment file", "source_width": source_width, "target_width": target_width, **facts}


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _folder(path: Path) -> dict[str, Any]:
    if is_defended_checkpoint(path):
        return _defended(path)
    if (path / ADAPTER_CONFIG).is_file():
        return {"what": "prompt-tuning adapter", **_tokens(load_tokens(path))}
    checkpoint = open_checkpoint(str(path.resolve()), need="embeddings")
    embedding = checkpoint.input_embedding()
    return {
        "what": "model without DefensiveTokens",
        "architecture": ", ".join(checkpoint.config().get("architectures") or ["unknown"]),
        "rows": embedding.shape[0],
        "width": embedding.shape[1],
        "dtype": embedding.dtype,
        "tied": checkpoint.tied,
    }


def _defended(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    tokens = manifest["tokens"]
    altered = altered_since(path, manifest)
    plain_markers = [str(marker) for marker in manifest.get("plain_text_markers", [])]
    changes = [
        *(f"{name} is missing" for name in altered.missing),
        *(f"{name} was changed" for name in altered.changed),
        *(f"{name} was added" for name in altered.added),
    ]
    return {
        "what": "defended checkpoint",
        "base_model": manifest["base_model"],
        "base_revision": manifest.get("base_revision"),
        "tokens_sha256": tokens["sha256"],
        "method": tokens["method"],
        "source_model": tokens["source_model"],
        "k": tokens["k"],
        "width": tokens["width"],
        "token_ids": manifest["token_ids"],
        "prompt_format": manifest["prompt_format"],
        "default": "on" if manifest["default_on"] else "off: a plain server is undefended",
        "trusts": "system, developer" + ", assistant" * bool(manifest.get("trust_assistant", True)),
        "not_protected": protection(manifest["prompt_format"], plain_markers),
        "untied": manifest["base_tied"],
        "reuse_reserved": manifest["reuse_reserved"],
        "verified_when_baked": all(entry["sha256"] for entry in manifest["changed_tensors"].values()),
        "altered": "; ".join(changes) if changes else "",
        "made_by": f"dtt-plugin {manifest['dtt_plugin']}",
    }
