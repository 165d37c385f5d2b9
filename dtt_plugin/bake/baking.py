"""Baking: a base model's files plus DefensiveTokens make a defended checkpoint."""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt_plugin.bake.check_tokenizer import check_tokenizer
from dtt_plugin.bake.manifest import card, manifest_of, write_manifest
from dtt_plugin.bake.options import BakeOptions
from dtt_plugin.bake.plan import BakePlan, make_plan
from dtt_plugin.bake.template import defended_templates, unprotected_markers
from dtt_plugin.bake.tokenizer import TokenizerFiles
from dtt_plugin.bake.verify import verify
from dtt_plugin.bake.weights import write_overlay, write_weights
from dtt_plugin.checkpoint.defended import IDS_KEY, is_defended_checkpoint
from dtt_plugin.checkpoint.families import text_configs
from dtt_plugin.checkpoint.folder import check_within, read_json_table
from dtt_plugin.checkpoint.opening import Checkpoint, open_checkpoint
from dtt_plugin.costs import peak_memory_mb, recorded_costs
from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import sync
from dtt_plugin.files.staging import check_free, staged
from dtt_plugin.prompt.formats import DEFAULT_TEMPLATE, check_format
from dtt_plugin.tokens.files import DefensiveTokens

# Files that engines read besides weights and tokenizer; small, so they are copied.
_CARRIED_ENDINGS = frozenset({".json", ".txt", ".model", ".py", ".tiktoken", ".jinja"})
_CARRIED_NAMES = frozenset({"LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md"})
_LARGEST_CARRIED = 256 << 20
# transformers' processors would take this older file's template instead of the defended one; where Mistral's own
# files lie beside tokenizer.json, transformers and vLLM take these, which know no DefensiveTokens.
_LEFT_OUT = re.compile(r"chat_template\.json|tekken\.json|params\.json|tokenizer\.model\.v.*|consolidated.*")
# What transformers takes where a generation config has no `top_k`, so that there nothing changes.
_TOP_K = 50


@dataclass(frozen=True)
class BakeReport:
    """What baking did."""

    folder: Path
    """The defended checkpoint."""
    base_model: str
    base_revision: str | None
    token_ids: tuple[int, ...]
    token_names: tuple[str, ...]
    rows: int
    """Rows of the input embedding, the new `vocab_size`."""
    base_rows: int
    untied: bool
    """The base model's output head was its input embedding; the result has a head of its own."""
    prompt_format: str
    default_on: bool
    trust_assistant: bool
    plain_text_markers: tuple[str, ...]
    """Markers between messages that are no tokens of the model; `formats.protection` says what that means."""
    changed_tensors: tuple[str, ...]
    bytes_written: int
    """Of weight files that were not linked."""
    bytes_linked: int
    verified: bool
    seconds: float


def bake(
    model: str,
    tokens: DefensiveTokens,
    out: Path,
    options: BakeOptions | None = None,
    *,
    force: bool = False,
) -> BakeReport:
    """Write a defended checkpoint: the base model with DefensiveTokens as tokens of its own.

    Only files with a changed tensor are written; the others are linked. The folder appears at its name when
    it is complete (and verified), or not at all.

    Args:
        model: the base model: a folder or a hub id.
        tokens: (k, d), in the base model's embedding space.
        out: the folder to make; not the base model's, and not inside it.
        options: how; the defaults where not given.
        force: replace the defended checkpoint that is at `out`.

    Raises:
        DttError: the tokens don't fit the model, the model can't be defended this way, `out` may not be
            written, or the disk is full.
    """
    started = time.perf_counter()
    options = options or BakeOptions()
    out = Path(out).expanduser()
    check_free(out, force=force, replaceable=is_defended_checkpoint)
    checkpoint = open_checkpoint(model, revision=options.revision, need="all")
    _check_apart(checkpoint.folder, out)
    if not checkpoint.config():
        raise DttError(f"{checkpoint.folder} has no config.json; download the whole model.")
    tokenizer = TokenizerFiles(checkpoint.folder)
    plan = make_plan(checkpoint, tokens, tokenizer, reuse_reserved=options.reuse_reserved)
    prompt_format = check_format(options.prompt_format or tokens.prompt_format)
    templates = defended_templates(
        tokenizer,
        prompt_format,
        k=tokens.k,
        default_on=options.default_on,
        system_in_user=options.system_in_user,
        trust_assistant=options.trust_assistant,
    )
    plain_markers = unprotected_markers(tokenizer, prompt_format)
    with (
        staged(out, force=force, replaceable=is_defended_checkpoint) as folder,
        ThreadPoolExecutor(1, thread_name_prefix="dtt-sync") as disk,
    ):
        # What is small comes first: a model that can't be defended is refused before its weights are written.
        _carry_over(checkpoint, folder)
        _write_config(plan, folder)
        _write_generation_config(plan, folder)
        tokenizer.write_defended(folder, plan.names, plan.token_ids, templates, keep_bos=options.keep_bos)
        check_tokenizer(
            tokenizer,
            folder,
            names=plan.names,
            token_ids=plan.token_ids,
            templates=templates,
            keep_bos=options.keep_bos,
        )
        how = (write_overlay if options.overlay else write_weights)(plan, folder, copy=options.copy)
        # The disk writes while the rest is made and verified.
        synced = disk.map(sync, [folder / name for name in how if how[name] in ("written", "copied")])
        (folder / "README.md").write_text(
            card(plan, options, prompt_format=prompt_format, plain_markers=plain_markers), encoding="utf-8"
        )
        digests = verify(plan, folder) if options.verify else {}
        list(synced)  # or a full disk is said here
        manifest = manifest_of(
            plan,
            options,
            prompt_format=prompt_format,
            plain_markers=plain_markers,
            template=templates[DEFAULT_TEMPLATE],
            tensor_digests=digests,
            how=how,
        )
        costs = recorded_costs(tokens.metadata) | {"bake_seconds": time.perf_counter() - started}
        costs["peak_memory_mb"] = max(peak_memory_mb(), costs.get("peak_memory_mb", 0))
        write_manifest(folder, {**manifest, "costs": costs}, plan)
        sizes = {name: (folder / name).stat().st_size for name in how}
    written = sum(size for name, size in sizes.items() if how[name] in ("written", "copied"))
    return BakeReport(
        folder=out,
        base_model=model,
        base_revision=checkpoint.revision,
        token_ids=plan.token_ids,
        token_names=plan.names,
        rows=plan.n_rows,
        base_rows=plan.changes[0].source.shape[0],
        untied=plan.untie,
        prompt_format=prompt_format,
        default_on=options.default_on,
        trust_assistant=options.trust_assistant,
        plain_text_markers=tuple(plain_markers),
        changed_tensors=tuple(change.name for change in plan.changes),
        bytes_written=written,
        bytes_linked=sum(sizes.values()) - written,
        verified=options.verify,
        seconds=time.perf_counter() - started,
    )


def _check_apart(source: Path, out: Path) -> None:
    """Refuse to write where the base model is read (that would destroy it), and paths that can't be noted."""
    for path in (source, out):
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise DttError(f"{str(path)!r} is not a path in UTF-8; rename it.") from error
    real_source, real_out = source.resolve(), out.resolve()
    if real_out == real_source:
        raise DttError(f"--out {out} is the base model's own folder; choose another one.")
    if real_source in real_out.parents:
        raise DttError(f"--out {out} lies inside the base model's folder; choose one outside.")
    if real_out in real_source.parents:
        raise DttError(f"The base model lies inside --out {out}; choose another --out.")


def _carry_over(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the small files that an engine may read; never other weights (pickles, consolidated files)."""
    for path in sorted(checkpoint.folder.iterdir()):
        wanted = path.suffix in _CARRIED_ENDINGS or path.name in _CARRIED_NAMES
        if not wanted or not path.is_file() or path.stat().st_size > _LARGEST_CARRIED:
            continue
        if _LEFT_OUT.fullmatch(path.name) or path.name.endswith(".index.json") or path.name.startswith("dtt_"):
            continue
        check_within(path, checkpoint.folder)
        if path.name == "processor_config.json":  # older ones hold a template, which goes before every file
            kept = {key: value for key, value in read_json_table(path).items() if key != "chat_template"}
            _write_table(folder / path.name, kept)
        else:
            shutil.copyfile(path, folder / path.name)


def _write_config(plan: BakePlan, folder: Path) -> None:
    config = copy.deepcopy(plan.checkpoint.config())
    tables = text_configs(config)
    for table in tables:
        if table is tables[-1] or "vocab_size" in table:
            table["vocab_size"] = plan.n_rows
        table["tie_word_embeddings"] = False  # in all, since an engine may read any
    config[IDS_KEY] = list(plan.token_ids)
    if plan.untie:
        _leave_head_unquantized(config.get("quantization_config"))
    _write_table(folder / "config.json", config)


def _leave_head_unquantized(quantization: Any) -> None:
    """Say that the new head is a plain matrix, where the quantization's own list says what is plain."""
    if not isinstance(quantization, dict):
        return
    for key in ("ignore", "modules_to_not_convert", "ignored_layers"):
        names = quantization.get(key)
        if isinstance(names, list) and "lm_head" not in names:
            names.append("lm_head")


def _write_generation_config(plan: BakePlan, folder: Path) -> None:
    """Have the engines leave DefensiveTokens out; nothing else of the model's own settings changes.

    transformers suppresses the ids. vLLM reads no ids from this file and does read `top_k`, which cuts
    DefensiveTokens off, since far more tokens than that are likelier (docs/checkpoints.md).
    """
    path = plan.checkpoint.folder / "generation_config.json"
    config = read_json_table(path, missing={})
    if not config:  # what transformers would have derived from config.json
        base = {**text_configs(plan.checkpoint.config())[-1], **plan.checkpoint.config()}
        keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        config = {key: base[key] for key in keys if base.get(key) is not None}
    suppressed, top_k = config.get("suppress_tokens") or [], config.get("top_k") or 0
    if not isinstance(suppressed, list) or any(type(value) is not int for value in (*suppressed, top_k)):
        raise DttError(f"{path}: suppress_tokens should list ids and top_k be a number; correct or remove them.")
    cut = {} if top_k > 0 else {"top_k": _TOP_K}
    ids = sorted({*suppressed, *plan.token_ids})
    _write_table(folder / "generation_config.json", {**config, **cut, "suppress_tokens": ids})


def _write_table(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
