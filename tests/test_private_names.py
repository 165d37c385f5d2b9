"""The private names of other packages that this one touches, one test each: an upgrade that moves one fails in words.

CONTRIBUTING.md tells what to do then. A name belongs here if its package does not document it, or if it is documented
and we replace it or rely on more than its documentation says.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any, NamedTuple

import pytest

from dtt_plugin.model_wrappers.vllm_import import import_vllm_class
from dtt_plugin.serving.hooks import HOOKS
from tests.conftest import ROOT


class PrivateName(NamedTuple):
    """One name, and what about it this package relies on."""

    name: str
    """module:attribute.attribute"""
    parameters: tuple[str, ...]
    """That it must take, by these names; empty where it is no function or only its existence counts."""
    used_by: str
    """Our module."""
    what_for: str


NAMES = [
    PrivateName("lm_eval.tasks._index:TaskIndex.build", ("paths",), "_startup", "adds our task folder"),
    PrivateName("lm_eval.tasks._index:TaskIndex._iter_yaml_files", ("root",), "tests/conftest", "index without theirs"),
    PrivateName("lm_eval.tasks._yaml_loader:load_yaml", ("path",), "tasks/utility/local", "lm-eval's task as it is"),
    PrivateName("lm_eval.api.registry:model_registry.register", ("target",), "_startup", "registers the dtt_ models"),
    PrivateName("lm_eval.api.model:hash_args", ("attr", "args"), "model_wrappers/defended", "keys of --use_cache"),
    PrivateName("lm_eval.api.model:CacheHook.add_partial", ("attr", "req", "res"), "model_wrappers/defended", "same"),
    PrivateName("lm_eval.models.utils:normalize_gen_kwargs", (), "model_wrappers/defended", "a request's max_gen_toks"),
    PrivateName(
        "lm_eval.models.huggingface:HFLM._model_generate",
        ("context", "max_length", "stop"),
        "model_wrappers/hf",
        "early decision, token counts",
    ),
    PrivateName(
        "lm_eval.models.huggingface:HFLM.tok_batch_encode", ("strings",), "model_wrappers/hf", "nothing is added or cut"
    ),
    PrivateName(
        "lm_eval.models.vllm_causallms:VLLM._model_generate",
        ("requests", "generate", "sampling_params"),
        "model_wrappers/vllm",
        "early decision, token counts",
    ),
    PrivateName(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward",
        ("lm_head", "skip_gather"),
        "vllm_plugin",
        "DefensiveTokens get the probability 0",
    ),
    PrivateName("vllm.config:get_current_vllm_config", (), "vllm_plugin", "the ids that config.json lists"),
    PrivateName("vllm.v1.engine.core:EngineCore.__init__", (), "vllm_plugin", "an engine ends with its parent"),
    PrivateName(
        "vllm.v1.engine.llm_engine:LLMEngine.step", (), "model_wrappers/early_decision", "responses token by token"
    ),
    PrivateName(
        "vllm.v1.engine.llm_engine:LLMEngine.add_request",
        ("request_id", "prompt", "params", "lora_request"),
        "model_wrappers/early_decision",
        "same",
    ),
    PrivateName(
        "vllm.v1.engine.llm_engine:LLMEngine.abort_request",
        ("request_ids",),
        "model_wrappers/early_decision",
        "ends a decided response",
    ),
    *(
        PrivateName(f"{module}:{path}", takes, "serving/hooks", "token files in an engine")
        for module, path, takes in HOOKS
    ),
    PrivateName("torch.nn.modules.module:_IncompatibleKeys", (), "training/soft_prompt", "loads the tokens alone"),
    PrivateName("torch.utils.collect_env:get_pip_packages", (), "sweep/worker", "asked once in a process"),
    PrivateName("transformers:TrainingArguments.n_gpu", (), "training/train", "one device: _n_gpu is set to 1"),
    PrivateName(
        "transformers.integrations.integration_utils:get_reporting_integration_callbacks",
        (),
        "training/train",
        "no reporting to a service that happens to be installed",
    ),
]


def found(name: PrivateName) -> Any:
    """Return the object of that name, or fail with the sentence that an upgrade needs."""
    module, _, path = name.name.partition(":")
    package = module.partition(".")[0]
    try:
        if module == "lm_eval.models.vllm_causallms":
            import_vllm_class()
        value: Any = importlib.import_module(module)
        for attribute in path.split("."):
            value = getattr(value, attribute)
    except (ImportError, AttributeError) as error:
        pytest.fail(
            f"{package} has moved {name.name} ({error}), which dtt_plugin/{name.used_by} needs ({name.what_for}): adapt"
            f" it, or lower the bound on {package} in pyproject.toml."
        )
    return value


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.name)
def test_a_private_name_is_where_and_what_it_was(name: PrivateName) -> None:
    value = found(name)
    if name.parameters:
        takes = inspect.signature(value).parameters
        missing = [parameter for parameter in name.parameters if parameter not in takes]
        assert not missing, (
            f"{name.name} no longer takes {', '.join(missing)} (it takes {', '.join(takes)}): adapt"
            f" dtt_plugin/{name.used_by} ({name.what_for})."
        )


@pytest.mark.parametrize(
    "gone", ["lm_eval.tasks._index:TaskIndex.build_all", "vllm.no_such_module:LLM", "transformers:NoSuchClass.x"]
)
def test_a_name_that_is_gone_is_told_in_a_sentence(gone: str) -> None:
    name = PrivateName(gone, (), "some_module", "something")
    with pytest.raises(pytest.fail.Exception, match=r"has moved .* which dtt_plugin/some_module needs .* lower the bo"):
        found(name)


def test_contributing_lists_each_name_once() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w.]+:[\w.]+)` \| `([\w/]+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted((name.name, name.used_by) for name in NAMES)
