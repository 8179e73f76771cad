"""Blanks on which elementwise arithmetic is quick: makers are mostly that, and torch's shape functions take longer than the numbers.

A sketch is a blank (a meta tensor) like any other; operators between sketches and integers give a sketch of the common shape without
asking torch for it. Everything else is torch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from protocols.ring import blank, common_shape

_OPERATORS = ("and", "or", "xor", "lshift", "rshift", "add", "sub", "mul")
_ELEMENTWISE = frozenset(f"__{prefix}{name}__" for prefix in ("", "r", "i") for name in _OPERATORS) | {
    *("add", "sub", "mul", "rsub", "__neg__", "neg", "remainder", "__invert__"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "zeros_like", "ones_like"),
}
_ASKED = frozenset({"__get__", "dim", "__len__"})


class Sketch(Tensor):
    """See the module's text."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Torch's hook for every operation on it."""
        name = getattr(func, "__name__", "")
        if name in _ASKED:  # its shape, or that it is a blank
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        if name in _ELEMENTWISE and not kwargs:
            first, *rest = [x for x in args if isinstance(x, Tensor)]
            shape = tuple(first.shape)
            for x in rest:
                if tuple(x.shape) != shape:
                    shape = common_shape(first, x)
            return sketch(shape)
        if name in ("stack", "cat"):
            axis = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            return sketch(_joined([tuple(x.shape) for x in args[0]], axis, new=name == "stack"))
        if name == "sum" and len(args) == 2 and not kwargs:
            shape = tuple(args[0].shape)
            return sketch(shape[: args[1] % len(shape)] + shape[args[1] % len(shape) + 1 :])
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def _joined(shapes: Sequence[tuple[int, ...]], axis: int, *, new: bool) -> tuple[int, ...]:
    """Of tensors side by side along an axis, a new one or theirs."""
    shape = list(shapes[0])
    if new:
        shape.insert(axis % (len(shape) + 1), len(shapes))
    else:
        shape[axis] = sum(each[axis] for each in shapes)
    return tuple(shape)


def sketch(shape: Sequence[int]) -> Tensor:
    """A blank of this shape."""
    found: Tensor = blank(*shape).as_subclass(Sketch)
    return found
