"""The options of an alignment, with their defaults; the command line reads them from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dtt_plugin.errors import DttError

MapMethod = Literal["procrustes", "ridge", "relative", "whitened"]


@dataclass(frozen=True)
class AlignmentOptions:
    """How two embeddings are aligned. The defaults reproduce plain orthogonal Procrustes on all shared tokens."""

    method: MapMethod = "procrustes"
    """The orthogonal map, or one without that constraint (`dtt_plugin.alignment.linear`)."""
    match: Literal["tokens", "rows"] = "tokens"
    """What pairs the rows: the token they stand for, or their number."""
    anchors: int | None = None
    """Use a seeded sample of this many shared tokens instead of all."""
    anchors_file: str | None = None
    """Use only the tokens in this file: one per line as text, or a JSON list of strings."""
    weight: Literal["none", "norm"] = "none"
    """`norm` divides every row by its length first, so that each token counts the same."""
    center: bool = False
    """Subtract both means first; the map is then x -> (x - mean_s) W + mean_t."""
    scale: bool = False
    """Apply the Procrustes scale factor when tokens are transferred (it is reported in any case)."""
    allow_width_change: bool = False
    """Accept embeddings of different widths; W is then semi-orthogonal."""
    holdout: float = 0.05
    """Share of the anchors on which the diagnostics are measured, 0..0.5; W itself uses all anchors."""
    holdout_most: int = 1000
    """Most anchors held out; more make the figures hardly sharper."""
    holdout_fewest: int = 20
    """With fewer there are no held-out figures."""
    warn_share: float = 0.5
    """Warn where the shared tokens are less than this share of the smaller vocabulary."""
    seed: int = 0
    """Of the sample, the held-out share and the random-rotation null."""

    def __post_init__(self) -> None:
        if self.method not in get_args(MapMethod):
            raise DttError(f"method={self.method!r} is not one of {', '.join(get_args(MapMethod))}.")
        if self.match not in ("tokens", "rows"):
            raise DttError(f"match={self.match!r} is neither 'tokens' nor 'rows'.")
        if self.weight not in ("none", "norm"):
            raise DttError(f"weight={self.weight!r} is neither 'none' nor 'norm'.")
        if self.anchors is not None and self.anchors < 1:
            raise DttError(f"anchors={self.anchors} must be a positive number.")
        if not 0 <= self.holdout <= 0.5:
            raise DttError(f"holdout={self.holdout} must lie between 0 and 0.5.")
        if self.seed < 0:
            raise DttError(f"seed={self.seed} must not be negative.")
        if self.match == "rows" and self.anchors_file is not None:
            raise DttError("An anchors file lists tokens, so it can't be used with --match rows.")
