"""How tokens come to be: the words that token files, commands and tables share."""

from __future__ import annotations

MAPS = ("procrustes", "ridge", "relative", "whitened")
"""Moved by a map of `dtt align`, named for how it was found."""
CONTROLS = ("copy", "zero-pad", "random")
"""Moved by no map."""
METHODS = ("native", *MAPS, *CONTROLS, "trained", "adapted")
