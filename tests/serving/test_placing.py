"""Which ids stand for the tokens of which file, and what the rows beside the base model are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtt_plugin.bake import BakeOptions, bake
from dtt_plugin.bake.tokenizer import TokenizerFiles
from dtt_plugin.checkpoint.defended import read_manifest
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.serving.placing import NoFreeIds, TokenFile, place, route, rows_of_config
from dtt_plugin.tokens.files import load_tokens
from tests.checkpoints import default_vocab_tokens, make_checkpoint
from tests.conftest import write_tokens


@pytest.fixture
def files(tmp_path: Path) -> list[TokenFile]:
    """Two token files of 5 and 4 rows, of the width of the tiny models."""
    return [
        TokenFile(write_tokens(tmp_path / f"{name}.tokens.safetensors", width=32, k=k, seed=k))
        for name, k in (("a", 5), ("b", 4))
    ]


def manifest_ids(folder: Path) -> tuple[int, ...]:
    return tuple(read_manifest(folder)["token_ids"])


def test_the_first_file_has_the_ids_that_baking_would_give_it(tmp_path: Path, files: list[TokenFile]) -> None:
    padded = str(make_checkpoint(tmp_path / "padded", extra_rows=20, reserved=12))
    reserved = str(make_checkpoint(tmp_path / "reserved", reserved=12))
    tokens = load_tokens(files[0].file)
    for model, reuse in ((padded, False), (reserved, True)):
        bake(model, tokens, tmp_path / f"baked-{reuse}", BakeOptions(reuse_reserved=reuse))
        placed = place(model, files).placed
        assert placed[0].ids == manifest_ids(tmp_path / f"baked-{reuse}")
        assert set(placed[0].ids).isdisjoint(placed[1].ids)
        assert len(placed[1].ids) == 4
        assert max(placed[1].ids) < open_checkpoint(model).input_embedding().shape[0]


def with_padding(folder: Path, n: int, **options: Any) -> str:
    """A model whose tokenizer names its padding rows, as one that comes from a GGUF file does."""
    ordinary = default_vocab_tokens()
    padding = [f"[PAD{len(ordinary) + i}]" for i in range(n)]
    return str(make_checkpoint(folder, vocab_tokens=[*ordinary, *padding], **options))


def test_padding_that_a_gguf_file_named_is_free_unless_text_can_yield_it(
    tmp_path: Path, files: list[TokenFile]
) -> None:
    model = with_padding(tmp_path / "model", 9)
    assert sorted(place(model, files).ids) == list(range(265, 274))
    bake(model, load_tokens(files[0].file), tmp_path / "baked", BakeOptions(reuse_reserved=True))
    assert manifest_ids(tmp_path / "baked") == place(model, files[:1]).placed[0].ids
    assert route(model) == "beside the model (0 spare rows, 9 unused reserved tokens)"
    table = json.loads((Path(model) / "tokenizer.json").read_text())
    merges = table["model"]["merges"]

    def renamed(old: str, new: str) -> dict[str, int]:
        return {text.replace(old, new): i for text, i in table["model"]["vocab"].items()}

    reaching = {  # each of them lets an ordinary text have the id 270, or makes it another token
        "merges": {"merges": [*merges, ["[PAD270", "]"]], "vocab": renamed("[PAD273]", "[PAD270")},
        "whole": {"ignore_merges": True},
        "another": {"vocab": renamed("[PAD270]", "[PAD999]")},
    }
    for name, change in reaching.items():
        other = with_padding(tmp_path / name, 9)
        changed = table | {"model": table["model"] | change}
        (Path(other) / "tokenizer.json").write_text(json.dumps(changed))
        assert 270 not in TokenizerFiles(Path(other)).unused_reserved_ids()
    config = Path(model) / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|im_end|>\\n", "<|im_end|>[PAD270]\\n"))
    assert TokenizerFiles(Path(model)).unused_reserved_ids() == [265, 266, 267, 268, 269, 271, 272, 273]


def test_a_full_vocabulary_is_told_with_both_numbers(tmp_path: Path, files: list[TokenFile]) -> None:
    with pytest.raises(NoFreeIds, match="has 0 free ids and 9 are needed"):
        place(str(make_checkpoint(tmp_path / "full")), files)
    with pytest.raises(NoFreeIds, match="has 8 free ids and 9 are needed"):
        place(str(make_checkpoint(tmp_path / "nearly", extra_rows=8)), files)
    two_kinds = make_checkpoint(tmp_path / "both", extra_rows=5, reserved=4)
    assert len(place(str(two_kinds), files).ids) == 9


def test_the_same_values_are_placed_once_and_found_by_their_values(tmp_path: Path, files: list[TokenFile]) -> None:
    model = str(make_checkpoint(tmp_path / "model", extra_rows=20))
    copy = TokenFile(write_tokens(tmp_path / "copy.safetensors", width=32, k=5, seed=5))
    placement = place(model, [files[0], copy])
    assert len(placement.placed) == 1
    assert placement.ids_of(load_tokens(copy.file)) == placement.placed[0].ids
    assert placement.ids_of(load_tokens(files[1].file)) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_those_of_a_baked_checkpoint(dtype: str, tmp_path: Path, files: list[TokenFile]) -> None:
    model = str(make_checkpoint(tmp_path / "model", extra_rows=20, dtype=dtype))
    ids, rows = rows_of_config(place(model, files).to_config())
    bake(model, load_tokens(files[0].file), tmp_path / "baked")
    baked = open_checkpoint(str(tmp_path / "baked")).input_embedding().read_rows(min(ids[:5]), max(ids[:5]) + 1)
    assert np.array_equal(rows[:5], baked.astype(np.float32))


def test_what_does_not_fit_or_was_changed_is_refused(tmp_path: Path, files: list[TokenFile]) -> None:
    model = str(make_checkpoint(tmp_path / "model", extra_rows=20, dtype="float16"))
    wide = TokenFile(write_tokens(tmp_path / "wide.safetensors", width=64))
    with pytest.raises(DttError, match=r"wide\.safetensors have width 64 and .* has width 32; they were made for tiny"):
        place(model, [wide])
    large = TokenFile(write_tokens(tmp_path / "large.safetensors", width=32, norm=1e6))
    with pytest.raises(DttError, match=r"does not fit the type of the embedding \(F16\)"):
        place(model, [large])
    with pytest.raises(DttError, match=r"absent\.safetensors can't be read"):
        place(model, [TokenFile(str(tmp_path / "absent.safetensors"))])
    bake(model, load_tokens(files[0].file), tmp_path / "baked")
    with pytest.raises(DttError, match="already has DefensiveTokens"):
        place(str(tmp_path / "baked"), files)
    config = place(model, files).to_config()
    write_tokens(Path(files[0].file), width=32, k=5, seed=6)
    with pytest.raises(DttError, match=r"a\.tokens\.safetensors was changed while the engine started"):
        rows_of_config(config)
