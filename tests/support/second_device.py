"""A second device on a machine that has none: what CUDA refuses, and every tensor that strays to the CPU, is an error here.

Its tensors are of torch's device type `lazy`, which nothing in the project knows, hold their values on the CPU and behave in what
matters as CUDA's do: they meet no tensor of the CPU (numbers excepted), have no integer matrix product and no `numpy()`. Beyond
that no arithmetic at all runs on the CPU inside of `second_device`, and tensors move only where the program says that they do.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "lazy"
_DEVICE = torch.device(NAME, 0)
_PRODUCTS = {"mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm", "addbmm"}
# on the CPU: what makes or renames a tensor and computes nothing
_MAKING = {"empty", "lift_fresh", "detach", "alias", "view", "_unsafe_view", "_to_copy", "clone"}
# the functions in which a tensor may move: random words, the wire, inputs and public constants, outputs, biases, weights, masked weights
_MOVES = {"uniform", "unpack", "pack", "_moved", "_back", "constant_of", "encode_weights", "set_up", "__post_init__"}


class Stray(AssertionError):
    """Something happened on, or came from, the wrong device."""


class Held(Tensor):
    """A tensor of the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        made = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=_DEVICE)
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Held({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, args, kwargs or {})


def _name(func: Any) -> str:
    name = str(func.overloadpacket.__name__)
    return "_to_copy" if name == "to" else name  # of a constant that was made in inference mode, where it is one operator


def _tensors(value: Any) -> list[Tensor]:
    """All in arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, list | tuple) else []


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_mapped(function, item) for item in value) if isinstance(value, list | tuple) else value


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """One operator on the second device."""
    tensors, name, target = _tensors(args), _name(func), kwargs.get("device")
    if name != "_to_copy":
        strangers = [x for x in tensors if not isinstance(x, Held) and x.dim()]
        if strangers:
            raise Stray(f"{name}: a tensor {tuple(strangers[0].shape)} of {strangers[0].device} meets the second device")
    if name in _PRODUCTS and not tensors[0].is_floating_point():
        raise Stray(f"{name}: the second device has no product of integer matrices")
    plain_args, plain_kwargs = _mapped(lambda x: x.held if isinstance(x, Held) else x, args), dict(kwargs)
    away = target is not None and target.type != NAME
    if target is not None and not away:
        plain_kwargs["device"] = torch.device("cpu")
    out = func(*plain_args, **plain_kwargs)
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    return out if away else _mapped(Held, out)


class second_device(TorchDispatchMode):
    """What a thread computes in this context is on the second device, where it asks for it; or, unless `strict` is false, fails.

    `moves` counts the moves by the function that made them.
    """

    def __init__(self, moves: Counter[str] | None = None, *, strict: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.strict = strict
        self.moves: Counter[str] = Counter() if moves is None else moves

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; the guard against it costs half of the time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args)
        target, name = kwargs.get("device"), _name(func)
        there = any(isinstance(x, Held) for x in tensors)
        goes_there = target is not None and target.type == NAME
        if name == "_to_copy" and target is not None and target.type != "meta" and there != goes_there and tensors[0].dim():
            self._note_move()
        if there or goes_there:
            return _compute(func, args, kwargs)
        out = func(*args, **kwargs)
        real = [x for x in (*tensors, *_tensors(out)) if not x.is_meta]
        if self.strict and real and name not in _MAKING:
            where = "build it on the device of what it meets, or a public constant by numpy, moved by `like`"
            raise Stray(f"{name}: {tuple(real[-1].shape)} is computed on the CPU: {where}")
        return out

    def _note_move(self) -> None:
        frame = sys._getframe(1)
        seen: list[str] = []
        while frame.f_back is not None and len(seen) < 12:
            frame = frame.f_back
            name = frame.f_code.co_name
            if name in _MOVES:
                self.moves[name] += 1
                return
            seen.append(name)
        raise Stray(f"a tensor moves between the devices in {' < '.join(seen)}")
