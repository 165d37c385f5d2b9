"""Checks of an installation: is everything there that an evaluation needs, and if not, what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dtt_plugin.errors import DttError

if TYPE_CHECKING:
    from dtt_plugin.prompt.renderer import PromptRenderer

ENGINES = {"dtt_vllm": "vLLM", "dtt_hf": "Hugging Face"}
"""The engines, the faster one first, and the names of their checks."""


class Finding(NamedTuple):
    """The result of one check, in one line."""

    check: str
    ok: bool
    message: str


def examine(model: str | None = None, tokens: str | None = None, tokens_model: str | None = None) -> Iterator[Finding]:
    """Yield a finding per check, as each is done.

    Args:
        model: a model to check as well: does its chat template render?
        tokens: a token file to check as well: is it sound, and does it fit `model`?
        tokens_model: the entry of an upstream JSON.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("models in lm-eval", _models),
        ("tasks in lm-eval", _tasks),
        (ENGINES["dtt_vllm"], lambda: _imports("dtt_vllm", "vllm")),
        (ENGINES["dtt_hf"], lambda: _imports("dtt_hf", "hf")),
        ("benchmark data", _data),
    ]
    if tokens:
        checks.append(("token file", lambda: _tokens(tokens, tokens_model, model)))
    if model:
        checks.append(("chat template", lambda: _template(model)))
        checks.append(("tokens in vLLM", lambda: _route(model)))
    for name, check in checks:
        try:
            yield Finding(name, True, check())
        except DttError as error:
            yield Finding(name, False, str(error))


def examine_records(path: str, model: str | None = None) -> Iterator[Finding]:
    """Yield whether a file is fit for the task `injection_records`, and one prompt of each variant that it makes.

    Args:
        path: JSONL or JSON file.
        model: whose chat template renders the prompts; None: they are shown as messages.
    """
    from dtt_plugin.tasks.injection_records.dataset import own_records

    try:
        rows = list(own_records(records=path)["test"])
        first = {variant["attack"]: variant for row in reversed(rows) for variant in row["variants"]}
        shown = {name: _shown(variant["messages"], model) for name, variant in first.items()}
    except DttError as error:
        yield Finding("records", False, str(error))
        return
    prompts = sum(len(row["variants"]) for row in rows)
    yield Finding("records", True, f"{len(rows)} records make {prompts} prompts in the variants {', '.join(first)}")
    for name, prompt in shown.items():
        yield Finding(f"a prompt of {name}", True, prompt)


def _shown(messages: Sequence[dict[str, str]], model: str | None) -> str:
    if model is None:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return _renderer(model).render(messages).text


def _models() -> str:
    import lm_eval.models  # noqa: F401  its import is what registers models
    from lm_eval.api.registry import model_registry

    from dtt_plugin._startup import MODELS

    missing = [name for name in MODELS if name not in model_registry]
    if missing:
        raise DttError(
            f"lm-eval does not know {', '.join(missing)}: the start-up hook did not run; reinstall dtt-plugin with pip"
            " (its dtt_plugin.pth belongs into site-packages)."
        )
    return ", ".join(MODELS)


def _tasks() -> str:
    from lm_eval.tasks import TaskManager

    names = [name for name in TaskManager().all_tasks if name.startswith(("alpacafarm_injection", "injection_"))]
    if len(names) < 9:
        raise DttError("lm-eval does not list the injection tasks; reinstall dtt-plugin with pip.")
    return ", ".join(names)


def _imports(model: str, extra: str) -> str:
    """Import the engine in a process of its own: a broken one may abort instead of raising."""
    code = f"import lm_eval.models; from lm_eval.api.registry import get_model; get_model({model!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise DttError(f"--model {model} does not import: {reason} (the extra dtt-plugin[{extra}] installs its engine)")
    return f"--model {model} imports"


def _route(model: str) -> str:
    """Say whether vLLM can have DefensiveTokens beside the model; the engine is asked in a process of its own."""
    from dtt_plugin.serving.placing import route

    code = "from dtt_plugin.serving.hooks import problem; print(problem() or '')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    obstacle = (result.stdout.strip().splitlines() or [""])[-1] if not result.returncode else "vLLM does not import."
    return f"{model}: {f'baked: {obstacle}' if obstacle else route(model)}"


def _data() -> str:
    from dtt_plugin.data.records import (
        RECORDS_FILE,
        SENTENCES_FILE,
        data_file,
        data_folder,
        load_records,
        load_sentences,
    )

    records = load_records(data_file(RECORDS_FILE))
    load_sentences(data_file(SENTENCES_FILE))
    return f"{len(records)} records and the attack sentences in {data_folder()} match their digests"


def _tokens(tokens: str, tokens_model: str | None, model: str | None) -> str:
    from dtt_plugin.checkpoint.opening import open_checkpoint
    from dtt_plugin.tokens.files import load_tokens

    loaded = load_tokens(Path(tokens), model=tokens_model)
    summary = f"{loaded.k} tokens of width {loaded.width}, {loaded.method}, for {loaded.model}"
    if model is None:
        return summary
    width = open_checkpoint(model, need="embeddings").input_embedding().shape[1]
    if width != loaded.width:
        raise DttError(
            f"{summary}: {model} has width {width}; transfer the tokens with `dtt align` and `dtt transfer`."
        )
    return f"{summary}; fits {model}"


@cache
def _renderer(model: str) -> PromptRenderer:
    from dtt_plugin.prompt.formats import MODEL_FORMAT
    from dtt_plugin.prompt.hf_tokenizer import hf_tokenizer
    from dtt_plugin.prompt.renderer import PromptRenderer, model_template

    try:
        tokenizer = hf_tokenizer(model)
    except ImportError as error:
        raise DttError("Checking a chat template needs transformers: pip install 'dtt-plugin[hf]'.") from error
    return PromptRenderer(tokenizer, prompt_format=MODEL_FORMAT, model_template=model_template(tokenizer), defenses=())


def _template(model: str) -> str:
    renderer = _renderer(model)
    prompt = renderer.render([{"role": "system", "content": "instruction"}, {"role": "user", "content": "data"}])
    return f"{model} renders system and user roles in {len(renderer.encode(prompt.text))} tokens"
