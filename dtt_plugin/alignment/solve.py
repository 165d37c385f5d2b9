"""From two checkpoints to a checked alignment."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dtt_plugin.alignment.anchors import Anchors, choose_anchors, read_anchors_file
from dtt_plugin.alignment.cache import AlignmentCache, matrix_digests
from dtt_plugin.alignment.engine import Engine, choose_engine
from dtt_plugin.alignment.heldout import HeldOut, hold_out
from dtt_plugin.alignment.linear import fit_linear
from dtt_plugin.alignment.moments import Moments, Side, measure
from dtt_plugin.alignment.options import AlignmentOptions
from dtt_plugin.alignment.polar import Polar, polar_factor
from dtt_plugin.alignment.report import AlignmentReport, MapFigures
from dtt_plugin.alignment.result import Alignment
from dtt_plugin.alignment.workers import one_thread_per_call
from dtt_plugin.checkpoint.opening import Checkpoint
from dtt_plugin.checkpoint.vocabulary import load_vocabulary, vocabulary_digest
from dtt_plugin.costs import peak_memory_mb
from dtt_plugin.errors import DttError
from dtt_plugin.files.digests import sha256_bytes, sha256_json
from dtt_plugin.progress import Bar

_SLOW_WIDTH = 1500
# Changes when the same input would give another alignment or another report.
_VERSION = 2


@dataclass(frozen=True)
class _Job:
    """One target, with what identifies the work to be done."""

    target: Checkpoint
    source_sha256: str
    target_sha256: str
    key: str
    same: bool
    """Source and target are the same matrix with the same vocabulary."""


def align(
    source: Checkpoint,
    target: Checkpoint,
    options: AlignmentOptions | None = None,
    *,
    device: str = "auto",
    cache: AlignmentCache | None = None,
    progress: bool = False,
) -> Alignment:
    """Align the embedding space of `source` to that of `target`. See `align_many`."""
    return align_many(source, [target], options, device=device, cache=cache, progress=progress)[0]


def align_many(
    source: Checkpoint,
    targets: Sequence[Checkpoint],
    options: AlignmentOptions | None = None,
    *,
    device: str = "auto",
    cache: AlignmentCache | None = None,
    progress: bool = False,
) -> list[Alignment]:
    """Align one source to several targets; the source is read once.

    Args:
        source: whose input embedding, [rows, d_s], is mapped.
        targets: each with an input embedding [rows, d_t].
        options: what to align by; the defaults where not given.
        device: "auto", "cpu" or "cuda".
        cache: where solved alignments are kept; None solves in any case.
        progress: show a bar on stderr for what takes longer than two seconds.

    Returns:
        One alignment per target, in their order.

    Raises:
        DttError: checkpoints that can't be read or don't fit together.
    """
    options = options or AlignmentOptions()
    for target in targets:
        _check_widths(source, target, options)
    if cache is None:
        with one_thread_per_call():
            # Nothing depends on the digests before W is there.
            identify = partial(_jobs, source, targets, options, None, at_once=1)
            return _solve(source, targets, identify, options, device, progress=progress)
    started = time.perf_counter()
    jobs = _jobs(source, targets, options, cache, progress=progress)
    digest_seconds = time.perf_counter() - started
    with cache.locked([job.key for job in jobs]):
        found = [cache.load(job.key) for job in jobs]
        todo = [job for job, alignment in zip(jobs, found, strict=True) if alignment is None]
        with one_thread_per_call() if todo else contextlib.nullcontext():
            missing = [job.target for job in todo]
            solved = iter(_solve(source, missing, lambda: todo, options, device, progress=progress))
        results = []
        for job, alignment in zip(jobs, found, strict=True):
            if alignment is None:
                alignment = next(solved)
                cache.store(job.key, alignment)
                seconds = {"digests": digest_seconds, **alignment.seconds}
                alignment = replace(alignment, seconds=seconds)
            else:
                # The content is the same; the names are those of this call.
                report = replace(alignment.report, source_model=source.name, target_model=job.target.name)
                alignment = replace(alignment, report=report, cached=True)
            results.append(alignment)
    return results


def _check_widths(source: Checkpoint, target: Checkpoint, options: AlignmentOptions) -> None:
    d_s, d_t = source.input_embedding().shape[1], target.input_embedding().shape[1]
    if d_s != d_t and not options.allow_width_change:
        raise DttError(
            f"The embedding of {source.name} is {d_s} wide and that of {target.name} {d_t} wide; a "
            "map between different widths has to be asked for with --allow-width-change."
        )


def _jobs(
    source: Checkpoint,
    targets: Sequence[Checkpoint],
    options: AlignmentOptions,
    cache: AlignmentCache | None,
    *,
    at_once: int = 2,
    progress: bool = False,
) -> list[_Job]:
    embeddings = [checkpoint.input_embedding() for checkpoint in (source, *targets)]
    digests = matrix_digests(embeddings, cache, at_once=at_once, progress=progress)
    vocabularies = [
        "" if options.match == "rows" else vocabulary_digest(checkpoint) for checkpoint in (source, *targets)
    ]
    known = asdict(options)
    if options.anchors_file is not None:
        known["anchors_file"] = sha256_bytes(read_anchors_file(Path(options.anchors_file)))
    contents = [
        [digest, embedding.dtype, embedding.shape, vocabulary]
        for digest, embedding, vocabulary in zip(digests, embeddings, vocabularies, strict=True)
    ]
    return [
        _Job(target, digests[0], digest, sha256_json([_VERSION, contents[0], content, known]), content == contents[0])
        for target, digest, content in zip(targets, digests[1:], contents[1:], strict=True)
    ]


def _solve(
    source: Checkpoint,
    targets: Sequence[Checkpoint],
    identify: Callable[[], Sequence[_Job]],
    options: AlignmentOptions,
    device: str,
    *,
    progress: bool,
) -> list[Alignment]:
    """Solve for all targets in one pass over the source.

    `identify` returns their jobs. It runs beside the steps that take one thread, and so costs no time where there is a
    second.
    """
    if not targets:
        return []
    started = time.perf_counter()
    by_token = options.match == "tokens"
    source_side = Side(source.name, source.input_embedding(), load_vocabulary(source) if by_token else None)
    pairs = []
    for target in targets:
        vocabulary = load_vocabulary(target) if by_token else None
        side = Side(target.name, target.input_embedding(), vocabulary)
        anchors = choose_anchors(source_side.vocabulary, vocabulary, source_side.embedding, side.embedding, options)
        pairs.append((side, anchors))
    width = source_side.embedding.shape[1]
    work = max(len(anchors.source_rows) * width * side.embedding.shape[1] for side, anchors in pairs)
    bfloat16 = all(side.embedding.dtype == "BF16" for side in (source_side, *(side for side, _ in pairs)))
    engine = choose_engine(device, multiplications=work, bfloat16=bfloat16)
    vocabulary_seconds = time.perf_counter() - started
    moments = measure(source_side, pairs, options, engine, progress=progress)
    stream_seconds = time.perf_counter() - started - vocabulary_seconds
    alignments = []
    # Two steps per target, each of several seconds from this width on.
    hidden = not progress or max(min(side.embedding.shape[1], width) for side, _ in pairs) < _SLOW_WIDTH
    with (
        Bar(total=2 * len(pairs), desc="solving", unit="step", leave=False, disable=hidden) as bar,
        ThreadPoolExecutor(1, thread_name_prefix="dtt-identify") as beside,
    ):
        jobs = beside.submit(identify)
        for number, (side, anchors) in enumerate(pairs):
            seconds = {"vocabulary": vocabulary_seconds, "stream": stream_seconds}
            of = partial(_nth, jobs, number)
            alignment = _finish(source_side, side, anchors, moments.pop(0), of, options, engine, bar)
            seconds |= alignment.seconds
            costs = {"align_seconds": sum(seconds.values()), "peak_memory_mb": peak_memory_mb()}
            alignments.append(replace(alignment, seconds=seconds, costs=costs))
    return alignments


def _nth(jobs: Future[Sequence[_Job]], number: int) -> _Job:
    return jobs.result()[number]


def _finish(
    source: Side,
    target: Side,
    anchors: Anchors,
    moments: Moments,
    identified: Callable[[], _Job],
    options: AlignmentOptions,
    engine: Engine,
    bar: Any,
) -> Alignment:
    """Solve for W and measure it."""
    started = time.perf_counter()
    held: HeldOut | None = None
    if options.method == "procrustes":
        polar = polar_factor(moments.M, engine)
        job = identified()
        if job.same:
            polar = replace(polar, W=np.eye(len(moments.M)), orthogonality_error=0.0)
        W, figures = polar.W, _figures(moments, polar, same=job.same)
        solve_seconds = time.perf_counter() - started
        bar.update()
        if len(moments.held_source):
            held = hold_out(moments.M, polar, moments.held_source, moments.held_target, engine, seed=options.seed)
    else:
        linear = fit_linear(options.method, moments, engine, seed=options.seed)
        W, figures, held = linear.W, linear.figures, linear.held_out
        job = identified()
        solve_seconds = time.perf_counter() - started
        bar.update()
    bar.update()
    report = AlignmentReport(
        method=options.method,
        source_model=source.model,
        target_model=target.model,
        source_sha256=job.source_sha256,
        target_sha256=job.target_sha256,
        source_shape=source.embedding.shape,
        target_shape=target.embedding.shape,
        source_dtype=source.embedding.dtype,
        target_dtype=target.embedding.dtype,
        same_model=job.same,
        shared_tokens=anchors.n_shared,
        shared_share=anchors.share,
        anchors=len(anchors.source_rows),
        special_left_out=anchors.special_left_out,
        **vars(figures),
        scale_applied=options.scale,
        held_out=held,
        warnings=_warnings(anchors, figures, options, held, job),
        options=options,
        engine=engine.name,
    )
    seconds = {
        "solve": solve_seconds,
        "diagnostics": time.perf_counter() - started - solve_seconds,
    }
    return Alignment(W, report, moments.source_mean, moments.target_mean, seconds)


def _figures(moments: Moments, polar: Polar, *, same: bool) -> MapFigures:
    """Return what follows from the sums alone: no second pass over the embeddings.

    Args:
        moments: sums over the anchors.
        polar: of their M.
        same: both sides are one matrix and W is the identity, so tr(W^T M) is known without the products' rounding.
    """
    W = polar.W
    d_s, d_t = W.shape
    overlap = moments.source_square if same else float(np.vdot(W, moments.M))  # tr(W^T M)
    residual = np.sqrt(max(moments.source_square + moments.target_square - 2 * overlap, 0.0))
    # Where the width shrinks, the residual is that of the way back, which alone keeps lengths.
    reference = moments.target_square if d_s <= d_t else moments.source_square
    return MapFigures(
        residual=float(residual),
        relative_residual=float(residual / np.sqrt(reference)),
        orthogonality_error=polar.orthogonality_error,
        distance_from_identity=float(np.sqrt(max(1 - np.trace(W) / d_s, 0.0))) if d_s == d_t else None,
        rank=polar.rank,
        condition=polar.condition if np.isfinite(polar.condition) else None,
        gap=polar.gap,
        unique=polar.unique,
        dimensions=len(polar.singular_values),
        scale=overlap / moments.source_square,
    )


def _warnings(
    anchors: Anchors, figures: MapFigures, options: AlignmentOptions, held: HeldOut | None, job: _Job
) -> tuple[str, ...]:
    """Return what a user should know before relying on W."""
    warnings = []
    if job.same:
        identity = ": W is the identity" if options.method == "procrustes" else ""
        warnings.append(f"source and target are the same embedding and vocabulary{identity}")
    elif not figures.unique:
        rank, dimensions = figures.rank, figures.dimensions
        warnings.append(
            f"the anchors determine only {rank} of {dimensions} dimensions: W is not unique in the other "
            f"{dimensions - rank}"
        )
    if anchors.share < options.warn_share:
        warnings.append(
            f"only {anchors.share:.0%} of the smaller vocabulary is shared: the map rests on these tokens alone"
        )
    if held is None:
        warnings.append("no held-out figures: too few anchors to spare any")
    return tuple(warnings)
