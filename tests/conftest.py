"""Fixtures: the benchmark data, real models, real tokenizers. What can't be had is skipped, with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dtt_plugin.data.records import (
    RECORDS_FILE,
    SENTENCES_FILE,
    TOKENS_FILE,
    Record,
    data_folder,
    load_records,
    load_sentences,
)
from dtt_plugin.data.sources import BENCHMARKS
from dtt_plugin.errors import DttError
from dtt_plugin.paths import cache_folder
from dtt_plugin.tokens.files import DefensiveTokens, save_tokens
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parent.parent
# Every metric of a task with all variants.
METRICS = {
    "hacked",
    "hacked_max",
    "hacked_any",
    "hacked_ignore",
    "hacked_completion",
    "hacked_ignore_completion",
    "refusal",
}


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the AlpacaFarm data and the published tokens."""
    folder = data_folder()
    missing = [name for name in (RECORDS_FILE, SENTENCES_FILE, TOKENS_FILE) if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"{', '.join(missing)} not in {folder}: run `dtt fetch` or set DTT_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def benchmark_data(data_dir: Path) -> Path:
    """The same folder, with the files of the other benchmarks."""
    missing = [s.name for s in BENCHMARKS if s.sha256 and not (data_dir / s.name).is_file()]
    if missing:
        pytest.skip(f"{missing[0]} … not in {data_dir}: run `dtt fetch --only all` or set DTT_DATA_DIR")
    return data_dir


@pytest.fixture(scope="session")
def published_tokens(data_dir: Path) -> Path:
    return data_dir / TOKENS_FILE


@pytest.fixture(scope="session")
def alpacafarm_records(data_dir: Path) -> list[Record]:
    return load_records(data_dir / RECORDS_FILE)


@pytest.fixture(scope="session")
def test_sentences(data_dir: Path) -> list[str]:
    return load_sentences(data_dir / SENTENCES_FILE).test


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The folder of the demo model, SmolLM2-135M-Instruct."""
    from dtt_plugin.demo.model import demo_model

    try:
        return demo_model()
    except DttError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def qwen() -> str:
    """The folder of Qwen2.5-Coder-0.5B-Instruct, built by the script beside the test data, or from the hub."""
    script = ROOT.parent / "shared" / "models" / "build_test_models.py"
    built = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dtt-test-models" / "qwen-coder-0.5b"
    if not (built / "config.json").is_file():
        if not script.is_file():
            from huggingface_hub import snapshot_download

            try:
                return snapshot_download("Qwen/Qwen2.5-Coder-0.5B-Instruct")
            except (OSError, ValueError) as error:
                pytest.skip(f"no Qwen2.5 model: neither {built} nor {script} exists, and the hub says: {error}")
        subprocess.run([sys.executable, str(script), "qwen-coder-0.5b"], check=True, capture_output=True)
    return str(built)


@pytest.fixture(scope="session")
def qwen_tokenizer(qwen: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen)


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Any:
    """Meta's Llama 3 tokenizer, 128,256 tokens, from the PyPI package llama-models (read as data)."""
    import re

    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = cache_folder("models") / "llama3-tokenizer"
    model_file = folder / "tokenizer.model"
    if not model_file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llama-models"]
        result = subprocess.run(download, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"llama-models can't be downloaded: {result.stderr.strip()[-200:]}")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            model_file.write_bytes(wheel.read("llama_models/llama3/tokenizer.model"))
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    named |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = iter(range(256))
    special = [f"<|{named[i]}|>" if i in named else f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    converted = TikTokenConverter(str(model_file), pattern=pattern, extra_special_tokens=special).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    assert len(tokenizer) == 128256
    assert re.fullmatch(r"<\|start_header_id\|>", tokenizer.convert_ids_to_tokens(128006))
    return tokenizer


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A two-layer chat model that loads in milliseconds; its answers are noise."""
    return str(make_checkpoint(tmp_path / "tiny", width=32))


@pytest.fixture
def tiny_tokens(tmp_path: Path) -> str:
    return write_tokens(tmp_path / "tiny.tokens.safetensors", width=32)


def write_tokens(path: Path, *, width: int, k: int = 5, seed: int = 0, norm: float = 20.0, **fields: str) -> str:
    """Write k random tokens of the given norm and return the file's path."""
    rows = np.random.default_rng(seed).standard_normal((k, width))
    rows *= norm / np.linalg.norm(rows, axis=1, keepdims=True)
    values: dict[str, Any] = {"model": "tiny", "method": "random", "prompt_format": "model"} | fields
    save_tokens(path, DefensiveTokens(rows=rows.astype(np.float32), **values))
    return str(path)


# The lm_eval command without lm-eval's own tasks: to read those takes longer than many a test.
_LM_EVAL_ON_OUR_TASKS = """
from pathlib import Path
from lm_eval.tasks import _index
theirs, files = Path(_index.__file__).parent, _index.TaskIndex._iter_yaml_files
_index.TaskIndex._iter_yaml_files = staticmethod(lambda root: () if root == theirs else files(root))
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def lm_eval(*arguments: str, folder: Path, all_tasks: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the real lm_eval command in a process of its own, or the same on an index of our tasks alone."""
    start = ["-m", "lm_eval"] if all_tasks else ["-c", _LM_EVAL_ON_OUR_TASKS]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lm-eval's vLLM class load its tokenizer, as it does, and start no engine."""
    tokenizers = pytest.importorskip("vllm.tokenizers")
    from dtt_plugin.model_wrappers.vllm import DttVLLM

    def tokenizer_only(self: Any, pretrained: str, tokenizer_mode: str, **_: Any) -> None:
        self.tokenizer = tokenizers.get_tokenizer(pretrained, tokenizer_mode=tokenizer_mode)
        self.think_end_token = None

    monkeypatch.setattr(DttVLLM.__mro__[2], "__init__", tokenizer_only)  # lm-eval's, behind our mixin


class VLLMRun(NamedTuple):
    """A run of `lm_eval --model dtt_vllm` on a few records."""

    stdout: str
    results: dict[str, Any]
    samples: list[dict[str, Any]]


def run_vllm(
    folder: Path,
    arguments: str,
    *more: str,
    task: str = "injection_demo",
    limit: bool = True,
    all_tasks: bool = False,
) -> VLLMRun:
    """Evaluate with a real engine of its own: half a minute on two cores, so few tests may start one.

    The task that is shipped needs no download, so these tests run wherever vLLM does.
    """
    limits = ["--limit", "3", "--gen_kwargs", "max_gen_toks=48"] if limit else []
    engine = "dtype=float32,max_model_len=4096,enforce_eager=True"
    done = lm_eval(
        "--model", "dtt_vllm", "--model_args", f"{engine},{arguments}", "--tasks", task,
        "--log_samples", "--output_path", str(folder / "out"), *limits, *more, folder=folder, all_tasks=all_tasks,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return VLLMRun(done.stdout, read_results(folder / "out"), read_samples(folder / "out", task))


@pytest.fixture(scope="session")
def undefended_vllm(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> VLLMRun:
    """The undefended demo model in vLLM, by the command as a user types it."""
    return run_vllm(tmp_path_factory.mktemp("undefended"), f"pretrained={smollm2}", all_tasks=True)


def read_samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """Return the newest samples of a task below an output folder."""
    newest = sorted(folder.rglob(f"samples_{task}_2*.jsonl"))[-1]
    return [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]


def read_results(folder: Path) -> dict[str, Any]:
    """Return the newest results below an output folder."""
    results: dict[str, Any] = json.loads(sorted(folder.rglob("results_*.json"))[-1].read_text(encoding="utf-8"))
    return results


def plain_task(folder: Path, *, name: str = "plain", answer: str = "2", **more: Any) -> dict[str, Any]:
    """Return a task that is none of ours, of one question in a file below `folder`."""
    (folder / "rows.json").write_text(json.dumps([{"q": "1+1?", "a": answer}]))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "q",
        "doc_to_target": "a",
        "metric_list": [{"metric": "exact_match"}],
        **more,
    }


def our_tasks(**metadata: Any) -> Any:
    """Return lm-eval's task manager with an index of our tasks alone: lm-eval's own take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False, metadata=metadata)


def evaluate(model: str, model_args: dict[str, Any], *, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
    """Run `lm_eval.simple_evaluate` on our tasks."""
    import lm_eval

    from dtt_plugin.sweep.worker import list_packages_once

    list_packages_once()
    manager = our_tasks(**model_args | (metadata or {}))
    defaults = {"tasks": ["injection_demo"], "limit": 2, "bootstrap_iters": 0, "batch_size": 8, "device": "cpu"}
    generation = {"gen_kwargs": {"max_gen_toks": 4}}
    options = defaults | generation | options
    return lm_eval.simple_evaluate(model=model, model_args=model_args, task_manager=manager, **options)
