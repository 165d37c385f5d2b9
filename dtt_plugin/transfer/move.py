"""Moving DefensiveTokens from one model's embedding space to another's, and the controls for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtt_plugin.alignment.engine import Matrix
from dtt_plugin.alignment.result import Alignment
from dtt_plugin.alignment.rotations import haar_rotation
from dtt_plugin.arrays import Float, Float64
from dtt_plugin.errors import DttError
from dtt_plugin.tokens.files import DefensiveTokens
from dtt_plugin.tokens.licence import inherited, origin_of
from dtt_plugin.tokens.methods import CONTROLS, MAPS

COPY_ABOVE = 0.99
"""Where all cosines between tokens before and after a map exceed this, the map is a copy on these tokens."""
COPY_NOTE = "this map is a copy on these tokens"
COSINES = "cosines_to_source"
"""In a moved file's metadata: the cosine of each token to what it was, where the widths are equal."""


def transfer(
    tokens: DefensiveTokens,
    alignment: Alignment | None,
    *,
    method: str | None = None,
    target_model: str | None = None,
    norm: str | float | None = None,
    native: DefensiveTokens | None = None,
    seed: int = 0,
) -> DefensiveTokens:
    """Return `tokens` moved to another model's embedding space.

    Args:
        tokens: (k, d_s).
        alignment: from the tokens' model to the target. Without one, `method` must be a control.
        method: the alignment's own (None) applies its map; "copy" takes the values as they are; "zero-pad" appends
            zeros, or cuts off what is too many; "random" applies a seeded random isometry in place of the map (in a
            narrower space: an isometry, cut).
        target_model: what the new tokens are for, where no alignment says it.
        norm: rescale every token: "source" to its length before, "native" to the mean length of `native`, a
            number to that length. None leaves the lengths to the map.
        native: the target's own tokens, for `norm="native"`.
        seed: of the random map.

    Raises:
        DttError: widths that don't fit, or what the method needs is missing.
    """
    method = method or (alignment.method if alignment else MAPS[0])
    if method not in (*MAPS, *CONTROLS):
        raise DttError(f"method={method!r} is not one of {', '.join((*MAPS, *CONTROLS))}.")
    if method in MAPS and alignment is None:
        raise DttError(f"The method {method} needs an alignment; make one with `dtt align`, or copy.")
    if alignment is not None and method in MAPS and method != alignment.method:
        raise DttError(
            f"The alignment is a map by {alignment.method}, not by {method}; make one with"
            f" `dtt align --method {method}`."
        )
    if target_model is None and alignment is None:
        raise DttError("Without an alignment, say which model the new tokens are for (--target-model).")
    width = tokens.width if alignment is None else alignment.W.shape[1]
    rows = _moved(tokens, alignment, method, width, seed)
    rows = _rescaled(rows, tokens, norm, native)
    metadata = {"source_tokens_sha256": tokens.digest, **inherited(tokens)}
    if norm is not None:
        metadata["norm"] = str(norm)
    if method == "random":
        metadata["seed"] = str(seed)
    if alignment is not None:
        for name in ("source_sha256", "target_sha256", "relative_residual"):
            metadata[f"alignment_{name}"] = str(getattr(alignment.report, name))
    if tokens.width == width:
        metadata[COSINES] = " ".join(f"{cosine:.6f}" for cosine in _cosines(tokens.rows, rows))
    return DefensiveTokens(
        rows=rows.astype(np.float32),
        model=target_model or (alignment.target_model if alignment else ""),
        method=method,
        prompt_format=tokens.prompt_format,
        source_model=origin_of(tokens),
        metadata=metadata,
    )


def _moved(
    tokens: DefensiveTokens, alignment: Alignment | None, method: str, width: int, seed: int
) -> Float64[Matrix, "k width"]:
    """Return the tokens under the chosen map, (k, width)."""
    if alignment is not None and (method in MAPS or alignment.W.shape[0] != tokens.width):
        return alignment.apply(tokens.rows)  # or say what doesn't fit
    if method == "copy" and tokens.width != width:
        raise DttError(
            f"The method copy needs equal widths, and the tokens have {tokens.width} where the target has {width}; "
            "use zero-pad."
        )
    if method == "zero-pad" and tokens.width == width:
        raise DttError(f"The widths are equal ({width}), so there is nothing to pad; use --method copy.")
    rows = np.pad(tokens.rows.astype(np.float64), ((0, 0), (0, max(width - tokens.width, 0))))
    return (haar_rotation(rows, np.random.default_rng(seed)) if method == "random" else rows)[:, :width]


def _rescaled(
    rows: Float64[Matrix, "k d"], tokens: DefensiveTokens, norm: str | float | None, native: DefensiveTokens | None
) -> Float64[Matrix, "k d"]:
    """Give every token the length that `norm` asks for."""
    if norm is None:
        return rows
    if norm == "source":
        lengths = np.linalg.norm(tokens.rows.astype(np.float64), axis=1)
    elif norm == "native":
        if native is None:
            raise DttError("norm=native needs the target's own tokens (--native FILE).")
        lengths = np.full(len(rows), np.linalg.norm(native.rows.astype(np.float64), axis=1).mean())
    else:
        lengths = np.full(len(rows), _positive(norm))
    rescaled: Matrix = rows * (lengths / np.linalg.norm(rows, axis=1))[:, None]
    return rescaled


def _positive(norm: str | float) -> float:
    try:
        value = float(norm)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise DttError(f"norm={norm!r} is neither 'source' nor 'native' nor a positive number.")
    return value


@dataclass(frozen=True)
class Comparison:
    """One row of the table that shows what the map does to the tokens."""

    method: str
    norms: list[float]
    """||t|| of each token."""
    norm_ratio: float
    """Mean of ||t_new|| / ||t_old||."""
    cosine_to_source: list[float] | None
    """Per token, before and after; None where the widths differ."""
    angle_to_source: list[float] | None
    """The same in degrees."""
    is_copy: bool
    """Whether all of `cosine_to_source` exceed `COPY_ABOVE`: the method and a copy are one measurement."""
    cosine_to_native: list[float] | None
    """Per token, to the target's own; None where these are not given."""
    distance_from_identity: float | None
    """||W - I||_F / sqrt(2 d): 0 for the identity, 1 for a random rotation, at most sqrt(2) for any."""


def compare(
    tokens: DefensiveTokens,
    moved: DefensiveTokens,
    *,
    alignment: Alignment | None = None,
    native: DefensiveTokens | None = None,
) -> Comparison:
    """Describe `moved` beside the `tokens` it came from, and beside the target's `native` tokens."""
    old, new = (np.linalg.norm(t.rows.astype(np.float64), axis=1) for t in (tokens, moved))
    if native is not None and native.rows.shape != moved.rows.shape:
        raise DttError(
            f"The native tokens have the shape {list(native.rows.shape)} and the transferred ones "
            f"{list(moved.rows.shape)}; give those of the target model."
        )
    distance = None
    if moved.method == "copy":
        distance = 0.0
    elif moved.method == "random" and tokens.width == moved.width:
        distance = 1.0  # its expectation; the trace of a random rotation is within about 1 of zero
    elif alignment is not None and moved.method in MAPS:
        distance = alignment.report.distance_from_identity
    cosines = _cosines(tokens.rows, moved.rows) if tokens.width == moved.width else None
    return Comparison(
        method=moved.method,
        norms=new.tolist(),
        norm_ratio=float(np.mean(new / old)),
        cosine_to_source=cosines,
        angle_to_source=cosines and [angle(cosine) for cosine in cosines],
        is_copy=cosines is not None and min(cosines) > COPY_ABOVE,
        cosine_to_native=None if native is None else _cosines(native.rows, moved.rows),
        distance_from_identity=distance,
    )


def compare_methods(
    tokens: DefensiveTokens,
    alignment: Alignment | None,
    *,
    native: DefensiveTokens | None = None,
    target_model: str | None = None,
    norm: str | float | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Return one `Comparison` per method that these inputs allow."""
    same_width = alignment is None or alignment.W.shape[0] == alignment.W.shape[1]
    controls = [method for method in CONTROLS if method != ("zero-pad" if same_width else "copy")]
    rows = []
    for method in [*([alignment.method] if alignment else []), *controls]:
        moved = transfer(
            tokens, alignment, method=method, target_model=target_model, norm=norm, native=native, seed=seed
        )
        rows.append(compare(tokens, moved, alignment=alignment, native=native))
    return rows


def angle(cosine: float) -> float:
    """Return the angle of a cosine in degrees."""
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _cosines(a: Float[NDArray[Any], "k d"], b: Float[NDArray[Any], "k d"]) -> list[float]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosines: list[float] = ((x * y).sum(axis=1) / np.where(lengths > 0, lengths, 1)).tolist()
    return cosines
