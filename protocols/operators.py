"""Operators of torch that a recording has noted, and how each is called again: by numpy where that makes the same bits sooner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocols.arena import Moves, Step
from protocols.ring import array

Own = Callable[[Tensor], np.ndarray]
WHOLE = {torch.int64}
NUMBERS = {torch.int64, torch.bool}
UFUNCS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "__and__": np.bitwise_and,
    "bitwise_and": np.bitwise_and,
    "__or__": np.bitwise_or,
    "bitwise_or": np.bitwise_or,
    "__xor__": np.bitwise_xor,
    "bitwise_xor": np.bitwise_xor,
    "__lshift__": np.left_shift,
    "bitwise_left_shift": np.left_shift,
    "__rshift__": np.right_shift,
    "bitwise_right_shift": np.right_shift,
}
"""Of two int64, the same bits as torch's, with less on the way."""
COMPARED = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
"""Of two int64, a bool."""


def _again(out: Tensor, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    out.copy_(function(*args, **kwargs))


def _join(parts: list[np.ndarray], axis: int, out: np.ndarray) -> None:
    np.concatenate(parts, axis, out=out)


def _total(x: np.ndarray, axes: tuple[int, ...], keep: bool, out: np.ndarray) -> None:
    np.add.reduce(x, axes, out=out, keepdims=keep)


def _exact(x: Any) -> bool:
    return isinstance(x, Tensor) or type(x) in (int, bool)


def _operand(own: Own, x: Any) -> np.ndarray:
    return own(x) if isinstance(x, Tensor) else np.array(x, np.int64)


class Operator:
    """An operator of torch that was called, with its result, or what it changes in place."""

    __slots__ = ("args", "func", "kwargs", "name", "out", "read")

    def __init__(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor | None, read: list[Tensor]) -> None:
        self.func, self.name, self.args, self.kwargs, self.out, self.read = func, name, args, kwargs, out, read

    def touched(self) -> Iterable[Tensor]:
        """See `Noted`."""
        return self.read if self.out is None else (*self.read, self.out)

    def step(self, to: Moves | None) -> Step:
        """How it is called again, into the same memory, or the other one."""
        own, out = array if to is None else to.numpy, self.out
        kinds = {x.dtype for x in self.read}
        if self.kwargs or not kinds <= NUMBERS or (out is not None and out.dtype not in NUMBERS):
            found = None
        elif out is None:
            found = (np.copyto, (own(self.args[0]), own(self.args[1]))) if self.name == "copy_" and kinds == WHOLE else None
        elif out.dtype == torch.bool or kinds != WHOLE:
            found = self._of_bits(own, kinds, own(out))
        else:
            found = self._of_numbers(own, own(out))
        return self._called(to) if found is None else found

    def _of_bits(self, own: Own, kinds: set[torch.dtype], out: np.ndarray) -> Step | None:
        """Where it makes bits, or reads them."""
        name, args = self.name, self.args
        if name in COMPARED and out.dtype == np.bool_ and kinds == WHOLE and len(args) == 2 and _exact(args[1]):
            return COMPARED[name], (own(args[0]), _operand(own, args[1]), out)
        if name == "mul" and out.dtype == np.int64 and len(args) == 2 and all(isinstance(x, Tensor) for x in args):
            return np.multiply, (own(args[0]), own(args[1]), out)
        if name == "to" and out.dtype == np.int64:
            return np.copyto, (out, own(args[0]))
        return None

    def _of_numbers(self, own: Own, out: np.ndarray) -> Step | None:
        """Of int64 alone."""
        name, args = self.name, self.args
        if name in UFUNCS and len(args) == 2:
            return UFUNCS[name], (_operand(own, args[0]), _operand(own, args[1]), out)
        if name == "rsub" and len(args) == 2:
            return np.subtract, (_operand(own, args[1]), _operand(own, args[0]), out)
        if name == "neg":
            return np.negative, (own(args[0]), out)
        if name == "index" and _is_take(args):
            return _take, (own(args[0]), own(args[1][-1]), len(args[1]) - 1, out)
        if name in ("clone", "contiguous"):
            return np.copyto, (out, own(args[0]))
        if name in ("reshape", "flatten"):
            return np.copyto, (out.reshape(args[0].shape), own(args[0]))
        if name in ("cat", "stack"):
            axis, parts = args[1] if len(args) > 1 else 0, [own(x) for x in args[0]]
            return _join, (parts if name == "cat" else [np.expand_dims(x, axis) for x in parts], axis, out)
        if name == "sum" and len(args) > 1:
            axes = tuple(args[1]) if isinstance(args[1], list | tuple) else (args[1],)
            return _total, (own(args[0]), axes, bool(len(args) > 2 and args[2]), out)
        return None

    def _called(self, to: Moves | None) -> Step:
        """By torch itself."""
        args, kwargs, out = (self.args, self.kwargs, self.out) if to is None else to.value((self.args, self.kwargs, self.out))
        if out is not None:
            return _again, (out, self.func, args, kwargs)
        return (self.func, args) if not kwargs else (_call, (self.func, args, kwargs))


def _is_take(args: tuple[Any, ...]) -> bool:
    """Whether it is elements at places of one axis, which are within it, as torch has found."""
    index = args[1]
    return index[-1] is not None and all(each is None for each in index[:-1])


def _take(x: np.ndarray, index: np.ndarray, axis: int, out: np.ndarray) -> None:
    np.take(x, index, axis, out, "wrap")


def _call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function(*args, **kwargs)
