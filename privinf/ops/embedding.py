"""Rows of a private table, by token ids that only the client knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from privinf.graph.builder import Builder, Constant, Unsupported, Value, as_constant, aten, rule
from privinf.graph.info import Info
from privinf.graph.kinds import Table
from privinf.graph.node import Shape
from privinf.graph.planning import FRAC, TABLE_FRAC, Bits, Planning, ProductPlan, bits_for, is_small
from privinf.graph.private import PrivinfTensor
from protocols.linear import lookup
from protocols.party import Protocol_
from protocols.shares import Shares

ENLARGED = 128.0  # times what a row is off by in the logits (`privinf.lowering.gains`): beyond it the table has the stream's fraction bits


class Embedding(Table):
    """Rows of a private table: ids (B, T) -> (B, T, d), or (...) -> (..., d). weight (V, d). Stock CrypTen: one-hot (..., V)."""

    op = "embedding"
    inexact: ClassVar[Mapping[str, str]] = {"table": "generic"}
    encoded = ("weight",)
    reads_ids = True

    class Plan(ProductPlan, frozen=True, kw_only=True):
        """`weight_bits`: the ring of the table where a head is tied to it; `small`: see `protocols.linear.Weight`."""

        ring: Bits
        weight_frac: Bits
        small: Bits = 0
        bits: Bits
        frac: Bits
        weight_bits: Bits | None = None

    plan: Plan

    def misfits(self, info: Info) -> Iterator[str]:
        if (rows := self.parameter_shapes["weight"][0]) != info.vocab:
            yield f"{self.name} has {rows} rows, the vocabulary is {info.vocab}"

    def output_shape(self, *shapes: Shape) -> Shape:
        return (*shapes[0], self.parameter_shapes["weight"][1])

    def generic(self, ids: Any, *others: Any) -> Any:
        weight = self.value("weight")
        if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
            return weight[ids]
        return ids.matmul(weight)

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        assert x.ids is not None
        shape, weight = x.ids.shape, x.runtime.weights[f"{self.name}.weight"]
        y = yield from lookup(x.party, x.ids.reshape(-1), x.ids.numel(), weight, bits=self.plan.ring)
        return (yield from self.canonical(x.party, y.map(lambda v: v.reshape(*shape, -1))))  # (B, T, d)

    def make_plan(self, planning: Planning) -> Plan:
        # the output is a row of the table: its range is known, not measured
        table, frac = self.value("weight"), TABLE_FRAC
        tied_to_it = any(node.tied_to == self.name for node in planning.graph.nodes)
        if not tied_to_it and planning.ranges.get(self.name, {}).get("table_gain", 0.0) > ENLARGED:
            frac = FRAC  # as the stream has: what is off there is enlarged
        ring = bits_for(self.name, frac, float(table.abs().max()))
        tied = [plan.ring for plan in planning.tied_to(self.name) if isinstance(plan, ProductPlan)]
        return self.Plan(
            ring=ring,
            weight_frac=frac,
            small=int(is_small(table, frac)),
            bits=planning.bits,
            frac=planning.frac,
            weight_bits=max(ring, *tied) if tied else None,
        )

    def bound_of(self, part: str, ranges: Mapping[str, float]) -> float:
        return float("inf")

    def encoding(self, key: str) -> tuple[int, int, bool]:
        return self.plan.weight_bits or self.plan.ring, self.plan.weight_frac, bool(self.plan.small)

    def output_bound(self, own: Mapping[str, float]) -> tuple[float | None, str | None]:
        return self.largest("weight"), "weights"


@rule(aten.embedding.default)
def embedding(b: Builder, weight: Any, ids: Value, *_: Any) -> Value:
    """Rows of a constant table."""
    if not isinstance(ids, Value) or not ids.is_ids:
        raise Unsupported("an embedding of what is not a graph input of token ids")
    return b.emit(Embedding, ids, weight=as_constant(weight).float())


@rule(aten.index.Tensor)
def index(b: Builder, table: Any, indices: Sequence[Any]) -> Value:
    """The same, written as an index."""
    if isinstance(table, Constant) and len(indices) == 1 and len(table.shape) == 2 and isinstance(indices[0], Value):
        return embedding(b, table, indices[0])
    raise Unsupported("indexing other than rows of a table by token ids")
