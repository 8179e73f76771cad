"""Linear maps with private weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.graph.builder import Builder, Constant, Value, aten, rule
from privinf.graph.kinds import matrix_output
from privinf.graph.node import Node, Shape
from privinf.graph.planning import (
    COMPARED_FRAC,
    FRAC,
    HEAD_FRAC,
    INPUT_FRAC,
    LOGIT_FRAC,
    MATRIX_FRAC,
    MOST_FINE,
    TABLE_FRAC,
    Bits,
    Planning,
    ProductPlan,
    Shown,
    Wanted,
    bits_for,
    is_small,
    up,
)
from privinf.graph.private import PrivinfTensor, Runtime
from protocols.linear import Weight
from protocols.linear import linear as times_matrix
from protocols.opening import add_server_constant
from protocols.party import Protocol_, parallel
from protocols.shares import Shares
from protocols.truncation import rescale

HEAD_INPUT_FRAC, TIED_INPUT_FRAC = 14, 13  # of what the head reads; its matrix has TABLE_FRAC, and may be the embedding's table
Columns = Annotated[int, msgspec.Meta(ge=0, le=2**30)]
LEAST_OPENED_FRAC = 8  # of a weight where what is opened is too large for more; 2^-9 |x| is then the error of it


class Linear(Node):
    """x (..., in) -> x W + b (..., out). weight (in, out), bias (out) or none: both private.

    `tied_to` names the Embedding whose table (out, in) is this weight, transposed: one weight, encoded and masked once.
    """

    op = "linear"
    inexact: ClassVar[Mapping[str, str]] = {"weight": "generic"}
    required = ("weight",)
    optional: ClassVar[tuple[str, ...]] = ("bias",)
    encoded: ClassVar[tuple[str, ...]] = ("weight",)
    rowwise = True
    reads_stream: ClassVar[bool] = False
    """Whether it reads the residual stream as it is: what is rounded there is in every later layer. It then has all its fraction bits."""

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """The table, if the weight is one's."""

        tied_to: str | None = None

    class Plan(ProductPlan, frozen=True, kw_only=True):
        """`in_frac`: to which the input is rounded first. `small`: see `protocols.linear.Weight`.

        `raw`: the reader gets the product as it is; otherwise it is rounded to `out_bits` and `out_frac`, where they are given, or to
        the graph's. `fine`: the fraction bits that the columns from `fine_from` to before `fine_to` have besides.
        """

        ring: Bits
        in_frac: Bits
        weight_frac: Bits
        raw: Bits = 0
        fine: Bits = 0
        fine_from: Columns = 0
        fine_to: Columns = 0
        out_frac: Bits | None = None
        out_bits: Bits | None = None
        small: Bits = 0
        bits: Bits
        frac: Bits

        def record(self) -> dict[str, int]:
            found = super().record()
            return {key: found[key] for key in ("ring", "weight_frac")} | found if self.raw else found

        def input_ring(self, frac: int) -> int:
            return self.ring + frac - self.in_frac

        @property
        def needs(self) -> int:
            return max(self.input_ring(FRAC), self.out_bits or 0)

        @property
        def output(self) -> tuple[int, int] | None:
            if self.raw:
                return None
            return (self.bits, self.frac) if self.out_bits is None or self.out_frac is None else (self.out_bits, self.out_frac)

    plan: Plan

    def check(self) -> None:
        weight, bias = self.parameter_shapes["weight"], self.parameter_shapes.get("bias")
        if len(weight) != 2 or (bias is not None and bias != weight[1:]):
            raise self.fail("weight must be (in, out) and bias (out)")

    def output_shape(self, *shapes: Shape) -> Shape:
        return matrix_output(self, shapes[0])

    def generic(self, x: Any, *others: Any) -> Any:
        y = x.matmul(self.value("weight"))
        bias = self.maybe("bias")
        return y if bias is None else y.add(bias)

    def encoded_value(self, key: str) -> Any:
        return self.as_planned(self.value(key)) if key in ("weight", "bias") else self.value(key)

    def as_planned(self, output: Tensor) -> Tensor:
        if not self.plan.fine:
            return output
        scaled = output.detach().numpy().copy()  # where the weights are, that is on the CPU, whatever device computes
        scaled[..., self.plan.fine_from : self.plan.fine_to] *= 2.0**self.plan.fine
        return torch.from_numpy(scaled)

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        plan, party = self.plan, x.party
        weight = x.runtime.weights[f"{self.tied_to or self.shared_with or self.name}.weight"]
        ring = plan.input_ring(plan.in_frac)
        reduced = yield from parallel(*(rescale(party, value.shares, bits=ring, frac=plan.in_frac) for value in (x, *others)))
        y = yield from self.times(x.runtime, reduced, weight)
        y = add_server_constant(party, y, self.constant_of(x.runtime, "bias", plan.in_frac + weight.frac))
        if plan.output is None or plan.output == (y.bits, y.frac):
            return y
        bits, frac = plan.output
        return (yield from rescale(party, y, bits=bits, frac=frac))

    def times(self, runtime: Runtime, x: list[Shares], weight: Weight) -> Protocol_[Shares]:
        """The product with the matrix, of values side by side."""
        return times_matrix(runtime.party, x, weight, bits=self.plan.ring, transposed=bool(self.tied_to))

    def users(self, planning: Planning) -> list[Linear]:
        """The nodes whose plan is to be one with this node's, itself among them: those that have its weight in common."""
        return [self]

    def make_plan(self, planning: Planning) -> Plan:
        users = self.users(planning)
        bound, readers = max(planning.out(node.name) for node in users), {node.name: planning.readers(node.name) for node in users}
        makers = [planning.maker(node.name) for node in users]
        opens = {reader.opens for name in readers for reader in readers[name]}
        in_frac, weight_frac = max(INPUT_FRAC if maker is None else maker.precision for maker in makers), MATRIX_FRAC
        ring, raw, out_frac, out_bits = bits_for(self.name, in_frac + weight_frac, bound), 0, None, None
        if planning.reads_ids() and planning.is_output(self.name):
            # the head: what is compared, and what is shown, are reductions of the product
            in_frac, weight_frac = TIED_INPUT_FRAC if self.tied_to else HEAD_INPUT_FRAC, TABLE_FRAC
            out_frac, out_bits = HEAD_FRAC, bits_for(self.name, LOGIT_FRAC, bound) + HEAD_FRAC - LOGIT_FRAC
            ring = out_bits + in_frac + weight_frac - out_frac
        elif opens == {"product"}:
            (ring, in_frac, weight_frac), raw = self._opened(planning, readers), 1
        elif opens == {"value"}:
            # straight into the ring that is opened, by a reduction
            headroom = max(reader.wants(planning, name).headroom for name in readers for reader in readers[name])
            ring, out_frac, out_bits = max(ring, up(headroom + INPUT_FRAC + MATRIX_FRAC)), COMPARED_FRAC, headroom + COMPARED_FRAC
        if self.reads_stream and in_frac == INPUT_FRAC and out_frac != HEAD_FRAC and not raw and ring < 64:
            in_frac, ring = in_frac + 1, ring + 1
        return self.Plan(
            ring=ring,
            in_frac=in_frac,
            weight_frac=weight_frac,
            raw=raw,
            **(self._fine(planning, readers[self.name], ring - in_frac - weight_frac, weight_frac) if raw and len(users) == 1 else {}),
            out_frac=out_frac,
            out_bits=out_bits,
            small=int(is_small(self.value("weight"), weight_frac)),
            bits=planning.bits,
            frac=planning.frac,
        )

    def _opened(self, planning: Planning, readers: Mapping[str, list[Node]]) -> tuple[int, int, int]:
        """(ring, fraction bits of input and weight) where the product itself is opened.

        The ring is wide enough for every later truncation to reduce.
        """
        wanted = [reader.wants(planning, name) for name in readers for reader in readers[name]]
        headroom, in_frac = max(self.headroom(planning, each) for each in wanted), wanted[0].in_frac
        for weight_frac in range(wanted[0].weight_frac, LEAST_OPENED_FRAC - 1, -1):
            ring = in_frac + weight_frac + headroom
            if ring + FRAC - in_frac <= 64:
                return ring, in_frac, weight_frac
        raise next(iter(readers.values()))[0].unfit(planning)

    def _fine(self, planning: Planning, readers: Sequence[Node], headroom: int, weight_frac: int) -> dict[str, int]:
        """Fraction bits of columns whose reader needs less headroom than there is; no more than keep the weight as small as it is."""
        if not planning.sole_reader(self.name):
            return {}
        start, stop, needed = readers[0].wants(planning, self.name).fine
        weight = self.value("weight")
        fine = max(0, min(MOST_FINE, headroom - needed)) if start < stop else 0
        while fine and is_small(weight, weight_frac) and not is_small(weight[:, start:stop], weight_frac + fine):
            fine -= 1
        return {"fine": fine, "fine_from": start, "fine_to": stop} if fine else {}

    def headroom(self, planning: Planning, wanted: Wanted) -> int:
        """The bits above the fraction that a reader is given."""
        return wanted.headroom

    def encoding(self, key: str) -> tuple[int, int, bool]:
        return self.plan.ring, self.plan.weight_frac, bool(self.plan.small)

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        yield Shown("product", self.plan.ring, self.plan.in_frac + self.plan.weight_frac, own.get("out"))


def linear(b: Builder, x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    """x (..., in) @ weight (in, out) + bias (out)."""
    values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return b.by_rows(Linear, x, **values)


@rule(aten.linear.default)
def linear_of_constants(b: Builder, x: Any, weight: Any, bias: Any = None) -> Any:
    """x weight^T + bias, where weight and bias are the server's."""
    if not (isinstance(x, Value) and isinstance(weight, Constant) and (bias is None or isinstance(bias, Constant))):
        return NotImplemented
    return linear(b, x, weight.tensor.float().t(), None if bias is None else bias.tensor.float())


def tie_tables(graph: Graph) -> None:
    """Let a linear map whose matrix is an embedding's table, transposed, say so, and share its memory."""
    tables = [node for node in graph.nodes if node.reads_ids]
    for node in graph.nodes:
        for table in tables:
            weight = table.value("weight").t()
            plain = isinstance(node, Linear) and "bias" not in node.parameter_shapes
            if plain and node.value("weight").shape == weight.shape and torch.equal(node.value("weight"), weight):
                node.tied_to = table.name
                node.set_parameter("weight", weight)
                break
