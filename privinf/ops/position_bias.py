"""Positions: a private table of which each position adds its row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from privinf.graph.builder import recogniser
from privinf.graph.draft import Draft
from privinf.graph.info import Info
from privinf.graph.kinds import Table
from privinf.graph.node import Shape
from privinf.graph.private import PrivinfTensor
from privinf.ops.bias import Bias
from privinf.ops.embedding import Embedding
from protocols.opening import add_server_constant


class PositionBias(Table):
    """x (B, T, d) plus rows offset .. offset + T of a private table, weight (n_positions, d); `offset` is set at run."""

    op = "position_bias"
    offset: int = 0

    def misfits(self, info: Info) -> Iterator[str]:
        if (rows := self.parameter_shapes["weight"][0]) != info.n_positions:
            yield f"{self.name} has {rows} positions, declared are {info.n_positions}"

    def output_shape(self, *shapes: Shape) -> Shape:
        rows, width = self.parameter_shapes["weight"]
        shape = shapes[0]
        if len(shape) != 3 or shape[2] != width or shape[1] > rows:
            raise self.fail(f"input {list(shape)} does not fit a table of {rows} positions of width {width}")
        return shape

    def generic(self, x: Any, *others: Any) -> Any:
        return x.add(self.value("weight")[self.offset : self.offset + x.size(1)])

    def run(self, x: PrivinfTensor, *others: PrivinfTensor) -> PrivinfTensor:
        table, windows = self.constant_of(x.runtime, "weight", x.shares.frac), x.runtime.windows(x.shares.shape[1])

        def rows(further: int) -> Tensor:
            assert table is not None
            return torch.cat([table[first + further : end + further] for first, end in windows])

        return x.with_shares(add_server_constant(x.party, x.shares, None if table is None else x.party.varying(rows)))


@recogniser(folded=False)
def find_position_bias(draft: Draft) -> None:
    """A private table added to (B, T, d), one row for each position, is a table of positions."""
    for key in draft.order():
        node = draft.nodes[key]
        if not isinstance(node, Bias):
            continue
        shape, table = draft.shapes[key], node.value("weight")
        if len(shape) == 3 and shape[1] == 1 and isinstance(draft.producer(draft.reads[key][0]), Embedding) and table.dim() == 1:
            table = table[None]  # (1, d): a model of one position
        if len(shape) == 3 and tuple(table.shape) == shape[1:]:
            name = node.name.removesuffix("bias") + PositionBias.op
            draft.replace(key, PositionBias(name, node.layer, weight=table), draft.reads[key])
