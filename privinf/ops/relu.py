"""ReLU, and what it shares with every function that one comparison selects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from privinf.graph.builder import Builder, Value, aten, rule
from privinf.graph.node import Node
from privinf.graph.planning import COMPARED_FRAC, FRAC, Bits, Planning, Shown, Wanted, bits_for
from privinf.graph.planning import Plan as AnyPlan
from privinf.graph.private import PrivinfTensor
from protocols.activation import relu as larger_than_zero
from protocols.comparison import MAX_BITS
from protocols.errors import RangeError
from protocols.party import Party, Protocol_
from protocols.shares import Shares
from protocols.truncation import rescale


class Compared(Node):
    """An elementwise function of a value that is opened masked and compared, in rings of their own."""

    rowwise = True
    opens = "value"
    precision = 13  # GELU's own error is 2^-12
    product_bits: ClassVar[int] = 0  # the ring that is opened whatever is compared; 0: that of the comparison
    most_bits: ClassVar[int] = MAX_BITS  # of the comparison
    edge: ClassVar[int] = 4  # up to where it compares besides with 0, whatever the range

    class Plan(AnyPlan, frozen=True, kw_only=True):
        """`opened`: the ring in which the input is opened; `out_bits`: that of the result."""

        compare_bits: Bits
        opened: Bits
        bits: Bits
        frac: Bits
        out_frac: Bits
        out_bits: Bits

        @property
        def made_frac(self) -> int:
            """Fraction bits of what `function` makes."""
            return COMPARED_FRAC

        @property
        def needs(self) -> int:
            return self.opened + FRAC - COMPARED_FRAC

        @property
        def output(self) -> tuple[int, int]:
            return self.out_bits, self.out_frac

    plan: Plan

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        plan = self.plan
        opened = yield from rescale(x.party, x.shares, bits=plan.opened, frac=COMPARED_FRAC)
        y = yield from self.function(x.party, opened, plan.out_bits + plan.made_frac - plan.out_frac)
        return (yield from rescale(x.party, y, bits=plan.out_bits, frac=plan.out_frac))

    def function(self, party: Party, x: Shares, bits: int) -> Protocol_[Shares]:
        """Of what is opened, in Z_2^bits with the fraction bits that the plan says."""
        raise NotImplementedError

    def make_plan(self, planning: Planning) -> Plan:
        largest = planning.input_range(self.name, planning.out(self.name))
        compared = self.compared_in(self.name, largest)
        out_bits, out_frac = planning.output_for_readers(self.name)
        return self.Plan(
            compare_bits=compared,
            opened=self.product_bits or compared,  # whatever made the input
            bits=planning.bits,
            frac=planning.frac,
            out_frac=out_frac,
            out_bits=out_bits,
        )

    def compared_in(self, layer: str, bound: float) -> int:
        """The ring of a comparison of values up to `bound`."""
        bits = bits_for(layer, COMPARED_FRAC, max(bound, self.edge))
        if bits > self.most_bits:
            raise RangeError(f"values up to {bound:g} are too large to be compared in {self.most_bits} bits", layer=layer)
        return bits

    def wants(self, planning: Planning, maker: str) -> Wanted:
        return Wanted((self.product_bits or self.compared_in(maker, planning.out(maker))) - COMPARED_FRAC)

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        yield Shown("opened", self.plan.opened, COMPARED_FRAC, source)
        yield Shown("compared", self.plan.compare_bits, COMPARED_FRAC, source)


class Relu(Compared):
    """max(x, 0)."""

    op = "relu"

    def generic(self, x: Any, *others: Any) -> Any:
        return x.relu()

    def function(self, party: Party, x: Shares, bits: int) -> Protocol_[Shares]:
        return larger_than_zero(party, x, compare_bits=self.plan.compare_bits, bits=bits)


@rule(aten.relu.default)
def relu(b: Builder, x: Value) -> Value:
    """Of any shape."""
    return b.by_rows(Relu, x)
