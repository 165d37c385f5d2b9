"""A defended checkpoint computes what the base model computes with the tokens as input embeddings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dtt_plugin.bake import MANIFEST, BakeOptions, altered_since, bake, read_manifest
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_file
from tests.bake_helpers import assert_same_logits, load, logits_of_ids, logits_of_rows, random_tokens, tiny
from tests.checkpoints import BOS, DTYPES, END, default_vocab_tokens, write_weights

N_TOKENS = len(default_vocab_tokens()) + 3
PROMPT = [3, 50, 17, 200, 90, 264]

SHAPES = [
    pytest.param({"tied": tied, "extra_rows": extra, "dtype": dtype, "shards": shards}, id=name)
    for name, tied, extra, dtype, shards in (
        ("tied", True, 0, "bfloat16", 1),
        ("untied", False, 0, "bfloat16", 1),
        ("tied-padded", True, 20, "bfloat16", 1),
        ("untied-padded", False, 20, "float16", 3),
        ("tied-partly-padded", True, 2, "float32", 3),
        ("untied-partly-padded", False, 2, "float32", 2),
    )
]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_with_and_without_the_tokens_are_the_base_models(tmp_path: Path, shape: dict[str, object]) -> None:
    torch = pytest.importorskip("torch")
    base_folder = tiny(tmp_path / "base", **shape)
    tokens = random_tokens(32)
    report = bake(str(base_folder), tokens, tmp_path / "baked")
    base, baked = load(base_folder), load(tmp_path / "baked")
    stored = tokens.rows.astype(DTYPES[str(shape["dtype"])]).astype(np.float32)

    expected = logits_of_rows(base, torch.tensor(stored), PROMPT)
    got = logits_of_ids(baked, [*report.token_ids, *PROMPT])
    assert torch.allclose(got[:, :N_TOKENS], expected[:, :N_TOKENS], atol=1e-4, rtol=0)
    assert_same_logits(baked, base, N_TOKENS, {"input_ids": torch.tensor([PROMPT])})
    assert report.token_ids == tuple(range(N_TOKENS, N_TOKENS + 5))
    rows = N_TOKENS + max(5, int(str(shape["extra_rows"])))
    assert report.rows == rows == baked.config.vocab_size == got.shape[-1]
    assert baked.config.tie_word_embeddings is False


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_but_the_changed_rows_is_bit_equal(tmp_path: Path, shape: dict[str, object]) -> None:
    base_folder = tiny(tmp_path / "base", **shape)
    report = bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    base = open_checkpoint(str(base_folder), need="all").tensors()
    baked = open_checkpoint(str(tmp_path / "baked"), need="all").tensors()
    assert baked.keys() == base.keys() | {"lm_head.weight"}
    for name, location in baked.items():
        value = location.read()
        before = base.get(name, base["model.embed_tokens.weight"]).read()
        if name in report.changed_tensors:
            kept = [row for row in range(len(before)) if row not in report.token_ids]
            assert value[kept].tobytes() == before[kept].tobytes()
        else:
            assert value.tobytes() == before.tobytes()
    for file in {location.file for location in baked.values()}:
        assert load_file(file)  # the library finds the header in order, too


@pytest.mark.parametrize("tied", [True, False])
def test_a_defensive_token_is_never_the_likeliest_and_transformers_never_samples_one(
    tmp_path: Path, tied: bool
) -> None:
    torch = pytest.importorskip("torch")
    base_folder = tiny(tmp_path / "base", tied=tied)
    report = bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    model = load(tmp_path / "baked")
    logits = logits_of_ids(model, [*report.token_ids, *range(0, 250)])
    first = report.token_ids[0]
    assert (logits[:, first:].max(dim=1).values < logits[:, :first].max(dim=1).values).all()
    for temperature in (0.5, 1.0, 2.0, 10.0):
        probabilities = torch.softmax(logits / temperature, dim=-1)
        assert probabilities[:, first:].max() <= 1.05 / N_TOKENS  # Jensen, and the row's rounding
    ids = torch.tensor([[*report.token_ids, *PROMPT]] * 64)
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "pad_token_id": 0}
    sampled = model.generate(ids, do_sample=True, temperature=2.0, top_k=0, **options)[:, ids.shape[1] :]
    assert sampled.shape == (64, 64)
    assert not torch.isin(sampled, torch.tensor(report.token_ids)).any()
    greedy = model.generate(ids[:1], do_sample=False, **options)[:, ids.shape[1] :]
    assert not torch.isin(greedy, torch.tensor(report.token_ids)).any()


@pytest.mark.parametrize(("own", "baked"), [({}, 50), ({"top_k": 20}, 20), ({"top_k": 0}, 50), ({"top_k": -1}, 50)])
def test_a_top_k_that_vllm_takes_as_default_cuts_the_tokens_off(
    tmp_path: Path, own: dict[str, int], baked: int
) -> None:
    torch = pytest.importorskip("torch")
    base_folder = tiny(tmp_path / "base")
    (base_folder / "generation_config.json").write_text(json.dumps(own))
    report = bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    assert json.loads((tmp_path / "baked" / "generation_config.json").read_text())["top_k"] == baked
    logits = logits_of_ids(load(tmp_path / "baked"), [*report.token_ids, *range(0, 250)])
    assert not torch.isin(logits.topk(baked).indices, torch.tensor(report.token_ids)).any()


def test_without_the_head_rows_handled_a_tied_model_would_emit_the_tokens(tmp_path: Path) -> None:
    """The trap that the two tests above guard against exists."""
    torch = pytest.importorskip("torch")
    base_folder = tiny(tmp_path / "base", tied=True)
    base = load(base_folder)
    rows = torch.tensor(random_tokens(32).rows)
    with torch.no_grad():
        hidden = base.model(torch.tensor([PROMPT])).last_hidden_state[0]
    assert ((hidden @ rows.T).max(dim=1).values > logits_of_ids(base, PROMPT).max(dim=1).values).any()


def test_unchanged_files_are_links_and_changed_ones_are_not(tmp_path: Path) -> None:
    base_folder = tiny(tmp_path / "base with späce", tied=True, shards=4)
    report = bake(str(base_folder), random_tokens(32), tmp_path / "baké d")
    same = [
        file.name
        for file in sorted((tmp_path / "baké d").glob("*.safetensors"))
        if file.samefile(base_folder / file.name)
    ]
    assert len(same) == 3
    assert report.bytes_linked == sum((base_folder / name).stat().st_size for name in same)
    copied = bake(str(base_folder), random_tokens(32), tmp_path / "copied", BakeOptions(copy=True))
    assert copied.bytes_linked == 0
    assert not any(f.samefile(base_folder / f.name) for f in (tmp_path / "copied").glob("*.safetensors"))


def test_without_the_kernel_s_copy_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no `copy_file_range`."""
    base = tiny(tmp_path / "base")
    with_it, without = tmp_path / "with", tmp_path / "without"
    bake(str(base), random_tokens(32), with_it)
    monkeypatch.delattr(os, "copy_file_range")
    bake(str(base), random_tokens(32), without)
    assert (with_it / "model.safetensors").read_bytes() == (without / "model.safetensors").read_bytes()


def test_a_hub_cache_of_symlinks_and_a_read_only_model_work(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    tiny(blobs, shards=2)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        file.chmod(0o444)
        (snapshot / file.name).symlink_to(file)
    snapshot.chmod(0o555)
    before = {file.name: file.read_bytes() for file in blobs.iterdir()}
    bake(str(snapshot), random_tokens(32), tmp_path / "baked")
    assert {file.name: file.read_bytes() for file in blobs.iterdir()} == before
    assert all(file.resolve().is_file() for file in (tmp_path / "baked").iterdir())
    load(tmp_path / "baked")


def test_a_tied_model_that_stores_its_head_too_is_untied(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base_folder = tiny(tmp_path / "base", tied=True)
    tensors = load_file(base_folder / "model.safetensors")
    write_weights(base_folder, {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}, shards=2)
    (base_folder / "model.safetensors").unlink()
    bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    base, baked = load(base_folder), load(tmp_path / "baked")
    assert_same_logits(baked, base, N_TOKENS, {"input_ids": torch.tensor([PROMPT])})


def test_a_tied_model_that_stores_another_head_is_refused(tmp_path: Path) -> None:
    base_folder = tiny(tmp_path / "base", tied=False)
    config = json.loads((base_folder / "config.json").read_text())
    (base_folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(DttError, match=r"stores another head, lm_head\.weight"):
        bake(str(base_folder), random_tokens(32), tmp_path / "baked")


def test_reserved_tokens_are_reused_and_no_shape_changes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(8)]
    base_folder = tiny(tmp_path / "base", tied=False, special=[BOS, "<|im_start|>", END, *reserved])
    tokens = random_tokens(32)
    report = bake(str(base_folder), tokens, tmp_path / "baked", BakeOptions(reuse_reserved=True))
    assert report.rows == report.base_rows
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "baked")
    assert tokenizer.convert_tokens_to_ids(list(report.token_names)) == list(report.token_ids)
    assert tokenizer.convert_ids_to_tokens(report.token_ids[0] - 1) == reserved[2]
    stored = torch.tensor(tokens.rows.astype(ml_dtypes.bfloat16).astype(np.float32))
    got = logits_of_ids(load(tmp_path / "baked"), [*report.token_ids, *PROMPT])
    expected = logits_of_rows(load(base_folder), stored, PROMPT)
    assert torch.allclose(got[:, : report.token_ids[0]], expected[:, : report.token_ids[0]], atol=1e-4)
    with pytest.raises(DttError, match="unused reserved tokens and 9 are needed"):
        bake(str(base_folder), random_tokens(32, k=9), tmp_path / "more", BakeOptions(reuse_reserved=True))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_an_overlay_writes_the_changed_tensors_alone(tmp_path: Path, tied: bool, shards: int) -> None:
    torch = pytest.importorskip("torch")
    base_folder = tiny(tmp_path / "base", tied=tied, extra_rows=8, shards=shards)
    tokens = random_tokens(32)
    rewritten = bake(str(base_folder), tokens, tmp_path / "rewritten")
    report = bake(str(base_folder), tokens, tmp_path / "overlay", BakeOptions(overlay=True))
    both = [logits_of_ids(load(r.folder), [*r.token_ids, *PROMPT]) for r in (report, rewritten)]
    assert torch.equal(*both)
    assert report.bytes_written < 2 * report.rows * 32 * 2 + 8192
    assert report.bytes_linked == sum(file.stat().st_size for file in base_folder.glob("*.safetensors"))
    assert not altered_since(report.folder, read_manifest(report.folder))
    weight_utils = pytest.importorskip("vllm.model_executor.model_loader.weight_utils")
    index = json.loads((report.folder / "model.safetensors.index.json").read_text())
    files = [str(path) for path in report.folder.glob("*.safetensors")]
    files = weight_utils.filter_duplicate_safetensors_files(files, str(report.folder), "model.safetensors.index.json")
    loaded = dict(weight_utils.safetensors_weights_iterator(files, use_tqdm_on_load=False))
    assert index["weight_map"].keys() == loaded.keys()
    stored = tokens.rows.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert torch.equal(loaded["model.embed_tokens.weight"][list(report.token_ids)].float(), torch.tensor(stored))


def test_an_overlay_can_not_grow_a_tensor(tmp_path: Path) -> None:
    base_folder = tiny(tmp_path / "base")
    with pytest.raises(DttError, match=r"--overlay: model\.embed_tokens\.weight has to grow"):
        bake(str(base_folder), random_tokens(32), tmp_path / "baked", BakeOptions(overlay=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_the_manifest_tells_an_altered_checkpoint(tmp_path: Path) -> None:
    base_folder = tiny(tmp_path / "base")
    tokens = random_tokens(32)
    bake(str(base_folder), tokens, tmp_path / "baked")
    manifest = read_manifest(tmp_path / "baked")
    assert manifest["tokens"]["sha256"] == tokens.digest
    assert not altered_since(tmp_path / "baked", manifest)
    assert manifest["changed_tensors"]["lm_head.weight"]["sha256"]
    with (tmp_path / "baked" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    (tmp_path / "baked" / "README.md").unlink()
    (tmp_path / "baked" / "new.json").write_text("{}")
    altered = altered_since(tmp_path / "baked", manifest)
    assert (altered.changed, altered.missing, altered.added) == (("model.safetensors",), ("README.md",), ("new.json",))


def flip_byte(file: Path, position: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(position)
        value = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([value ^ 1]))


def test_one_altered_value_of_a_large_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files are sampled, but what was baked is hashed in full, and so is what came from the hub."""
    from dtt_plugin.bake import manifest

    monkeypatch.setattr(manifest, "_SMALL", 0)
    monkeypatch.setattr(manifest, "_SAMPLES", 2)
    monkeypatch.setattr(manifest, "_SAMPLE_BYTES", 16)
    base_folder = tiny(tmp_path / "base", shards=3, tied=False)
    changed = {"model.embed_tokens.weight", "lm_head.weight"}
    files = json.loads((base_folder / "model.safetensors.index.json").read_text())["weight_map"]
    (linked,) = {*files.values()} - {files[name] for name in changed}
    blob = base_folder / sha256_file(base_folder / linked)  # as a hub cache has it
    (base_folder / linked).rename(blob)
    (base_folder / linked).symlink_to(blob)
    out = bake(str(base_folder), random_tokens(32), tmp_path / "baked").folder
    stored = read_manifest(out)
    assert stored["files"][linked] == f"sha256:{blob.name}"
    assert not altered_since(out, stored)
    places = {name: at for name, at in open_checkpoint(str(out), need="all").tensors().items() if name in changed}
    for location in places.values():
        flip_byte(location.file, location.offset + location.nbytes // 2)
        assert altered_since(out, stored).changed == (location.file.name,)
        flip_byte(location.file, location.offset + location.nbytes // 2)
    flip_byte(out / linked, (out / linked).stat().st_size // 2)
    assert altered_since(out, stored).changed == (linked,)


def test_verification_finds_a_wrong_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtt_plugin.bake import weights

    base_folder = tiny(tmp_path / "base")
    write_at = weights._write_at

    def careless(descriptor: int, data: bytes | memoryview, position: int) -> None:
        write_at(descriptor, bytes(data)[:-1] + b"\x00", position)

    monkeypatch.setattr(weights, "_write_at", careless)
    with pytest.raises(DttError, match=r"Verification failed: the values of .* in model\.safetensors"):
        bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base_folder = tiny(tmp_path / "base", dtype="float16")
    with pytest.raises(DttError, match=r"rows of width 48 .* has width 32; transfer them first"):
        bake(str(base_folder), random_tokens(48), tmp_path / "baked")
    with pytest.raises(DttError, match=r"does not fit the type of model\.embed_tokens\.weight"):
        bake(str(base_folder), random_tokens(32, scale=1e6), tmp_path / "baked")
    bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    with pytest.raises(DttError, match="already has DefensiveTokens"):
        bake(str(tmp_path / "baked"), random_tokens(32), tmp_path / "twice")


def test_models_that_cannot_be_defended_this_way_are_refused(tmp_path: Path) -> None:
    base_folder = tiny(tmp_path / "base")
    config = json.loads((base_folder / "config.json").read_text())
    (base_folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    with pytest.raises(DttError, match="computes its output from the input embedding in every engine"):
        bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    (base_folder / "config.json").write_text(json.dumps(config))
    (base_folder / "tokenizer.json").unlink()
    with pytest.raises(DttError, match=r"has no tokenizer\.json"):
        bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    (base_folder / "model.safetensors").rename(base_folder / "pytorch_model.bin")
    with pytest.raises(DttError, match="pickled weights only"):
        bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def edited(name: str, **values: object) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | values))

    return edit


def put(name: str, contents: bytes) -> Callable[[Path], None]:
    def write(base: Path) -> None:
        (base / name).write_bytes(contents)

    return write


CONFIG, TOKENIZER, INDEX = "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
DAMAGED = {
    "ids are no numbers": (edited(TOKENIZER, model={"vocab": {"a": "b"}}), "has no readable vocabulary"),
    "no vocabulary": (put(TOKENIZER, b"{}"), "has no readable vocabulary"),
    "added tokens without ids": (edited(TOKENIZER, added_tokens=[{"x": 1}]), "has no readable vocabulary"),
    "added tokens are text": (edited(TOKENIZER, added_tokens=["a"]), "has no readable vocabulary"),
    "templates without names": (edited(CONFIG, chat_template=[{"x": 1}]), "without name or template"),
    "template that is no jinja": (edited(CONFIG, chat_template="{% for x %}"), r"not valid jinja \(line 1: "),
    "template that is no text": (put("chat_template.jinja", b"\xff\xfe"), "can't be read as UTF-8 text"),
    "suppressed tokens are text": (edited("generation_config.json", suppress_tokens="x"), "should list ids"),
    "top_k is text": (edited("generation_config.json", top_k="x"), "top_k be a number"),
    "generation config is no JSON": (put("generation_config.json", b"x"), "is not valid JSON"),
    "index names what no file holds": (edited(INDEX, weight_map={"nosuch": SHARD}), "names nosuch, which none of"),
    "truncated": (lambda base: os.truncate(base / SHARD, 999), "is not a whole safetensors file"),
    "no configuration": (lambda base: (base / "config.json").unlink(), r"has no config\.json"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model_is_refused_in_one_sentence_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    base_folder = tiny(tmp_path / "base", shards=2)
    damage, sentence = DAMAGED[case]
    damage(base_folder)
    with pytest.raises(DttError, match=sentence):
        bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_an_index_that_names_too_little_is_completed(tmp_path: Path) -> None:
    base_folder = tiny(tmp_path / "base", shards=2)
    index = json.loads((base_folder / INDEX).read_text())
    few = {name: file for name, file in index["weight_map"].items() if "norm" not in name}
    (base_folder / INDEX).write_text(json.dumps({"weight_map": few}))
    bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    baked = json.loads((tmp_path / "baked" / INDEX).read_text())["weight_map"]
    assert baked.keys() == index["weight_map"].keys() | {"lm_head.weight"}


def test_everything_says_the_same(tmp_path: Path) -> None:
    """Index, configuration, tokenizer, generation config and manifest agree."""
    base_folder = tiny(tmp_path / "base", shards=3)
    report = bake(str(base_folder), random_tokens(32), tmp_path / "baked")
    baked = tmp_path / "baked"
    index = json.loads((baked / "model.safetensors.index.json").read_text())
    tensors = open_checkpoint(str(baked), need="all").tensors()
    assert index["weight_map"] == {name: location.file.name for name, location in tensors.items()}
    assert index["metadata"]["total_size"] == sum(location.nbytes for location in tensors.values())
    generation = json.loads((baked / "generation_config.json").read_text())
    assert generation == {
        "eos_token_id": json.loads((base_folder / "config.json").read_text())["eos_token_id"],
        "suppress_tokens": list(report.token_ids),
        "top_k": 50,
    }
    assert json.loads((baked / MANIFEST).read_text())["token_ids"] == list(report.token_ids)
