"""Aligning the embedding spaces of two models by orthogonal Procrustes.

Rows are vectors. X (n, d_s) and Y (n, d_t) hold the embeddings of the n tokens
(anchors) that source and target share. Sought is

    W = argmin ||X W - Y||_F   subject to   W^T W = I     (d_s = d_t),

and a DefensiveToken t (1, d_s) becomes t W. In this order:

1. optionally rows are divided by their lengths (`weight="norm"`),
2. optionally means are subtracted (`center`),
3. M = X^T Y (d_s, d_t) is summed over blocks: float32 products, float64 sums,
4. W is the orthogonal polar factor of M = W H, H = (M^T M)^(1/2), in float64,
5. ||X W - Y||_F^2 = ||X||_F^2 + ||Y||_F^2 - 2 tr(W^T M): no second product.

Where the widths differ W is semi-orthogonal: the same polar factor, which then
maximises tr(W^T M). docs/alignment.md derives all of this.
"""

from dtt_plugin.alignment.cache import AlignmentCache, cache_folder
from dtt_plugin.alignment.options import AlignmentOptions
from dtt_plugin.alignment.result import Alignment, load_alignment, save_alignment
from dtt_plugin.alignment.solve import align, align_many

__all__ = [
    "Alignment",
    "AlignmentCache",
    "AlignmentOptions",
    "align",
    "align_many",
    "cache_folder",
    "load_alignment",
    "save_alignment",
]
