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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from protocols import kernels
from protocols.arena import Moves, Noted, Step
from protocols.memo import set_aside
from protocols.operators import UFUNCS, Operator
from protocols.ring import array

Told = tuple[Any, ...]

aten = torch.ops.aten

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
FRESH = frozenset((*UFUNCS, "index", "cat", "sum", "clone", "neg", "rsub", "stack", "mm", "bmm", *EMPTY))
"""Into memory of their own, always."""
LEAKS = ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique", "is_nonzero")
"""Operators that make a number, or a shape, of a value: what they lead to cannot be replayed."""


class _About(NamedTuple):
    """What is known of an operator of torch, which is kept, so that no other one has its number."""

    func: Any
    name: str
    mutable: bool  # whether it changes an operand
    view: bool


_known: dict[int, _About] = {}  # by `id`: an operator's hash is a call of Python


def _about(func: Any) -> _About:
    name = func._schema.name.removeprefix("aten::")
    found = _known[id(func)] = _About(func, name, func._schema.is_mutable, name in VIEWS)
    return found


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
        self.steps: list[Step | Noted] = []
        self.why = ""
        """Why what was recorded cannot be replayed; empty if it can."""
        self.bytes = 0
        self._told: list[Told] = []
        self._tells = tells
        self._digests: dict[Told, bytes] = {}
        self._alive: list[Any] = []
        self._pieces: list[tuple[int, int]] = []  # of the memory that was made here, from and to before; where it tells, in order
        self._starts = set[int]()  # of them
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

    @property
    def told(self) -> tuple[Told, ...]:
        """What two recordings of one program have in common."""
        return tuple(self._told)

    def moves(self, steps: Sequence[Step | Noted], kept: Sequence[np.ndarray]) -> Moves:
        """To memory of their own for these steps; see `Moves.packing`."""
        pieces: list[tuple[int, int]] = []
        for piece in sorted(self._pieces, key=lambda piece: (piece[0], -piece[1])):
            if not pieces or piece[1] > pieces[-1][1]:  # else it is part of that one
                pieces.append(piece)
        return Moves.packing(pieces, steps, kept)

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
        out = func(*args, **kwargs) if kwargs else func(*args)
        if not self._paused:
            about = _known.get(id(func)) or _about(func)
            if not about.view:
                self._operator(about, args, kwargs or {}, out)
        return out

    def kernel(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """A compiled loop that was called; its arrays are used again."""
        if self._paused:
            return
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
        if not size or start in self._starts or (self._tells and self._is_made(start)):
            return
        self.bytes += size
        self._starts.add(start)
        if self._tells:
            insort(self._pieces, (start, start + size))
        else:
            self._pieces.append((start, start + size))
        if self.bytes > self._most:
            self._give_up()

    def _give_up(self) -> None:
        self.why = self.why or f"it makes more than {self._most} bytes"
        self._most, self._paused = 0, self._paused + 1
        for each in (self.steps, self._told, self._alive, self._pieces, self._starts, self._digests):
            each.clear()

    def _is_made(self, address: int) -> bool:
        if address in self._starts:
            return True
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
            return (*view, self._digest(array(x)))

    def _plain(self, value: Any) -> Any:
        if not self._tells:
            return None
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        return tuple(self._plain(each) for each in value) if isinstance(value, list | tuple) else value

    # ---- steps

    def _operator(self, about: _About, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = about.name
        read = _tensors(args) + (_tensors(kwargs.values()) if kwargs else [])
        outs = [out] if isinstance(out, Tensor) else _tensors(out) if isinstance(out, list | tuple) else []
        elsewhere = False
        for each in (read, outs):
            for x in each:
                if not x.is_cpu:
                    if x.is_meta:
                        return
                    elsewhere = True
        if name == "index" and any(x is not None and x.dtype != torch.int64 for x in args[1]):
            self.why = self.why or "elements are chosen by a value"
        if name in LEAKS or not outs or elsewhere:
            self.why = self.why or f"{name} makes no tensor"
            return
        if about.mutable and name != "detach_":
            self._tell(name, args)
            self.steps.append(Operator(about.func, name, args, kwargs, None, read))
            return
        if name not in FRESH:
            places = {x.untyped_storage().data_ptr() for x in read}
            if all(x.untyped_storage().data_ptr() in places for x in outs):
                return  # a view: the same memory
        if len(outs) != 1:
            self.why = self.why or f"{name} makes several tensors"
            return
        noted = name not in EMPTY and self._most
        if noted:
            self._tell(name, args, kwargs)
        self._made(outs[0])
        if not noted or not self._most:
            return
        if not read or name in ("zeros_like", "ones_like"):  # a constant, which is perhaps changed in place later
            with self.outside():
                self.steps.append(Operator(about.func, "copy_", (outs[0], outs[0].clone()), {}, None, [outs[0]]))
            return
        self.steps.append(Operator(about.func, name, args, kwargs, outs[0], read))

    def _tell(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if self._tells:
            named = () if kwargs is None else (tuple((key, str(value)) for key, value in kwargs.items()),)
            self._told.append((name, self._plain(args), *named))


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


def made(steps: Sequence[Step | Noted]) -> list[Step]:
    """What was noted, as it is done again in the memory that it was recorded in."""
    return [step if isinstance(step, tuple) else step.step(None) for step in steps]


def replay(steps: Sequence[Step]) -> None:
    """Does them again, in order; within the inference mode that they were recorded in."""
    for function, args in steps:
        function(*args)
