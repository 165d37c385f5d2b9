"""Token files: both formats there and back, and everything that must be refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.formats import FORMAT_OF_PUBLISHED_MODEL
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens, save_tokens, save_upstream_json

ROWS = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)


def tokens(**fields: object) -> DefensiveTokens:
    given = {"rows": ROWS, "model": "owner/model", "method": "trained", "prompt_format": "model"}
    return DefensiveTokens(**{**given, **fields})  # type: ignore[arg-type]


def test_a_token_file_comes_back_whole_and_bytes_repeat(tmp_path: Path) -> None:
    original = tokens(source_model="owner/source", metadata={"digest_of_something": "abc"})
    save_tokens(tmp_path / "a.safetensors", original)
    save_tokens(tmp_path / "b.safetensors", original)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_tokens(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(loaded.rows, ROWS)
    assert (loaded.k, loaded.width, loaded.digest) == (5, 16, original.digest)
    assert loaded.metadata == original.metadata
    assert (loaded.model, loaded.method, loaded.source_model) == ("owner/model", "trained", "owner/source")


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    save_tokens(tmp_path / "t.safetensors", tokens(prompt_format="llama3"))
    with safe_open(tmp_path / "t.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("defensive_tokens"), ROWS)
        metadata = file.metadata()
    assert metadata["format"] == "dtt.tokens/1"
    assert metadata["prompt_format"] == "llama3"


def test_the_digest_changes_with_values_and_shape() -> None:
    other = ROWS.copy()
    other[4, 15] += 1e-6
    assert len({tokens().digest, tokens(rows=other).digest, tokens(rows=ROWS.reshape(8, 10)).digest}) == 3


def test_the_upstream_json_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    save_upstream_json(path, {"Qwen/Qwen2.5-7B-Instruct": ROWS, "owner/own": ROWS[:2]})
    loaded = load_tokens(path, model="Qwen/Qwen2.5-7B-Instruct")
    np.testing.assert_array_equal(loaded.rows, ROWS)
    assert (loaded.method, loaded.prompt_format) == ("native", "qwen2.5")
    assert load_tokens(path, model="owner/own").prompt_format == "model"
    with pytest.raises(DttError, match=r"tokens of 2 models .* name one"):
        load_tokens(path)
    with pytest.raises(DttError, match="no tokens of 'x'; it has: Qwen"):
        load_tokens(path, model="x")


@pytest.mark.parametrize(("model", "prompt_format"), FORMAT_OF_PUBLISHED_MODEL.items())
def test_the_published_tokens_are_read(published_tokens: Path, model: str, prompt_format: str) -> None:
    published = load_tokens(published_tokens, model=model)
    assert published.k == 5
    assert published.width in (3072, 3584, 4096)
    assert published.prompt_format == prompt_format


BAD_JSON = {
    "not JSON": ("{", "neither a token file"),
    "a list": ("[[1.0]]", "should hold an object"),
    "empty object": ("{}", "should hold an object"),
    "no rows": ('{"m": []}', "not a list of rows"),
    "empty rows": ('{"m": [[], []]}', "not a list of rows"),
    "numbers": ('{"m": [1, 2]}', "not a list of rows"),
    "ragged": ('{"m": [[1, 2], [3]]}', r"different lengths \(\[1, 2\]\)"),
    "strings": ('{"m": [["1", "2"]]}', "not a number"),
    "booleans": ('{"m": [[true, false]]}', "not a number"),
    "nested": ('{"m": [[[1], [2]]]}', "not a number"),
    "NaN": ('{"m": [[1, 2], [NaN, 1]]}', "DefensiveToken 1 holds NaN or infinity"),
    "infinity": ('{"m": [[Infinity]]}', "DefensiveToken 0 holds NaN or infinity"),
    "beyond float32": ('{"m": [[1e39]]}', "NaN or infinity"),
    "beyond float64": ('{"m": [[1' + "0" * 400 + "]]}", "beyond float32"),
    "twice": ('{"m": [[1]], "m": [[2]]}', "'m' stands there twice"),
    "too many": (json.dumps({"m": [[1.0]] * 1001}), "1 to 1000 rows"),
    "too deep": ("[" * 100_000, "neither a token file"),
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_bad_json_is_refused(what: str, tmp_path: Path) -> None:
    text, message = BAD_JSON[what]
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DttError, match=message):
        load_tokens(tmp_path / "t.json")


def test_bad_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    good = {"format": "dtt.tokens/1", "model": "m", "method": "native", "prompt_format": "model"}
    cases = [
        (ROWS, {}, "not a token file"),
        (ROWS.astype(np.float64), good, "F64.*not float32"),
        (ROWS[0], good, r"\[16\].*not float32 with"),
        (np.zeros((1001, 2), np.float32), good, "1 to 1000 rows"),
        (np.full((2, 2), np.nan, np.float32), good, "DefensiveToken 0 holds NaN"),
        (ROWS, good | {"method": "magic"}, "method='magic'"),
        (ROWS, good | {"prompt_format": "gpt9"}, "prompt_format='gpt9'"),
        (ROWS, good | {"sha256": "0" * 64}, "don't match the digest"),
    ]
    for rows, metadata, message in cases:
        save_file({"defensive_tokens": rows}, path, metadata=metadata)
        with pytest.raises(DttError, match=message):
            load_tokens(path)
    save_tokens(path, tokens())
    with pytest.raises(DttError, match="tokens for 'owner/model', not for 'other'"):
        load_tokens(path, model="other")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DttError, match="not a whole safetensors file"):
        load_tokens(path)
    with pytest.raises(DttError, match="can't be read"):
        load_tokens(tmp_path / "missing.safetensors")
