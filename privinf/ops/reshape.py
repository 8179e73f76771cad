"""The same elements in another shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from privinf.graph.builder import Builder, Value, aten, rule
from privinf.graph.kinds import Moving
from privinf.graph.node import Shape


class Reshape(Moving):
    """The same elements in row-major order in another shape; at most one size is -1."""

    op = "reshape"
    shape: list[int]

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """The new shape."""

        shape: list[int]

    def output_shape(self, *shapes: Shape) -> Shape:
        try:
            return tuple(torch.empty(shapes[0], device="meta").reshape(self.shape).shape)
        except RuntimeError:
            raise self.fail(f"{list(shapes[0])} cannot become {self.shape}") from None

    def moves_rows(self, before: Shape, after: Shape) -> bool:
        return before != () and after != () and before[-1] == after[-1]

    def for_rows(self, lead: Shape, width: int) -> dict[str, Any]:
        return {"shape": [*lead, width]}

    def keeps_infinity(self, before: Shape, after: Shape) -> bool:
        return before[-2:] == after[-2:]

    def generic(self, x: Any, *others: Any) -> Any:
        return x.reshape(*self.shape) if self.shape else x.reshape([])


def reshape(b: Builder, x: Value, shape: Sequence[int]) -> Value:
    """x in another shape; two in a row are one, none where the shape stays."""
    while isinstance(b.draft.producer(x.key), Reshape):
        x = b.source(x)
    return x if tuple(shape) == x.shape else b.emit(Reshape, x, shape=list(shape))


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view_as.default,
    aten.reshape_as.default,
)
def as_result(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    """All of these keep the elements in row-major order, so the shape of the result says everything."""
    if x.is_ids and b.result_shape == x.shape:
        return x
    return reshape(b, x, b.result_shape)
