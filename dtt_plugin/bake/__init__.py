"""Defended checkpoints: a base model with DefensiveTokens baked in, for any engine."""

from dtt_plugin.bake.baking import BakeReport, bake
from dtt_plugin.bake.cache import bake_cached, baked_folder, cached_checkpoints, prune
from dtt_plugin.bake.manifest import altered_since
from dtt_plugin.bake.options import BakeOptions
from dtt_plugin.checkpoint.defended import MANIFEST, is_defended_checkpoint, read_manifest

__all__ = [
    "MANIFEST",
    "BakeOptions",
    "BakeReport",
    "altered_since",
    "bake",
    "bake_cached",
    "baked_folder",
    "cached_checkpoints",
    "is_defended_checkpoint",
    "prune",
    "read_manifest",
]
