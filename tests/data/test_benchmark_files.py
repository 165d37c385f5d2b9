"""The benchmarks' files: missing, altered, unreadable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtt_plugin.data.benchmark_files import DIGESTS, benchmark_file, load_benchmark, record_digests
from dtt_plugin.data.sources import CYBERSECEVAL2_FILE, SEP_892_FILE, SEP_FILE
from dtt_plugin.errors import DttError


def test_the_shipped_digests_are_those_of_the_files_at_hand(benchmark_data: Path) -> None:
    for name, digests in json.loads(DIGESTS.read_text()).items():
        assert "".join(record_digests(load_benchmark(name))) == digests, name


def test_a_missing_file_names_the_fetch_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path))
    with pytest.raises(DttError, match=r"does not exist; run `dtt fetch --only sep` .* or set DTT_DATA_DIR"):
        benchmark_file(SEP_FILE)


def test_an_altered_file_names_the_first_record_that_differs(
    benchmark_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = json.loads((benchmark_data / SEP_892_FILE).read_text())
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path))
    (tmp_path / "sep").mkdir()
    changed = [dict(record) for record in records]
    changed[41]["witness"] += "s"
    (tmp_path / SEP_892_FILE).write_text(json.dumps(changed))
    with pytest.raises(DttError, match=r"record 41 differs first \(892 found, 892 expected\); .*--only sep"):
        load_benchmark(SEP_892_FILE)
    assert load_benchmark(SEP_892_FILE, allow_modified=True)[41]["witness"].endswith("s")
    (tmp_path / SEP_892_FILE).write_text(json.dumps(records[:7]))
    with pytest.raises(DttError, match=r"record 7 differs first \(7 found, 892 expected\)"):
        load_benchmark(SEP_892_FILE)
    (tmp_path / SEP_892_FILE).write_text(json.dumps(records, indent=7))
    with pytest.raises(DttError, match="its records are the known ones, and its bytes differ"):
        load_benchmark(SEP_892_FILE)


def test_half_a_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path))
    (tmp_path / "cyberseceval2").mkdir()
    (tmp_path / CYBERSECEVAL2_FILE).write_text('[{"prompt_id": 1')
    with pytest.raises(DttError, match="not readable JSON"):
        load_benchmark(CYBERSECEVAL2_FILE)
    (tmp_path / "bipia" / "email").mkdir(parents=True)
    (tmp_path / "bipia/email/test.jsonl").write_text('{}\n\n{"a": \n')
    with pytest.raises(DttError, match="line 3, is not JSON"):
        load_benchmark("bipia/email/test.jsonl")
