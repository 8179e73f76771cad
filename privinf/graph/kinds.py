"""What operators of a kind share: those that only move elements, those that multiply, those with a public number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import msgspec

from privinf.graph.node import Node, Shape, broadcast
from privinf.graph.planning import DIAGONAL_FRAC, FRAC, Bits, Planning, ProductPlan, Shown, bits_for
from privinf.graph.planning import Plan as AnyPlan
from privinf.graph.private import PrivinfTensor
from protocols.opening import open_masked
from protocols.party import Protocol_
from protocols.shares import Wire


class Moving(Node):
    """A node that only moves elements: free in every protocol."""

    moves = True

    def make_plan(self, planning: Planning) -> AnyPlan:
        fracs = set(planning.fracs(self.name))
        return self.Plan(bits=planning.bits, frac=fracs.pop() if len(fracs) == 1 else planning.frac)

    def run(self, x: PrivinfTensor, *others: PrivinfTensor) -> PrivinfTensor:
        return x.moved(self.generic)


class Numbered(Node):
    """A node with one public number."""

    rowwise = True
    constant: float

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """The number."""

        constant: float


class OfTwo(Node):
    """A node of two values whose shapes broadcast; `floats` is stock CrypTen's node for it, which is among its classes too."""

    arity = 2
    rowwise = True
    floats: ClassVar[Any]

    def output_shape(self, *shapes: Shape) -> Shape:
        return broadcast(self, *shapes)

    def generic(self, x: Any, *others: Any) -> Any:
        return self.floats.forward(self, (x, *others))


class Table(Node):
    """A node with a private table of rows, weight (rows, d), for graphs of any length."""

    required = ("weight",)
    any_length = True
    batches = True

    def check(self) -> None:
        if len(self.parameter_shapes["weight"]) != 2:
            raise self.fail("weight must be (rows, d)")


def matrix_output(node: Node, shape: Shape) -> Shape:
    """Of rows (..., in) that go through the node's weight (in, out)."""
    rows, columns = node.parameter_shapes["weight"]
    if not shape or shape[-1] != rows:
        raise node.fail(f"input {list(shape)} does not end in {rows}")
    return (*shape[:-1], columns)


class Product(Node):
    """A node whose output is a product that is rounded to the graph's fraction bits."""

    class Plan(ProductPlan, frozen=True, kw_only=True):
        """With the ring of the product."""

        ring: Bits
        bits: Bits
        frac: Bits

    plan: ProductPlan

    def make_plan(self, planning: Planning) -> ProductPlan:
        ring = bits_for(self.name, 2 * FRAC, planning.out(self.name))
        return self.Plan(ring=ring, bits=planning.bits, frac=planning.frac)

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        yield Shown("product", self.plan.ring, 2 * FRAC, own.get("out"))

    def opened(self, x: PrivinfTensor, other: PrivinfTensor) -> Protocol_[tuple[Wire, Wire]]:
        """Both factors on masked wires in the product's ring; one that is both is opened once."""
        values = [x.shares.narrow(self.plan.ring)] if other is x else [value.shares.narrow(self.plan.ring) for value in (x, other)]
        wires = yield from open_masked(x.party, values)
        return wires[0], wires[-1]


class Weighing(Product):
    """A node whose product is with a private weight, element by element."""

    required = ("weight",)
    encoded = ("weight",)

    class Plan(ProductPlan, frozen=True, kw_only=True):
        """With the fraction bits of the weight, and those of the input beyond the graph's."""

        ring: Bits
        weight_frac: Bits
        bits: Bits
        frac: Bits
        more: Bits = 0

    plan: Plan

    def make_plan(self, planning: Planning) -> Plan:
        more = planning.fracs(self.name)[0] - FRAC
        ring = bits_for(self.name, FRAC + more + DIAGONAL_FRAC, planning.out(self.name))
        return self.Plan(ring=ring, weight_frac=DIAGONAL_FRAC, bits=planning.bits, frac=planning.frac, more=more)

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        yield Shown("product", self.plan.ring, FRAC + self.plan.more + self.plan.weight_frac, own.get("out"))

    def encoding(self, key: str) -> tuple[int, int, bool]:
        return self.plan.ring, self.plan.weight_frac, False
