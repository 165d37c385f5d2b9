"""Telling what a path is: a token file, a published JSON, an alignment, a model or a defended checkpoint."""

from __future__ import annotations

import math
import os.path
from pathlib import Path
from typing import Any

import numpy as np

from dtt_plugin.alignment.result import FORMAT as FORMAT_OF_ALIGNMENT
from dtt_plugin.alignment.result import REPORTED
from dtt_plugin.bake.manifest import altered_since, defaults_of_templates, sampled_files
from dtt_plugin.checkpoint.defended import MANIFEST, is_defended_checkpoint, read_manifest
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.checkpoint.tensors import read_header
from dtt_plugin.costs import recorded_costs
from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import open_regular
from dtt_plugin.prompt.formats import protection
from dtt_plugin.serving.placing import route
from dtt_plugin.tokens.files import FORMAT as TOKENS_FORMAT
from dtt_plugin.tokens.files import DefensiveTokens, load_every_upstream, load_tokens
from dtt_plugin.tokens.licence import licence_of
from dtt_plugin.tokens.peft import CONFIG_FILE as ADAPTER_CONFIG
from dtt_plugin.transfer.move import COPY_ABOVE, COPY_NOTE, COSINES, angle


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
    if not os.path.lexists(path):
        raise DttError(f"There is no file or folder {path}; check the path.")
    with open_regular(path) as file:
        start = file.read(16)
    if start[8:9] != b"{" or path.suffix == ".json":
        return _json(path, tokens_model)
    metadata = read_header(path)[1]
    if metadata.get("format") == TOKENS_FORMAT:
        return {"what": "token file", **_tokens(load_tokens(path, model=tokens_model))}
    if metadata.get("format") == FORMAT_OF_ALIGNMENT:
        return _alignment(path)
    raise DttError(
        f"{path} is a safetensors file of neither format that this plugin writes ({TOKENS_FORMAT}, "
        f"{FORMAT_OF_ALIGNMENT}); give a token file, an alignment file or a checkpoint's folder."
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
        "licence": licence_of(tokens) or "none known",
        # What the file says, in a place of its own: none of it may pass for what was found here.
        "metadata": tokens.metadata,
        **_recorded_angles(tokens.metadata.get(COSINES, "")),
    }


def _recorded_angles(text: str) -> dict[str, Any]:
    """Return what the file says of the angles between these tokens and those that they were."""
    try:
        cosines = [float(word) for word in text.split()]
    except ValueError:
        return {}
    if not cosines or not all(-1 <= cosine <= 1 for cosine in cosines):
        return {}
    note = {"recorded_note": COPY_NOTE} if min(cosines) > COPY_ABOVE else {}
    return {"recorded_cosines_to_source": cosines, "recorded_angles_to_source": list(map(angle, cosines)), **note}


def _json(path: Path, tokens_model: str | None) -> dict[str, Any]:
    if tokens_model:
        return {"what": "published tokens", **_tokens(load_tokens(path, model=tokens_model))}
    found = load_every_upstream(path)
    described = {t.model: f"{t.k} x {t.width}, {t.prompt_format} format, sha256 {t.digest}" for t in found}
    return {"what": "published tokens", "models": len(found), "tokens": described}


def _alignment(path: Path) -> dict[str, Any]:
    tensors, metadata = read_header(path)
    if "W" not in tensors or len(tensors["W"].shape) != 2:
        raise DttError(f"{path} says it is an alignment file and has no matrix W; make it again with `dtt align`.")
    source_width, target_width = tensors["W"].shape
    costs = recorded_costs(metadata)
    known = {name: _number(metadata[name]) for name in REPORTED if name in metadata}
    others = {name: value for name, value in sorted(metadata.items()) if name not in (*known, *costs, "format")}
    report = {"what": "alignment file", "source_width": source_width, "target_width": target_width}
    return {**report, **known, **costs, "metadata": others}


def _number(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        return text
    return int(number) if number.is_integer() else number


def _folder(path: Path) -> dict[str, Any]:
    if is_defended_checkpoint(path):
        return _defended(path)
    if (path / ADAPTER_CONFIG).is_file():
        return {"what": "prompt-tuning adapter", **_tokens(load_tokens(path))}
    checkpoint = open_checkpoint(str(path.resolve()), need="embeddings")
    embedding = checkpoint.input_embedding()
    return {
        "what": "model without DefensiveTokens",
        "architecture": checkpoint.config().get("architectures") or ["unknown"],
        "rows": embedding.shape[0],
        "width": embedding.shape[1],
        "dtype": embedding.dtype,
        "tied": checkpoint.tied,
        "tokens_in_vllm": route(str(path.resolve())),
    }


_DEFAULTS = {
    True: "on",
    False: "off: a plain server is undefended",
    None: "unknown: a chat template does not start as `dtt bake` writes it",
}
_SAMPLED = (
    "of the files only_sampled the DefensiveTokens' tensors were compared in full, of the rest 256 blocks; to compare "
    "all of it, bake the base model again and compare the files"
)


def _default(path: Path, manifest: dict[str, Any]) -> tuple[str, list[str]]:
    """Return what the chat templates do by default, and where the manifest says otherwise."""
    found = defaults_of_templates(path, manifest)
    if found == {manifest["default_on"]}:
        return _DEFAULTS[manifest["default_on"]], []
    said = "on" if manifest["default_on"] else "off"
    texts = sorted(_DEFAULTS[default] for default in found)
    return "; ".join(texts), [f"{MANIFEST} says that the default is {said}, the chat templates say: {', '.join(texts)}"]


def _defended(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    tokens = manifest["tokens"]
    altered = altered_since(path, manifest)
    default, mismatch = _default(path, manifest)
    sampled = sampled_files(manifest)
    plain_markers = [str(marker) for marker in manifest.get("plain_text_markers", [])]
    changes = [
        *(f"{name} is missing" for name in altered.missing),
        *(f"{name} was changed" for name in altered.changed),
        *(f"{name} was added" for name in altered.added),
    ] or mismatch
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
        "default": default,
        "trusts": "system, developer" + ", assistant" * bool(manifest.get("trust_assistant", True)),
        "not_protected": protection(manifest["prompt_format"], plain_markers),
        "untied": manifest["base_tied"],
        "reuse_reserved": manifest["reuse_reserved"],
        "verified_when_baked": all(entry["sha256"] for entry in manifest["changed_tensors"].values()),
        "altered": "; ".join(changes) if changes else "",
        **({"only_sampled": sampled, "note": _SAMPLED} if sampled else {}),
        "made_by": f"dtt-plugin {manifest['dtt_plugin']}",
    }
