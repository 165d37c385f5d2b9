"""What is known of an alignment beside its matrix; a mapping only where it is read or written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dtt_plugin.alignment.heldout import HeldOut, Retrieval
from dtt_plugin.alignment.options import AlignmentOptions

# The one name that Python keeps for itself.
_IN_JSON = {"penalty": "lambda"}


@dataclass(frozen=True, kw_only=True)
class MapFigures:
    """What follows from the sums over the anchors alone."""

    residual: float
    """||X W - Y||_F; where the width shrinks, that of the way back, which alone keeps lengths."""
    relative_residual: float
    """The residual, divided by the norm of what it is measured against."""
    orthogonality_error: float
    """||W^T W - I||_F, or ||W W^T - I||_F where W has fewer rows than columns."""
    distance_from_identity: float | None
    """||W - I||_F / sqrt(2 d): 0 for the identity, 1 for a random rotation; None where the widths differ."""
    rank: int
    """Of the matrix that the method inverts."""
    condition: float | None
    """Of that matrix; None where it is infinite."""
    gap: float
    """The smallest singular value or eigenvalue within the rank, as a share of the largest."""
    unique: bool
    """Whether the anchors determine W."""
    dimensions: int
    """Number of singular values or eigenvalues."""
    scale: float
    """The factor by which x W would come nearest to its target."""
    penalty: float | None = None
    """The ridge, in the unit of the Gram matrix; None where the method has none. `lambda` in files."""


@dataclass(frozen=True, kw_only=True)
class AlignmentReport(MapFigures):
    """What a map is and how good."""

    method: str
    """See `AlignmentOptions.method`."""
    source_model: str
    target_model: str
    source_sha256: str
    """Of the input embedding's bytes as they are stored."""
    target_sha256: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    source_dtype: str
    """As safetensors names it."""
    target_dtype: str
    same_model: bool
    """Both have the same embedding and the same vocabulary."""
    shared_tokens: int
    shared_share: float
    """Of the smaller vocabulary."""
    anchors: int
    special_left_out: tuple[str, ...]
    """Special tokens that both have and that are no anchors."""
    scale_applied: bool
    """Whether `Alignment.apply` multiplies by `scale`."""
    held_out: HeldOut | None
    """None where there were too few anchors to spare any."""
    warnings: tuple[str, ...]
    """What a user should know before relying on W."""
    options: AlignmentOptions
    engine: str

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; a method without a penalty has no `lambda`."""
        table = {_IN_JSON.get(name, name): value for name, value in asdict(self).items()}
        if self.method == "procrustes":
            del table["lambda"]
        return table

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> AlignmentReport:
        """Return the report that `to_json` made a table of.

        Raises:
            KeyError: of a name that is missing.
            TypeError, ValueError: of a value that is none.
        """
        # What files from before the other methods don't say.
        dimensions = min(table["source_shape"][1], table["target_shape"][1])
        values = {"method": "procrustes", "dimensions": dimensions, "lambda": None, **table}
        values = {field.name: values[_IN_JSON.get(field.name, field.name)] for field in fields(cls)}
        for name in ("residual", "relative_residual", "orthogonality_error", "gap", "scale", "shared_share"):
            values[name] = float(values[name])
        for name in ("source_shape", "target_shape", "special_left_out", "warnings"):
            values[name] = tuple(values[name])
        held = values["held_out"]
        if held is not None:
            both = {name: Retrieval(**held[name]) for name in ("aligned", "random_rotation")}
            values["held_out"] = HeldOut(**{**held, **both, "norm_retained": tuple(held["norm_retained"])})
        values["options"] = AlignmentOptions(**values["options"])
        return cls(**values)
