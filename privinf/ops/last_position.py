"""The last position, the one whose logits choose the next token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from privinf.graph.kinds import Moving
from privinf.graph.node import Shape
from privinf.graph.private import PrivinfTensor
from protocols.ring import known

_EVERY: ContextVar[bool] = ContextVar("every", default=False)


@contextmanager
def every_position() -> Iterator[None]:
    """Within it, floats keep every position where a graph would take the last alone: (B, T, ...) -> (B T, ...), rows as others are."""
    before = _EVERY.set(True)
    try:
        yield
    finally:
        _EVERY.reset(before)


def last_of(x: Any) -> Any:
    """(B, T, ...) -> (B, 1, ...), the last position; all of them within `every_position`."""
    return x if _EVERY.get() else x[:, x.size(1) - 1 :]


class LastPosition(Moving):
    """The last position of axis 1: (B, T, ...) -> (B, ...).

    In a pass that has an output of every position it leaves all of them, (1, T, ...) -> (T, ...).
    """

    op = "last_position"
    takes_last_position = True
    any_length = True
    batches = True

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        if len(shape) < 2:
            raise self.fail(f"{list(shape)} has no axis of positions")
        return (shape[0], *shape[2:])

    def generic(self, x: Any, *others: Any) -> Any:
        return x.flatten(0, 1) if _EVERY.get() else x[:, x.size(1) - 1]

    def run(self, x: PrivinfTensor, *others: PrivinfTensor) -> PrivinfTensor:
        batch = x.runtime.batch
        if x.runtime.every:
            if x.shares.shape[1] != x.runtime.every:
                raise self.fail("an operator before it gives the last position alone")
            return x.moved(lambda value: value[0])
        if batch is None:
            return super().run(x)
        if x.shares.shape[1] == len(batch.new):  # each sequence's last row is all that is left, or all that there is
            return x.moved(lambda value: value[0])
        lasts = batch.lasts
        return x.moved(lambda value: value[0, lasts] if known(value) else value[0, : len(lasts)])  # (1, R, ...) -> (B, ...)
