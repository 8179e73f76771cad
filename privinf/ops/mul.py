"""The elementwise product of two private values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from privinf.crypten_adapter import stock
from privinf.graph.builder import Builder, Value, as_value, aten, rule
from privinf.graph.kinds import OfTwo, Product
from privinf.graph.planning import FRAC, Bits, Planning, ProductPlan, Shown, bits_for
from privinf.graph.private import PrivinfTensor
from privinf.ops.scale import scale
from protocols.party import Protocol_
from protocols.product import multiply
from protocols.shares import Shares
from protocols.truncation import rescale


class Mul(OfTwo, Product, stock.Mul):  # type: ignore[misc]
    """Elementwise x y, two private values whose shapes broadcast; x may be y."""

    op = "mul"
    multiplies = True
    any_frac = True
    floats = stock.Mul

    class Plan(ProductPlan, frozen=True, kw_only=True):
        """`out_bits`, `out_frac`: of the result, where its readers want another ring than the graph's. `more`: fraction bits of both

        inputs together, beyond the graph's.
        """

        ring: Bits
        bits: Bits
        frac: Bits
        out_frac: Bits | None = None
        out_bits: Bits | None = None
        more: Bits = 0

        def input_ring(self, frac: int) -> int:
            return self.ring

        @property
        def output(self) -> tuple[int, int]:
            return (self.bits, self.frac) if self.out_bits is None or self.out_frac is None else (self.out_bits, self.out_frac)

    plan: Plan

    def make_plan(self, planning: Planning) -> Plan:
        fracs = planning.fracs(self.name)
        more = fracs[0] + fracs[-1] - 2 * FRAC
        ring = bits_for(self.name, 2 * FRAC + more, planning.out(self.name))
        bits, frac = planning.output_for_readers(self.name)
        own = {} if (bits, frac) == (planning.bits, planning.frac) else {"out_bits": bits, "out_frac": frac}
        return self.Plan(ring=ring, bits=planning.bits, frac=planning.frac, more=more, **own)

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        yield Shown("product", self.plan.ring, 2 * FRAC + self.plan.more, own.get("out"))

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        one, other = yield from self.opened(x, others[0])
        bits, frac = self.plan.output
        return (yield from rescale(x.party, multiply(x.party, one, other, self.plan.ring), bits=bits, frac=frac))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(b: Builder, x: Any, y: Any) -> Value:
    """x y, one of them private at least."""
    if isinstance(x, Value):
        return b.emit(Mul, x, y) if isinstance(y, Value) else scale(b, x, y)
    return scale(b, as_value(y), x)
