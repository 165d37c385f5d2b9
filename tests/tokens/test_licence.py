"""The licence of the published tokens follows what is made from them, and no path of a machine follows anything."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from dtt_plugin import cli
from dtt_plugin.alignment import align, load_alignment, save_alignment
from dtt_plugin.bake import MANIFEST, BakeOptions, bake
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.checkpoint.tensors import write_safetensors
from dtt_plugin.data.records import TOKENS_FILE
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_bytes
from dtt_plugin.public_names import public_name
from dtt_plugin.tokens import licence
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens, save_adapter, save_tokens
from dtt_plugin.tokens.licence import NON_COMMERCIAL, inherited, licence_of
from dtt_plugin.tokens.sharing import card, push_tokens
from dtt_plugin.training.options import TrainingOptions
from dtt_plugin.training.train import _result, _Run
from dtt_plugin.transfer.twin import turn_tokens
from tests.bake_helpers import random_tokens, tiny

PUBLISHED = "Qwen/Qwen2.5-7B-Instruct"
ROWS = np.random.default_rng(3).standard_normal((5, 32)).astype(np.float32)


def tokens_for(model: str, method: str = "native") -> DefensiveTokens:
    return DefensiveTokens(ROWS, model, method, "qwen2.5")


def dtt(*arguments: str | Path) -> None:
    assert cli.main([*map(str, arguments)]) == 0


Step = Callable[[Path, Path], Any]


def transferred(method: str, target: str) -> Step:
    return lambda a, b: dtt("transfer", a, "--method", method, "--target-model", target, "-o", b)


def through_json(a: Path, b: Path) -> None:
    dtt("convert", a, b.with_suffix(".json"))
    dtt("convert", b.with_suffix(".json"), b)


def through_adapter(a: Path, b: Path) -> None:
    dtt("convert", a, b.with_suffix(""))
    dtt("convert", b.with_suffix(""), b)


def adapted(a: Path, b: Path) -> None:
    options = TrainingOptions(model="owner/C", data="d", out=b, init=str(a))
    run = dict.fromkeys(("data_sha256", "weights", "batch", "rate", "seed", "labels", "init"), "x")
    save_tokens(b, _result(options, _Run(3, run, "2026-01-01"), load_tokens(a), ROWS + 1, 3))


def turned(a: Path, b: Path) -> None:
    save_tokens(b, turn_tokens(load_tokens(a), stats.ortho_group.rvs(32, random_state=1), model="twin"))


STEPS: dict[str, Step] = {
    "copied": transferred("copy", "owner/B"),
    "turned at random": transferred("random", "owner/B"),
    "as the published JSON": through_json,
    "as an adapter": through_adapter,
    "trained on": adapted,
    "for a twin": turned,
}


@pytest.mark.parametrize("steps", [*itertools.product(STEPS, STEPS)], ids=" then ".join)
def test_the_licence_survives_every_chain(steps: tuple[str, str], tmp_path: Path) -> None:
    save_tokens(tmp_path / "0.safetensors", tokens_for(PUBLISHED))
    for number, step in enumerate((*steps, "copied")):
        STEPS[step](tmp_path / f"{number}.safetensors", tmp_path / f"{number + 1}.safetensors")
    last = load_tokens(tmp_path / "3.safetensors")
    assert (licence_of(last), last.source_model) == (NON_COMMERCIAL, PUBLISHED)
    assert f"license: {NON_COMMERCIAL}" in card(last, "me/tokens")
    with pytest.raises(DttError, match="--accept-license"):
        push_tokens(last, "me/tokens")


@pytest.mark.parametrize("step", STEPS)
def test_tokens_of_ones_own_get_no_licence_on_the_way(step: str, tmp_path: Path) -> None:
    save_tokens(tmp_path / "0.safetensors", tokens_for("owner/mine", "trained"))
    STEPS[step](tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    assert licence_of(load_tokens(tmp_path / "1.safetensors")) == ""


def test_a_conversion_keeps_how_tokens_came_to_be(tmp_path: Path) -> None:
    tokens = replace(tokens_for("owner/B", "procrustes"), source_model="owner/A", metadata={"note": "x"})
    for step in (through_json, through_adapter):
        save_tokens(tmp_path / "a.safetensors", tokens)
        step(tmp_path / "a.safetensors", tmp_path / f"{step.__name__}.safetensors")
        got = (tmp_path / f"{step.__name__}.safetensors").read_bytes()
        assert got == (tmp_path / "a.safetensors").read_bytes()


def test_a_licensed_transfer_as_json_has_its_rows_where_the_published_format_has_them(tmp_path: Path) -> None:
    save_tokens(tmp_path / "a.safetensors", replace(tokens_for("owner/B", "copy"), source_model=PUBLISHED))
    dtt("convert", tmp_path / "a.safetensors", tmp_path / "a.json")
    assert np.array_equal(np.float32(json.loads((tmp_path / "a.json").read_text())["owner/B"]), ROWS)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_published_values_are_known_whatever_the_file_says(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ROWS.astype(dtype).astype(np.float32)
    digests = frozenset(sha256_bytes(row.astype("<f4").tobytes())[:32] for row in known)
    monkeypatch.setattr(licence, "_published_rows", lambda: digests)
    disguised = DefensiveTokens(known, "owner/mine", "trained", "model")
    write_safetensors(tmp_path / "x.safetensors", {"prompt_embeddings": known}, {})
    for rows in (known, known[::-1], known[2:3], np.concatenate([ROWS[:1] + 1, known[4:]])):
        assert licence_of(replace(disguised, rows=rows)) == NON_COMMERCIAL
        assert inherited(replace(disguised, rows=rows)) == {"licence": NON_COMMERCIAL}
    assert licence_of(replace(disguised, rows=known + np.float32(0.5))) == ""


def test_the_published_tokens_are_the_ones_that_are_known(data_dir: Path) -> None:
    if not (data_dir / TOKENS_FILE).is_file():
        pytest.skip(f"{TOKENS_FILE} is not in {data_dir}: run `dtt fetch`")
    published = json.loads((data_dir / TOKENS_FILE).read_text())
    assert len(published) == 4
    for rows in published.values():
        for row in np.array(rows, np.float32):
            for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
                rounded = row.astype(dtype).astype(np.float32)[None]
                assert licence_of(DefensiveTokens(rounded, "owner/mine", "trained", "model")) == NON_COMMERCIAL


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("", ""),
        ("/home/alice/secret-project/base2", "base2"),
        ("/home/alice/secret-project/base2/", "base2"),
        ("/home/alice/x/../base2", "base2"),
        ("~/base2", "base2"),
        ("./base2", "base2"),
        ("../../alice/base2", "base2"),
        ("alice/models/base2", "base2"),
        ("C:\\Users\\alice\\base2", "base2"),
        ("file:///home/alice/base2", "base2"),
        ("/c/hub/models--owner--na--me/snapshots/0123abcd", "owner/na--me"),
        ("/c/hub/models--gpt2/snapshots/0123abcd/", "gpt2"),
        ("/", "model"),
        ("~", "model"),
        (str(Path.home()) + "/", "model"),
    ],
)
def test_a_public_name_is_a_hub_id_or_the_last_part_of_a_path(model: str, name: str) -> None:
    assert public_name(model) == name


def test_a_folder_that_looks_like_a_hub_id_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alice" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("alice/base") == "base"


def test_nothing_that_is_shared_holds_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "alice"
    for name in ("base", "target"):
        tiny(home / name, vocab_tokens=[f"t{i:03d}" for i in range(300)])
    anchors = home / "anchors.txt"
    anchors.write_text("".join(f"t{i:03d}\n" for i in range(200)))
    dtt(
        "align", home / "base", home / "target", "--no-cache", "--out", tmp_path / "w.safetensors",
        "--anchors-file", anchors,
    )  # fmt: skip
    tokens = DefensiveTokens(
        ROWS, str(home / "base"), "trained", "model", source_model=str(home / "base"), metadata={"labels": str(anchors)}
    )
    save_tokens(tmp_path / "t.safetensors", tokens)
    dtt("transfer", tmp_path / "t.safetensors", tmp_path / "w.safetensors", "-o", tmp_path / "moved.safetensors")
    assert "make sure that these are the same model" not in capsys.readouterr().err
    save_adapter(tmp_path / "adapter", tokens)
    dtt("convert", tmp_path / "t.safetensors", tmp_path / "t.json")
    bake(str(home / "base"), tokens, tmp_path / "baked")
    moved = load_tokens(tmp_path / "moved.safetensors")
    assert (moved.model, moved.source_model) == ("target", "base")
    assert load_tokens(tmp_path / "moved.safetensors", model=str(home / "target")).digest == moved.digest
    written = [
        *(tmp_path / name for name in ("w.safetensors", "t.safetensors", "moved.safetensors", "t.json")),
        *(tmp_path / "adapter").iterdir(),
        *(tmp_path / "baked" / name for name in (MANIFEST, "README.md")),
    ]
    shared = [path.read_bytes() for path in written] + [card(t, "me/x").encode() for t in (tokens, moved)]
    assert not any(b"alice" in content or bytes(tmp_path) in content for content in shared)
    assert json.loads((tmp_path / "baked" / MANIFEST).read_text())["base_model"] == "base"


def test_the_alignment_of_a_call_keeps_the_names_that_were_given(tmp_path: Path) -> None:
    source, target = (open_checkpoint(str(tiny(tmp_path / name))) for name in ("a", "b"))
    alignment = align(source, target)
    assert alignment.source_model == str(tmp_path / "a")
    save_alignment(tmp_path / "w.safetensors", alignment)
    assert load_alignment(tmp_path / "w.safetensors").source_model == "a"


def test_a_baked_card_names_the_licence(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    bake(str(base), tokens_for(PUBLISHED), tmp_path / "licensed", BakeOptions(prompt_format="qwen2.5"))
    bake(str(base), random_tokens(32), tmp_path / "free")
    assert NON_COMMERCIAL in (tmp_path / "licensed" / "README.md").read_text()
    assert json.loads((tmp_path / "licensed" / MANIFEST).read_text())["tokens"]["licence"] == NON_COMMERCIAL
    assert NON_COMMERCIAL not in (tmp_path / "free" / "README.md").read_text()


def test_a_card_can_not_be_forged_by_a_name(tmp_path: Path) -> None:
    text = card(tokens_for("a\nlicense: mit\n---\n# `Free`"), "me/x")
    assert "\nlicense: mit" not in text
    assert text.count("\n# ") == 1
