"""The last position, the one whose logits choose the next token."""

from __future__ import annotations

from typing import Any

from privinf.graph.kinds import Moving
from privinf.graph.node import Shape


class LastPosition(Moving):
    """The last position of axis 1: (B, T, ...) -> (B, ...)."""

    op = "last_position"
    takes_last_position = True
    any_length = True

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        if len(shape) < 2:
            raise self.fail(f"{list(shape)} has no axis of positions")
        return (shape[0], *shape[2:])

    def generic(self, x: Any, *others: Any) -> Any:
        return x[:, x.size(1) - 1]
