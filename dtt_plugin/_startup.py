"""Makes lm-eval 0.4.13 find this plugin without an argument.

`dtt_plugin.pth` gives every interpreter of the environment a finder of one
comparison per import (no file is read at start-up). When `lm_eval` is first
imported that finder imports this module, which then waits: once
`lm_eval.models` has been imported our models are registered lazily, and once
`lm_eval.tasks._index` has been imported our task folder joins lm-eval's own.
Where lm-eval discovers us itself (its development branch reads the entry
points in pyproject.toml) nothing is registered twice.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as type checkers know it, without importing typing
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType, TracebackType
    from typing import Any

# The same objects as the entry points in pyproject.toml.
MODELS = {
    "dtt_vllm": "dtt_plugin.model_wrappers.vllm:DttVLLM",
    "dtt_hf": "dtt_plugin.model_wrappers.hf:DttHF",
}


def register_models(_module: ModuleType) -> None:
    """Register `dtt_vllm` and `dtt_hf` where lm-eval has not done so already.

    An `EntryPoint` equals the one that a discovering lm-eval would register, so its own registration,
    should it come later, is the same and not a conflict.
    """
    from importlib.metadata import EntryPoint

    from lm_eval.api.registry import model_registry

    for name, target in MODELS.items():
        if name not in model_registry:
            model_registry.register(name, target=EntryPoint(name, target, "lm_eval.models"))
    show_bad_input_as_a_sentence()


def show_bad_input_as_a_sentence() -> None:
    """Let an uncaught `DttError` end lm-eval with its sentence and exit code 2, as it ends the `dtt` command."""
    show_traceback = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        from dtt_plugin.errors import DttError
        from dtt_plugin.safe_text import one_line

        if not isinstance(error, DttError):
            show_traceback(kind, error, traceback)
            return
        print(f"dtt-plugin: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2)

    sys.excepthook = show


def add_task_folder(module: ModuleType) -> None:
    """Let lm-eval's task index read our folder: before its own tasks, so that on equal names lm-eval's win."""
    from functools import wraps
    from pathlib import Path

    index = module.TaskIndex
    build = index.build
    defaults = Path(module.__file__ or "").parent
    ours = Path(__file__).parent / "tasks"

    @wraps(build)
    def build_with_ours(paths: Iterable[Path], **options: Any) -> Any:
        paths = list(paths)
        if defaults in paths and not any(Path(path).resolve() == ours.resolve() for path in paths):
            paths.insert(0, ours)
        return build(paths, **options)

    index.build = staticmethod(build_with_ours)


_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "lm_eval.models": register_models,
    "lm_eval.tasks._index": add_task_folder,
}


_searching: set[str] = set()  # another hook may ask all finders too, ours among them


class _LmEvalHook:
    """A meta-path finder that finds nothing itself: it runs a function after a module of lm-eval is executed."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        action = _AFTER_IMPORT.get(name)
        if action is None or name in _searching:
            return None
        _searching.add(name)
        try:
            others = (finder for finder in sys.meta_path if finder is not _LmEvalHook and hasattr(finder, "find_spec"))
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        finally:
            _searching.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            action(module)

        spec.loader.exec_module = execute_then_act  # type: ignore[method-assign]
        return spec


if _LmEvalHook not in sys.meta_path:
    sys.meta_path.insert(0, _LmEvalHook)
