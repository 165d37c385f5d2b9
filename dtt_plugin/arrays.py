"""Kinds of arrays, for annotations with shapes: `Float64[Matrix, "d_s d_t"]`.

An annotation says the shape to the reader, and the type behind it to the type checker. In use none is evaluated, so
jaxtyping is not needed there; the tests load it first, and then every call is checked (`tests/shapes.py`).
"""

import sys

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Float32, Float64, Int64
else:
    Bool = Float = Float32 = Float64 = Int64 = None

__all__ = ["Bool", "Float", "Float32", "Float64", "Int64"]
