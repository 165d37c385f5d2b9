"""DefensiveToken transfer for lm-evaluation-harness.

The names of `__all__` are the public Python interface (docs/python.md). Importing
this package imports nothing else, since every interpreter of the environment does
so at start-up, through ``dtt_plugin.pth``: a name is loaded when it is first used.
"""

TYPE_CHECKING = False  # as type checkers know it, without importing typing
if TYPE_CHECKING:
    from dtt_plugin.alignment import align, load_alignment, save_alignment
    from dtt_plugin.bake import BakeOptions
    from dtt_plugin.bake import bake as bake_checkpoint
    from dtt_plugin.checkpoint.opening import open_checkpoint
    from dtt_plugin.leaderboard.comparison import build as compare_runs
    from dtt_plugin.leaderboard.lm_eval_files import read_runs
    from dtt_plugin.tokens.files import DefensiveTokens, load_tokens, save_tokens
    from dtt_plugin.transfer.move import transfer as transfer_tokens

__version__ = "0.1.0"

__all__ = [
    "BakeOptions",
    "DefensiveTokens",
    "align",
    "bake_checkpoint",
    "compare_runs",
    "load_alignment",
    "load_tokens",
    "open_checkpoint",
    "read_runs",
    "save_alignment",
    "save_tokens",
    "transfer_tokens",
]

if not TYPE_CHECKING:
    # `transfer` and `bake` are rooms of this package; their functions have a second word here.
    _WHERE = {
        "BakeOptions": "bake.options:BakeOptions",
        "DefensiveTokens": "tokens.files:DefensiveTokens",
        "align": "alignment:align",
        "bake_checkpoint": "bake:bake",
        "compare_runs": "leaderboard.comparison:build",
        "load_alignment": "alignment:load_alignment",
        "load_tokens": "tokens.files:load_tokens",
        "open_checkpoint": "checkpoint.opening:open_checkpoint",
        "read_runs": "leaderboard.lm_eval_files:read_runs",
        "save_alignment": "alignment:save_alignment",
        "save_tokens": "tokens.files:save_tokens",
        "transfer_tokens": "transfer.move:transfer",
    }

    def __getattr__(name):
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module, _, member = _WHERE[name].partition(":")
        return getattr(import_module(f"{__name__}.{module}"), member)

    def __dir__():
        return sorted({*globals(), *__all__})
