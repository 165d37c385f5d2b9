"""A GPU of which only shapes and places are real: torch's device "meta", whose numbers are read as zeros.

What would fail on a GPU because two tensors are in two places fails here, on a machine without one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = "meta"
aten = torch.ops.aten


class FakeGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, tensors on `GPU` can be read, and mixing them with others is an error as on a real one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func is aten.copy_.default:  # between places, too
            return first.zero_() if first is not None and not _on_gpu(first) and _on_gpu(args[1]) else func(*args)
        if first is not None and _on_gpu(first):
            if func is aten._local_scalar_dense.default:
                return True if first.dtype == torch.bool else 0
            if func is aten._to_copy.default and torch.device(kwargs.get("device") or GPU).type == "cpu":
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            if func is aten.allclose.default:
                return True
        if func is not aten._to_copy.default:
            self._check_one_place(func, args, kwargs)
        return func(*args, **kwargs)

    def _check_one_place(self, func: Any, args: Any, kwargs: Any) -> None:
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            args = [args[0], *args[2:]]  # indices may be anywhere
        tensors = [value for value in tree_leaves([args, kwargs]) if isinstance(value, torch.Tensor) and value.dim()]
        assert len({tensor.device.type for tensor in tensors}) < 2, f"{func} gets tensors in two places"


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == GPU
