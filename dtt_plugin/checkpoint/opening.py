"""Reading a model's files without the model: configuration, tensor positions, single matrices.

A checkpoint is a folder, one .safetensors file, or a hub id; of a hub id only
what is needed is downloaded. Tensors are found from the headers of the
safetensors files and read in blocks of rows with plain reads: never a model
object, never a whole file in memory, no memory map.
"""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dtt_plugin.checkpoint.families import TIED_BY_DEFAULT, text_configs
from dtt_plugin.checkpoint.folder import (
    COPIED_HEADS,
    EMBEDDING_NAMES,
    HEAD_NAMES,
    INDEX_FILE,
    SINGLE_FILE,
    embedding_names,
    is_copy,
    read_json_table,
    shards_of_index,
)
from dtt_plugin.checkpoint.hub import download_checkpoint
from dtt_plugin.checkpoint.tensors import DTYPES, FLOAT_DTYPES, TensorLocation, read_header
from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import open_regular
from dtt_plugin.public_names import is_hub_id

__all__ = ["DTYPES", "FLOAT_DTYPES", "Checkpoint", "TensorLocation", "open_checkpoint", "read_header"]

_QUANTIZED_ENDINGS = (".qweight", ".weight_packed", ".weight.absmax", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True)
class Checkpoint:
    """A model's files. Built by `open_checkpoint`."""

    name: str
    """As the user typed it."""
    folder: Path
    revision: str | None = None
    """The hub commit, for a hub id."""
    weight_files: tuple[Path, ...] = ()
    """Of the safetensors files that are there."""

    def config(self) -> dict[str, Any]:
        """Return config.json; empty where a single file has none beside it.

        Raises:
            DttError: it is not a JSON table.
        """
        return self._config

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_json_table(self.folder / "config.json", missing={})

    def tensors(self) -> dict[str, TensorLocation]:
        """Return where every tensor of the present weight files lies, from their checked headers."""
        return self._tensors

    @cached_property
    def _tensors(self) -> dict[str, TensorLocation]:
        found: dict[str, TensorLocation] = {}
        for file in self.weight_files:
            for name, location in read_header(file)[0].items():
                if name in found:
                    raise DttError(f"The tensor {name} is in both {found[name].file} and {file}; remove one of them.")
                found[name] = location
        return found

    def input_embedding(self) -> TensorLocation:
        """Return the input embedding, [rows, width].

        Raises:
            DttError: there is none, several, or one whose values can't be used as they stand.
        """
        tensors = self.tensors()
        found = [tensors[name] for name in embedding_names(tensors)]
        if not found:
            raise DttError(self._no_embedding())
        if len(found) > 1:
            found = [location for location in found if not is_copy(location.name)] or found
        if len(found) > 1:
            rows = text_configs(self.config())[-1].get("vocab_size")
            found = [location for location in found if location.shape[0] == rows] or found
        if len(found) > 1:
            names = ", ".join(location.name for location in found)
            raise DttError(f"{self.name} has several input embeddings ({names}); only text models are supported.")
        return self._check_embedding(found[0])

    def output_head(self) -> TensorLocation | None:
        """Return the output head's own matrix, [rows, width], where the files hold one."""
        tensors = self.tensors()
        for ending in HEAD_NAMES:
            for name, location in tensors.items():
                is_head = name == ending or name.endswith("." + ending)
                if is_head and len(location.shape) == 2 and not is_copy(name):
                    return location
        return None

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding, as far as can be said: also where no head is stored."""
        return self.output_head() is None or self.says_tied

    @property
    def says_tied(self) -> bool:
        """What config.json says of head and embedding; where it says nothing, what its family does."""
        for table in text_configs(self.config()):
            if table.get("tie_word_embeddings") is not None:
                return bool(table["tie_word_embeddings"])
        return self.config().get("model_type") in TIED_BY_DEFAULT

    def copies(self, location: TensorLocation) -> list[TensorLocation]:
        """Return the other matrices of the same kind inside layers, which serve speculative decoding alone."""
        kind = COPIED_HEADS if location == self.output_head() else EMBEDDING_NAMES
        return [
            other
            for name, other in self.tensors().items()
            if name != location.name
            and is_copy(name)
            and name.endswith(kind)
            and (other.shape, other.dtype) == (location.shape, location.dtype)
        ]

    def _check_embedding(self, location: TensorLocation) -> TensorLocation:
        companions = {location.name.removesuffix(".weight") + ending for ending in _QUANTIZED_ENDINGS}
        if location.dtype not in FLOAT_DTYPES or companions & self.tensors().keys():
            raise DttError(
                f"The input embedding of {self.name} is quantized ({location.name} in {location.file}, "
                f"type {location.dtype}); use the model's original checkpoint."
            )
        if len(location.shape) != 2 or 0 in location.shape:
            raise DttError(
                f"{location.name} in {location.file} has the shape {list(location.shape)} where an input "
                "embedding has two dimensions, rows and width; this file can't be used."
            )
        return location

    def _no_embedding(self) -> str:
        tensors = self.tensors()
        stems = tuple(name.removesuffix(".weight") for name in EMBEDDING_NAMES)
        for name in tensors:
            if any(stem + ending in name for stem in stems for ending in _QUANTIZED_ENDINGS):
                return f"The input embedding of {self.name} is quantized ({name}); use the model's original checkpoint."
        return (
            f"{self.name} has no input embedding: none of its {len(tensors)} tensors is called "
            "like one (model.embed_tokens.weight, transformer.wte.weight ...); is it a LoRA adapter or "
            "an incomplete download?"
        )


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    need: Literal["tokenizer", "embeddings", "all"] = "embeddings",
) -> Checkpoint:
    """Find the files of `model`.

    Args:
        model: a folder, one .safetensors file, or a hub id.
        revision: branch, tag or commit, for a hub id.
        need: what a hub id downloads: configuration and tokenizer; these and the files that hold the
            input embedding; or everything.

    Raises:
        DttError: nothing usable is there; the sentence says what to do.
    """
    path = Path(model).expanduser()
    try:
        path.is_file()
    except OSError as error:  # a name that no file system takes
        raise DttError(f"{model[:80]!r} can't be opened: {error.strerror}.") from error
    if path.is_file():
        if need == "all" and (path.parent / INDEX_FILE).is_file():
            raise DttError(f"{model} is one of several weight files; give their folder, {path.parent}.")
        return _open_file(model, path)
    if path.is_dir():
        files = () if need == "tokenizer" else _weight_files(path, model)
        return Checkpoint(model, path, weight_files=files)
    if os.path.exists(path):
        open_regular(path).close()  # says what it is instead
    if not is_hub_id(model) and ("/" in model or model.startswith((".", "~"))):
        raise DttError(f"There is no folder or file {model}; check the path, or give a hub id like owner/name.")
    folder, commit = download_checkpoint(model, revision=revision, need=need)
    files = () if need == "tokenizer" else _weight_files(folder, model, present_only=need == "embeddings")
    return Checkpoint(model, folder, revision=commit, weight_files=files)


def _open_file(model: str, path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        raise DttError(f"{model} is a GGUF file; give the original safetensors checkpoint it was made from.")
    if path.suffix != ".safetensors":
        raise DttError(f"{model} is not a .safetensors file; give one, or the model's folder, or a hub id.")
    return Checkpoint(model, path.parent, weight_files=(path,))


def _weight_files(folder: Path, model: str, *, present_only: bool = False) -> tuple[Path, ...]:
    """Return the safetensors files of `folder`: those of its index, else the single one."""
    index = folder / INDEX_FILE
    if index.is_file():
        files = [folder / name for name in shards_of_index(index)]
        missing = [file for file in files if not file.is_file()]
        if present_only:
            return tuple(file for file in files if file not in missing)
        if missing:
            raise DttError(f"{index} names {missing[0].name}, which is not there; download the checkpoint again.")
        return tuple(files)
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return (found[0],)
    if found:
        raise DttError(f"{folder} has {len(found)} safetensors files and no {INDEX_FILE}; download it again.")
    raise DttError(_no_weights(folder, model))


def _no_weights(folder: Path, model: str) -> str:
    if any(folder.glob("*.gguf")):
        return f"{model} holds GGUF files only; give the original safetensors checkpoint they were made from."
    if any(path for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending)):
        return (
            f"{model} holds pickled weights only, which can run code when they are read; convert it "
            "with `AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)`, or give one in safetensors."
        )
    return f"{model} has no safetensors file; give a model's folder, a .safetensors file or a hub id."
