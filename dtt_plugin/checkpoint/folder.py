"""Which files a checkpoint's folder has, and which tensors its index says they hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
SETTINGS_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
"""What decides, beside the weights, about what a model answers."""

# The last parts of the names that model families give the two matrices.
EMBEDDING_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "word_embeddings.weight",
    "backbone.embeddings.weight",
    "backbone.embedding.weight",
)
HEAD_NAMES = ("lm_head.weight", "embed_out.weight", "output.weight")
COPIED_HEADS = (*HEAD_NAMES, "shared_head.head.weight")
OTHER_TOWERS = ("vision", "visual", "audio", "image", "encoder.", "position")


# A layer that predicts further tokens (DeepSeek-V3, GLM-4.5) has copies of embedding and head of its own.
_COPIES = re.compile(r"(^|\.)(layers\.\d+|mtp\w*)\.")


def embedding_names(names: Any) -> list[str]:
    """Return those of the tensor names `names` that name an input embedding of text."""
    return [
        name
        for name in names
        if any(name == ending or name.endswith("." + ending) for ending in EMBEDDING_NAMES)
        and not any(tower in name for tower in OTHER_TOWERS)
    ]


def is_copy(name: str) -> bool:
    """Return whether a tensor belongs to a layer, where a copy of embedding or head may stand for speculation."""
    return _COPIES.search(name) is not None


def check_within(path: Path, folder: Path) -> None:
    """Refuse a small file that is a link out of the model's folder.

    Its text would be copied into a checkpoint that may be published. In a hub cache a snapshot's links lead to
    the blobs of the same repository. Weights may lie anywhere: people keep them on other disks, and a file that
    is no safetensors is not read.

    Raises:
        DttError: it leads elsewhere.
    """
    real, root = path.resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
        raise DttError(f"{path} is a link to a file outside the model's folder; put the file itself there.")


def read_json_table(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Args:
        path: the file.
        missing: what to return where there is no such file; without it that is an error.

    Raises:
        DttError: the file is missing, unreadable or not a JSON object, or a link that leads out of its folder.
    """
    try:
        check_within(path, path.parent)
        value = read_json(path)
    except FileNotFoundError as error:
        if missing is not None and not path.is_symlink():
            return missing
        raise DttError(f"{path} is missing; download the checkpoint again.") from error
    except OSError as error:
        raise DttError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise DttError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise DttError(f"{path} should hold a JSON object; download it again.")
    return value


def _plain_name(file: str) -> bool:
    """Return whether `file` names a file of one folder, in the way that every file system takes."""
    plain = Path(file).name == file and file not in ("", ".", "..") and not set(file) & set("\\\0")
    return plain and len(file.encode()) < 256


def shards_of_index(index: Path, *, need_embedding_only: bool = False) -> list[str]:
    """Return the names of the files that a safetensors index lists, checked to lie beside it.

    Args:
        index: path of model.safetensors.index.json.
        need_embedding_only: only those that hold an input embedding or an output head.

    Raises:
        DttError: not an index, or a name that leads outside the index's folder.
    """
    weight_map = read_json_table(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DttError(f"{index} has no weight_map; download it again.")
    wanted = embedding_names(weight_map) if need_embedding_only else list(weight_map)
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise DttError(f"{index} has a weight_map whose entries are no names of files; download it again.")
    files = sorted({weight_map[name] for name in wanted or weight_map})
    for file in files:
        # A link inside a hub snapshot leads to its blob, so the name is judged and not where it leads.
        if not _plain_name(file):
            raise DttError(f"{index} names a file outside its folder ({file!r}); don't use this checkpoint.")
    return files
