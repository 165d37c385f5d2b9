"""An alignment and its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.alignment.engine import Matrix
from dtt_plugin.alignment.report import AlignmentReport
from dtt_plugin.arrays import Float, Float64
from dtt_plugin.checkpoint.tensors import read_header, write_safetensors
from dtt_plugin.costs import recorded_costs
from dtt_plugin.errors import DttError
from dtt_plugin.files.replacing import replacing
from dtt_plugin.public_names import public_name, public_text

FORMAT = "dtt.alignment/1"
_WIDEST = 1 << 14
# Repeated as metadata of their own, so that a reader needs no JSON for them.
REPORTED = (
    "source_model",
    "target_model",
    "source_sha256",
    "target_sha256",
    "anchors",
    "residual",
    "relative_residual",
    "orthogonality_error",
)


@dataclass(frozen=True)
class Alignment:
    """The map from one model's embedding space to another's: x -> scale (x - source_mean) W + target_mean."""

    W: Float64[Matrix, "d_s d_t"]
    """(d_s, d_t), float64: (semi-)orthogonal by Procrustes, any matrix by the other methods."""
    report: AlignmentReport
    """What the map is and how good."""
    source_mean: Float64[Matrix, " d_s"] | None = None
    """(d_s,), where the alignment is centred."""
    target_mean: Float64[Matrix, " d_t"] | None = None
    """(d_t,)"""
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    """How long each stage took in this run; not stored."""
    costs: dict[str, float] = field(default_factory=dict, compare=False)
    """What solving it took: align_seconds, peak_memory_mb; also where it comes from the cache."""
    cached: bool = field(default=False, compare=False)
    """Whether it was taken from the cache."""

    @property
    def method(self) -> str:
        """How W was found, see `AlignmentOptions.method`."""
        return self.report.method

    @property
    def source_model(self) -> str:
        """Whose tokens it takes."""
        return self.report.source_model

    @property
    def target_model(self) -> str:
        """Whose space it leads to."""
        return self.report.target_model

    def apply(self, rows: Float[NDArray[Any], "k d_s"]) -> Float64[Matrix, "k d_t"]:
        """Map `rows`, (k, d_s), to the target's space: (k, d_t), float64.

        Raises:
            DttError: the rows have another width than the source.
        """
        if rows.shape[1] != self.W.shape[0]:
            raise DttError(
                f"The rows are {rows.shape[1]} wide and the alignment starts from {self.source_model}, whose "
                f"embedding is {self.W.shape[0]} wide; use the alignment of the model that the tokens belong to."
            )
        moved = np.asarray(rows, np.float64)
        if self.source_mean is not None:
            moved = moved - self.source_mean
        moved = moved @ self.W
        if self.report.scale_applied:
            moved = moved * self.report.scale
        if self.target_mean is not None:
            moved = moved + self.target_mean
        return moved


def save_alignment(path: str | Path, alignment: Alignment, *, with_costs: bool = False) -> None:
    """Write `alignment` to a safetensors file, atomically; the same alignment gives the same bytes.

    Args:
        path: the file.
        alignment: what to write.
        with_costs: note what solving took as well, which is never twice the same.

    Raises:
        DttError: the file can't be written.
    """
    tensors: dict[str, Matrix] = {"W": alignment.W}
    if alignment.source_mean is not None and alignment.target_mean is not None:
        tensors["source_mean"], tensors["target_mean"] = alignment.source_mean, alignment.target_mean
    report = _public(alignment.report).to_json()
    metadata: dict[str, str] = {
        "format": FORMAT,
        "report": json.dumps(report, sort_keys=True),
        "sha256": _digest(tensors),
    }
    metadata |= {name: str(report[name]) for name in REPORTED}
    if with_costs:
        metadata |= {name: str(cost) for name, cost in alignment.costs.items()}
    with replacing(Path(path)) as temporary:
        write_safetensors(temporary, tensors, metadata)


def _public(report: AlignmentReport) -> AlignmentReport:
    """Return the report without paths of this machine."""
    options = report.options
    if options.anchors_file is not None:
        options = replace(options, anchors_file=public_text(options.anchors_file))
    source, target = public_name(report.source_model), public_name(report.target_model)
    return replace(report, source_model=source, target_model=target, options=options)


def load_alignment(path: str | Path) -> Alignment:
    """Read an alignment file.

    Raises:
        DttError: not an alignment file, or a damaged one.
    """
    path = Path(path)
    located, metadata = read_header(path)
    if metadata.get("format") != FORMAT or "W" not in located or "report" not in metadata:
        raise DttError(f"{path} is not an alignment file ({FORMAT}); make one with `dtt align`.")
    names: tuple[str, ...] = ("W", "source_mean", "target_mean")
    known = {name: located[name] for name in names if name in located}
    shape = known["W"].shape
    shapes = {"W": shape, "source_mean": shape[:1], "target_mean": shape[1:]}
    if len(shape) != 2 or any(t.dtype != "F64" or t.shape != shapes[name] for name, t in known.items()):
        raise DttError(f"{path}: W and the means don't have matching float64 shapes; the file is damaged.")
    if max(shape) > _WIDEST:
        raise DttError(f"{path}: W is {shape[0]} x {shape[1]}, wider than any model; the file is damaged.")
    tensors: dict[str, Matrix] = {name: location.read() for name, location in known.items()}
    if metadata.get("sha256") != _digest(tensors):
        raise DttError(f"{path}: the values don't match the digest in the file; make it again with `dtt align`.")
    try:
        report = AlignmentReport.from_json(json.loads(metadata["report"]))
    except KeyError as error:
        raise DttError(f"{path}: its report lacks {error.args[0]}; make it again with `dtt align`.") from error
    except (ValueError, TypeError, LookupError, DttError) as error:
        raise DttError(f"{path}: its report is not readable; make it again with `dtt align`.") from error
    means = tensors.get("source_mean"), tensors.get("target_mean")
    return Alignment(tensors["W"], report, *means, costs=recorded_costs(metadata))


def _digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the little-endian values of all tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(np.ascontiguousarray(tensor, "<f8").data)
    return digest.hexdigest()
