"""The commands that the README and the question pages show, run as they stand there on small models.

A block that is marked `bash` is run here; `shell` marks what needs the network, a GPU or a server.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from dtt_plugin.cli import main
from dtt_plugin.data.records import RECORDS_FILE, SENTENCES_FILE, TOKENS_FILE
from tests.checkpoints import SPECIAL_TOKENS, make_checkpoint
from tests.conftest import ROOT, lm_eval, write_tokens

PAGES = (
    "README.md",
    "docs/serve-it.md",
    "docs/my-own-prompts.md",
    "docs/reproduce-the-paper.md",
    # They load models several times, in ways that other default tests take.
    *(
        pytest.param(page, marks=pytest.mark.slow)
        for page in ("docs/test-my-model.md", "docs/defend-my-model.md", "docs/compare-defenses.md")
    ),
)
LLAMAS = ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct")
MODELS = (*LLAMAS, "Qwen/Qwen2.5-Coder-0.5B-Instruct", "owner/other-model", "HuggingFaceTB/SmolLM2-135M-Instruct")
LLAMA3_MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# What makes a command quick on models whose answers are noise.
QUICKER = {
    "lm_eval": "--limit 1 --gen_kwargs max_gen_toks=4",
    "train": "--steps 1 --eval-every 1 --held-out 3 --label-tokens 4 --batch 2",
    "doctor": "--engine dtt_hf --seconds 0.5",
}


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines() if line]


@pytest.fixture
def world(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every model that the pages name is a small one, and `published` are tokens for them."""
    for seed, name in enumerate(MODELS):
        folder = make_checkpoint(tmp_path / name, seed=seed, special=(*SPECIAL_TOKENS, *LLAMA3_MARKS))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    for name in ("examples", "tasks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    for name in (RECORDS_FILE, SENTENCES_FILE):
        (tmp_path / "data" / name).symlink_to(data_dir / name)
    tokens = {name: [[float((7 * i + 3 * j) % 11 - 5) for j in range(32)] for i in range(5)] for name in LLAMAS}
    (tmp_path / "data" / TOKENS_FILE).write_text(json.dumps(tokens))
    monkeypatch.setenv("DTT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str], folder: Path) -> None:
    program, *arguments = [word.replace("dtt_vllm", "dtt_hf") for word in words]
    if program == "lm_eval":
        done = lm_eval(*arguments, *QUICKER["lm_eval"].split(), folder=folder, all_tasks=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return
    assert program == "dtt", f"a command that this test can't run: {program}"
    if arguments[0] == "fetch":  # the fixture's data stand in for a download
        return
    code = main([*arguments, *QUICKER.get(arguments[0], "").split()])
    assert code == 0 or arguments[0] == "doctor", words


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, world: Path) -> None:
    found = commands(page)
    assert found
    write_tokens(world / "trained.safetensors", width=32)  # what the page before has made
    for words in found:
        run(words, world)
