"""What a walk computes between its rounds, written down once and done again on other values.

A protocol's control flow depends on public shapes alone, so that a second walk of the same shape calls the same operators on tensors of
the same shapes. A `Recorder` notes them while a walk runs: each operator of torch and each compiled loop, with the very tensors that it
read and wrote. To `replay` is to fill what came from outside, drawn values and messages, anew in the same memory and to call them again,
without the Python that led to them.

What is written down holds only if nothing else was computed. So two recordings of one program, of different values and positions, are
compared (`Recorder.told`): the calls must be the same, with the same numbers, and whatever they read that neither was recorded nor is an
input must be the same in content. A value that escaped, a mask say, differs, and then nothing is replayed.
"""

from __future__ import annotations

import hashlib
import sys
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from protocols import kernels
from protocols.arena import Moves, Step
from protocols.memo import set_aside
from protocols.ring import array

Told = tuple[Any, ...]

aten = torch.ops.aten

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
EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
VIEWS = frozenset(
    (
        "view",
        "transpose",
        "slice",
        "select",
        "expand",
        "permute",
        "unsqueeze",
        "squeeze",
        "t",
        "detach",
        "split",
        "split_with_sizes",
        "unbind",
    )
)
"""Of the memory of their operand, always."""
LEAKS = ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique", "is_nonzero")
"""Operators that make a number, or a shape, of a value: what they lead to cannot be replayed."""


@lru_cache(maxsize=1 << 10)
def _schema(func: Any) -> tuple[str, bool]:
    """An operator's name, and whether it changes an operand."""
    return func._schema.name.removeprefix("aten::"), func._schema.is_mutable


def _numpy(x: Tensor) -> np.ndarray:
    return array(x)


def _again(out: Tensor, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    out.copy_(function(*args, **kwargs))


def _join(parts: list[np.ndarray], axis: int, out: np.ndarray) -> None:
    np.concatenate(parts, axis, out=out)


def _total(x: np.ndarray, axes: tuple[int, ...], keep: bool, out: np.ndarray) -> None:
    np.add.reduce(x, axes, out=out, keepdims=keep)


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within `with`, notes what this thread computes on the CPU; see the module's text.

    `constants` are tensors that are of no walk, weights say. With `tells` it also writes down `told`, which takes longer. Once more
    than `most` bytes were made it notes nothing any more, and holds nothing: what will not be replayed need not be kept.

    Its attributes are what was recorded, and what is known of its memory meanwhile.
    """

    def __init__(self, constants: Sequence[Tensor] = (), *, tells: bool = True, most: int = sys.maxsize) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Any] = []  # when it is left: of `Step`
        self.why = ""
        """Why what was recorded cannot be replayed; empty if it can."""
        self.bytes = 0
        self._told: list[Told] = []
        self._tells = tells
        self._digests: dict[Told, bytes] = {}
        self._alive: list[Any] = []
        self._pieces: list[tuple[int, int]] = []  # of the memory that was made here, from and to before, in order
        self._constants = {x.untyped_storage().data_ptr() for x in constants}
        self._paused, self._most = 0, most

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here. torch would else wrap the method below, import its compiler for that, and take longer in each call."""
        return False

    def __enter__(self) -> Recorder:
        kernels.watch(self)
        set_aside(self.outside)
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        kernels.watch(None)
        set_aside(None)
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for place, step in enumerate(self.steps):
            if isinstance(step, _Operator):
                self.steps[place] = step.step()

    @property
    def told(self) -> tuple[Told, ...]:
        """What two recordings of one program have in common."""
        return tuple(self._told)

    def moves(self, steps: Sequence[Step], kept: Sequence[np.ndarray]) -> Moves:
        """To memory of their own for these steps; see `Moves.packing`."""
        return Moves.packing(self._pieces, steps, kept)

    def outside(self) -> _Outside:
        """Within it nothing is noted."""
        return _Outside(self)

    def given(self, x: Tensor) -> Tensor:
        """An input: whoever replays fills it."""
        self._made(x)
        return x

    def note(self, function: Callable[..., Any], *args: Any) -> None:
        """A step of the caller's own, which is not done now."""
        if self._most:
            self.steps.append((function, args))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._paused:
            self._operator(func, args, kwargs, out)
        return out

    def kernel(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """A compiled loop that was called; its arrays are used again."""
        if self._paused:
            return
        arrays = [x for x in args if isinstance(x, np.ndarray)]
        self._alive.append(arrays)
        if self._tells:
            told = [self._of_array(x) if isinstance(x, np.ndarray) else int(x) for x in args]
            self._told.append((function.__name__, *told))
        self.steps.append((function, args))

    # ---- what is what

    def _made(self, x: Tensor) -> None:
        if not self._most:
            return
        storage = x.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        self._alive.append(x)
        if not size or self._is_made(start):
            return
        self.bytes += size
        insort(self._pieces, (start, start + size))
        if self.bytes > self._most:
            self._give_up()

    def _give_up(self) -> None:
        self.why = self.why or f"it makes more than {self._most} bytes"
        self._most, self._paused = 0, self._paused + 1
        for each in (self.steps, self._told, self._alive, self._pieces, self._digests):
            each.clear()

    def _is_made(self, address: int) -> bool:
        place = bisect_right(self._pieces, (address, sys.maxsize))
        return bool(place) and address < self._pieces[place - 1][1]

    def _of_array(self, x: np.ndarray) -> Told:
        address = x.__array_interface__["data"][0]
        if not x.size or self._is_made(address):
            return x.shape
        if address in self._constants:  # a weight, from its first element on
            return (*x.shape, *x.strides)
        return (*x.shape, self._digest(x))

    def _digest(self, x: np.ndarray) -> bytes:
        """Of what nothing here has made, and nothing here changes."""
        key = (x.__array_interface__["data"][0], x.shape, x.strides)
        found = self._digests.get(key)
        if found is None:
            found = self._digests[key] = hashlib.blake2b(np.ascontiguousarray(x).data, digest_size=16).digest()
        return found

    def _of_tensor(self, x: Tensor) -> Told:
        storage, view = x.untyped_storage().data_ptr(), (tuple(x.shape), x.stride())
        if not x.numel() or self._is_made(storage):
            return view
        if storage in self._constants:
            return (*view, x.storage_offset())
        if x.dtype not in (torch.int64, torch.bool, torch.uint8):
            self.why = self.why or f"a tensor of {x.dtype}"
            return view
        with self.outside():
            return (*view, self._digest(_numpy(x)))

    def _plain(self, value: Any) -> Any:
        if not self._tells:
            return None
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        return tuple(self._plain(each) for each in value) if isinstance(value, list | tuple) else value

    # ---- steps

    def _operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name, mutable = _schema(func)
        if name in VIEWS:
            return
        read = _tensors(args) + _tensors(kwargs.values())
        outs = _tensors(out) if isinstance(out, list | tuple) else [out] if isinstance(out, Tensor) else []
        if any(x.is_meta for x in read + outs):
            return
        if name == "index" and any(x is not None and x.dtype != torch.int64 for x in args[1]):
            self.why = self.why or "elements are chosen by a value"
        if name in LEAKS or not outs or not all(x.is_cpu for x in read + outs):
            self.why = self.why or f"{name} makes no tensor"
            return
        self._alive += (read, outs)
        if mutable and name != "detach_":
            self._told.append((name, self._plain(args)))
            self.steps.append(_Operator(func, name, args, kwargs, None, read))
            return
        places = {x.untyped_storage().data_ptr() for x in read}
        if all(x.untyped_storage().data_ptr() in places for x in outs):
            return  # a view: the same memory
        if len(outs) != 1:
            self.why = self.why or f"{name} makes several tensors"
            return
        told = (name, self._plain(args), tuple((key, str(value)) for key, value in kwargs.items()) if self._tells else None)
        self._made(outs[0])
        if name in EMPTY or not self._most:
            return
        self._told.append(told)
        if not read or name in ("zeros_like", "ones_like"):  # a constant, which is perhaps changed in place later
            with self.outside():
                self.steps.append(_Operator(func, "copy_", (outs[0], outs[0].clone()), {}, None, [outs[0]]))
            return
        self.steps.append(_Operator(func, name, args, kwargs, outs[0], read))


class _Operator(NamedTuple):
    """An operator of torch that was called, with its result, or what it changes in place."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor | None
    read: list[Tensor]

    def step(self) -> Step:
        """How it is called again, into the same memory."""
        func, name, args, kwargs, out, read = self
        if out is None:
            if name == "copy_" and not kwargs and all(x.dtype == torch.int64 for x in read):
                return np.copyto, (_numpy(args[0]), _numpy(args[1]))
            return (func, args) if not kwargs else (_call, (func, args, kwargs))
        if kwargs or out.dtype != torch.int64 or any(x.dtype != torch.int64 for x in read):
            return _again, (out, func, args, kwargs)
        if name in UFUNCS and len(args) == 2:
            return UFUNCS[name], (*[_operand(x) for x in args], _numpy(out))
        if name == "rsub" and len(args) == 2:
            return np.subtract, (_operand(args[1]), _operand(args[0]), _numpy(out))
        if name == "neg":
            return np.negative, (_numpy(args[0]), _numpy(out))
        if name == "index" and _is_take(args):
            return _take, (_numpy(args[0]), _numpy(args[1][-1]), len(args[1]) - 1, _numpy(out))
        if name in ("clone", "contiguous"):
            return np.copyto, (_numpy(out), _numpy(args[0]))
        if name in ("reshape", "flatten"):
            return np.copyto, (_numpy(out).reshape(args[0].shape), _numpy(args[0]))
        if name == "cat":
            return _join, ([_numpy(x) for x in args[0]], args[1] if len(args) > 1 else 0, _numpy(out))
        if name == "sum" and len(args) > 1:
            axes = tuple(args[1]) if isinstance(args[1], list | tuple) else (args[1],)
            return _total, (_numpy(args[0]), axes, bool(len(args) > 2 and args[2]), _numpy(out))
        return _again, (out, func, args, kwargs)


def _is_take(args: tuple[Any, ...]) -> bool:
    """Whether it is elements at places of one axis, which are within it, as torch has found."""
    index = args[1]
    return index[-1] is not None and all(each is None for each in index[:-1])


def _take(x: np.ndarray, index: np.ndarray, axis: int, out: np.ndarray) -> None:
    np.take(x, index, axis, out, "wrap")


def _call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function(*args, **kwargs)


def _operand(x: Any) -> np.ndarray:
    return _numpy(x) if isinstance(x, Tensor) else np.array(x, np.int64)


class _Outside:
    """See `Recorder.outside`: operators do not come to the recorder at all."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._guard: Any = torch._C._DisableTorchDispatch()

    def __enter__(self) -> None:
        self._recorder._paused += 1
        self._guard.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._guard.__exit__(*error)
        self._recorder._paused -= 1


def replay(steps: Sequence[Step]) -> None:
    """Does them again, in order; within the inference mode that they were recorded in."""
    for function, args in steps:
        function(*args)
