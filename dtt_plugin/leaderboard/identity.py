"""What a results file tells of a model and of its prompts, beyond their names: everything that can change an answer.

Two runs are alike only where all of it agrees. What is known to change no answer is on a short list; whatever is
on no list sets runs apart, under its own name.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dtt_plugin.files.digests import sha256_bytes, sha256_json
from dtt_plugin.prompt.formats import TOKENS_SWITCH


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Where and how fast a model runs, not what it answers: differences are named, and runs stay in one table.
_HARMLESS = _names(
    """
    batch_size batch_sizes max_batch_size max_num_batched_tokens max_num_seqs num_concurrent max_retries timeout
    device device_map parallelize tensor_parallel_size data_parallel_size
    gpu_memory_utilization kv_cache_memory_bytes swap_space cpu_offload_gb low_cpu_mem_usage
    max_memory max_memory_per_gpu max_cpu_memory offload_folder
    baked cache_dir download_dir use_cache logits_cache local_files_only force_download disable_log_stats
    seed random_seed numpy_seed torch_seed
    """  # another seed draws other answers from the same model
)
# Arguments that say what the arm is, or that a fact below tells better.
_TOLD_ELSEWHERE = _names(
    """
    pretrained model path engine tokens tokens_model defense prompt_format early_decision
    dtype torch_dtype enable_thinking chat_template_args
    """
)
# What lm-eval's classes take for an argument that is not given.
_DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "autogptq": ("false",),
    "backend": ("default", "causal"),
    "baked": ("false",),
    "gptqmodel": ("false",),
    "load_in_4bit": ("false",),
    "load_in_8bit": ("false",),
    "lone_user": ("user",),
    "revision": ("main",),
    "tokenizer_mode": ("auto",),
    "truncation": ("false",),
    "truncation_side": ("left",),
    "trust_remote_code": ("false",),
    "untrusted_role": ("user",),
    "use_fast_tokenizer": ("true",),
}
# In `config`, beside the arguments: what is read elsewhere, or decides about no answer.
_CONFIG = _names(
    """
    model model_args model_dtype model_num_parameters model_revision model_sha dtt_plugin
    limit bootstrap_iters gen_kwargs fewshot_seed
    """
)
# In `config.dtt_plugin`: the arm, what is an attribute of a run, what says nothing about answers; and two digests that
# differ between arms since the DefensiveTokens stand in the template (the fingerprint tells whether they do otherwise).
_OWN_FACTS = _names(
    """
    fingerprint model revision weights defense tokens_sha256 tokens_method tokens_model tokens_source_model tokens_route
    prompt_format early_decision engine_arguments baked costs dtt_plugin versions machine
    chat_template_sha256 renderer_sha256
    """
)
_ENGINES = {"DttHF": "dtt_hf", "DttVLLM": "dtt_vllm", "HFLM": "hf", "VLLM": "vllm", "huggingface": "hf"}
_NOT_THE_PUBLISHED_MODEL = _names(
    """
    peft delta lora_local_path load_in_4bit load_in_8bit quantization quantization_config autogptq gptqmodel gguf_file
    subfolder hf_overrides
    """
)
# As chat templates write today's date.
_DATE = re.compile(
    r"\b(?:[A-Z][a-z]{2,5}day,? |[A-Z][a-z]{2}, )?"
    r"(?:\d{1,2}\.? [A-Z][a-z]{2,8},? \d{4}|[A-Z][a-z]{2,8}\.? \d{1,2}(?:st|nd|rd|th)?,? \d{4}"
    r"|\d{4}([-/.])\d\d\1\d\d|\d{1,2}([-/.])\d{1,2}\2\d{4}|\d{4}年\d{1,2}月\d{1,2}日)"
    r"(?:[T ]\d\d:\d\d(?::\d\d)?)?(?!\d)"
)
_LONGEST_LITERAL = 2000


@dataclass(frozen=True)
class Identity:
    """What tells one run from another besides its model's name, task, data, defense and tokens."""

    facts: Mapping[str, str] = field(default_factory=dict)
    """What can change an answer, by the name that a reader knows it by; what has its default is left out."""
    circumstances: Mapping[str, str] = field(default_factory=dict)
    """Where and with which versions it ran."""
    unknown: frozenset[str] = frozenset()
    """Facts of which the file can't tell: the base model's weights, for a defended checkpoint."""
    fingerprint: str = ""
    """Our wrappers' digest of all of it, the arm included; "" for another model class."""

    @property
    def as_published(self) -> bool:
        """Whether the model is what its name says: no adapter, no quantization."""
        return not self.facts.keys() & _NOT_THE_PUBLISHED_MODEL


def read_identity(results: Mapping[str, Any], task: str, *, baked: bool, frame: str = "") -> Identity:
    """Read what a results file tells.

    Args:
        results: the file.
        task: whose settings count.
        baked: the model is a defended checkpoint, which stands for its base model.
        frame: what stands around the messages of a prompt, where the samples tell.
    """
    config = _table(results.get("config"))
    own = _table(config.get("dtt_plugin"))
    engine_arguments = {name: value for name, value in _table(own.get("engine_arguments")).items() if value != "None"}
    arguments = {**engine_arguments, **parse_arguments(config.get("model_args"))}
    found: dict[str, Any] = {name: value for name, value in arguments.items() if name not in _TOLD_ELSEWHERE}
    if own:
        found.pop("add_bos_token", None)  # a second BOS, which the prompt format tells
    found |= {name: value for name, value in config.items() if name not in _CONFIG}
    # Counts differ from run to run.
    found |= {name: v for name, v in own.items() if name not in _OWN_FACTS and type(v) not in (int, float)}
    circumstances = {name: value for name, value in found.items() if name in _HARMLESS}
    circumstances |= {f"version of {name}": version for name, version in _versions(results, own).items()}
    circumstances["machine"] = own.get("machine")
    circumstances["early_decision"] = own.get("early_decision") or None
    facts = {name: value for name, value in found.items() if name not in _HARMLESS}
    facts |= {f"template argument {name}": value for name, value in _template_arguments(arguments).items()}
    facts["engine"] = _engine(config.get("model"))
    facts["dtype"] = _dtype(config.get("model_dtype")) or _dtype(arguments.get("dtype", arguments.get("torch_dtype")))
    facts |= _prompt_facts(results, config, task)
    facts["prompt frame"] = sha256_bytes(_DATE.sub("DATE", frame).encode("utf-8", "replace")) if frame else None
    unknown = {name for name in ("engine", "prompt frame") if not facts[name]}
    if baked:
        unknown |= {"weights", "revision", "parameters"}
    else:
        facts |= _weights(config, own, facts.pop("revision", None))
    fingerprint = own.get("fingerprint")
    return Identity(
        _canonical_table(facts),
        _canonical_table(circumstances),
        frozenset(unknown),
        fingerprint if isinstance(fingerprint, str) else "",
    )


def parse_arguments(given: Any) -> dict[str, Any]:
    """Return model arguments as a table; text is JSON, or `name=value,name=value` where a value may be JSON."""
    given = _plain(given) if isinstance(given, str) and given.lstrip().startswith("{") else given
    if isinstance(given, Mapping):
        return {str(name): value for name, value in given.items()}
    parts = _split(given) if isinstance(given, str) else []
    return {name.strip(): value.strip() for name, _, value in (part.partition("=") for part in parts) if name.strip()}


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes; what then has no `=` belongs to the value before it."""
    parts, depth, quote, start = [], 0, "", 0
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "," and depth <= 0:
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    whole: list[str] = []
    for part in parts:
        if "=" in part or not whole:
            whole.append(part)
        else:
            whole[-1] += f",{part}"
    return whole


def _template_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chat template's variables; `enable_thinking=` is one of them, as in lm-eval."""
    given = _plain(arguments.get("chat_template_args"))
    variables = dict(given) if isinstance(given, Mapping) else {} if given is None else {"chat_template_args": given}
    if (thinking := _plain(arguments.get("enable_thinking"))) is not None:
        variables["enable_thinking"] = thinking
    # Whether the DefensiveTokens stand in the prompt is what the arm is.
    return {str(name): value for name, value in variables.items() if name != TOKENS_SWITCH}


def _prompt_facts(results: Mapping[str, Any], config: Mapping[str, Any], task: str) -> dict[str, Any]:
    instruction = results.get("system_instruction")
    facts: dict[str, Any] = {"system instruction": instruction or results.get("system_instruction_sha")}
    task_config = _table(_table(results.get("configs")).get(task))
    shots = task_config.get("num_fewshot") or _table(results.get("n-shot")).get(task)
    if shots:
        facts |= {"few-shot examples": shots, "few-shot seed": config.get("fewshot_seed")}
        facts["few-shot as turns"] = results.get("fewshot_as_multiturn") or None
    facts["filters"] = task_config.get("filter_list")
    return facts


def _weights(config: Mapping[str, Any], own: Mapping[str, Any], revision: Any) -> dict[str, Any]:
    """Return which weights were loaded: a commit or the state of a folder; where neither is known, the revision."""
    if state := own.get("weights"):
        return {"weights": state if isinstance(state, str) else sha256_json(state)}
    revision = own.get("revision") or revision or config.get("model_revision")
    parameters = None if own else config.get("model_num_parameters")  # ours grow by the tokens
    return {"revision": revision, "weights": config.get("model_sha") or None, "parameters": parameters}


def _engine(name: Any) -> str | None:
    """Return the model class; None where lm-eval was given a loaded model, whose name stands in its place."""
    name = _ENGINES.get(name, name) if isinstance(name, str) else ""
    return name if re.fullmatch(r"[a-z][\w.\-]*", name) else None


def _dtype(value: Any) -> str | None:
    name = value.removeprefix("torch.").lower() if isinstance(value, str) else ""
    return None if name in ("", "auto", "none") else name


def _versions(results: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    names = ("lm_eval_version", "transformers_version")
    stock = {name.removesuffix("_version"): results.get(name) for name in names}
    return {**stock, **_table(own.get("versions")), "dtt_plugin": own.get("dtt_plugin")}


def _canonical_table(facts: Mapping[str, Any]) -> dict[str, str]:
    table: dict[str, str] = {}
    for name, value in facts.items():
        text = canonical(value)
        if text and text not in _DEFAULTS.get(name, ()):
            table[name] = text
    return table


def canonical(value: Any) -> str:
    """Return a value as text that is the same for `True`, "true" and `"True"`, for 1, "1" and 1.0; "" for none."""
    value = _plain(value)
    if isinstance(value, str):
        return value
    if value in (None, {}, []):
        return ""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    """Return what a text stands for: true, false, none, a number, a table; other text as it is."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    if re.fullmatch(r"[+-]?\d{1,15}(\.\d{1,15})?", text):
        return _plain(float(text))
    if text.startswith(("{", "[")) and len(text) <= _LONGEST_LITERAL:
        for parse in (json.loads, ast.literal_eval):
            try:
                return _plain(parse(text))
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
    return text


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
