"""The recurrence of all heads as one node, with the state that it keeps between tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from privinf.graph.builder import Builder, Value, as_value, rule
from privinf.graph.node import Node, Shape
from privinf.graph.planning import FRAC, SMALLEST, Bits, Planning, Shown, up
from privinf.graph.planning import Plan as AnyPlan
from privinf.graph.private import PrivinfTensor
from privinf.ops.last_position import last_of
from protocols.errors import RangeError
from protocols.party import Protocol_
from protocols.recurrence import recurrence
from protocols.scan import (
    B_FRAC,
    C_FRAC,
    DECAY_FRAC,
    FINEST,
    LARGEST_SHIFT,
    LONGEST,
    LOWEST,
    OUT,
    PUBLIC_FRAC,
    SCORE_FRAC,
    STATE_FRAC,
    WEIGHT_FRAC,
    X_FRAC,
    ScanRings,
    scan,
)
from protocols.scan import Scan as How
from protocols.shares import Shares

HEADROOM = 4.0  # of what decays sum to over a block
BLOCKS = tuple(1 << power for power in range(LONGEST.bit_length()))  # 1, 2, ... LONGEST positions


class Scan(Node):
    """y_t = c_t h_t, h_t = a_t h_(t-1) + u_t b_t x_t^T of every head: x (B, T, H P), b and c (B, T, N), z (B, T, H) -> (B, T, H P).

    a = 1 - 2^-shift of public `shifts`, one a head, and no z; or without them e^-z, z >= 0. u = 1 - a if `convex`, as with shifts, else 1.
    """

    op = "scan"
    arity = None
    state = ("state",)
    any_length = True
    peaks_kept = tuple(f"decay_{block}" for block in BLOCKS)
    heads: int
    shifts: tuple[int, ...]
    convex: bool
    last_only: bool

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """Its heads, the public decays if they are, whether u = 1 - a, and whether the last position is enough."""

        heads: int
        shifts: tuple[int, ...] = ()
        convex: bool = True
        last_only: bool = False

    class Plan(AnyPlan, frozen=True, kw_only=True):
        """`protocols.scan.ScanRings`."""

        score_bits: Bits
        weight_bits: Bits
        wide_bits: Bits
        block: Annotated[int, msgspec.Meta(ge=1, le=LONGEST)]
        bits: Bits
        frac: Bits
        finer: Annotated[int, msgspec.Meta(ge=0, le=FINEST)] = 0

        def __post_init__(self) -> None:
            """A peer's plan is held to the fraction bits that the protocol has."""
            if (
                self.score_bits <= B_FRAC + C_FRAC
                or self.weight_bits <= DECAY_FRAC + SCORE_FRAC
                or self.wide_bits <= STATE_FRAC + DECAY_FRAC
            ):
                raise ValueError("rings that do not hold the fraction bits of a scan")

        @property
        def rings(self) -> ScanRings:
            """For the protocol."""
            return ScanRings(self.score_bits, self.weight_bits, self.wide_bits, self.block, self.finer)

        @property
        def first(self) -> tuple[int, int] | None:
            return (self.wide_bits, self.rings.x_frac) if self.finer else None

        @property
        def needs(self) -> int:
            return max(self.wide_bits + FRAC - X_FRAC, self.rings.opened + FRAC - min(B_FRAC, C_FRAC))

    plan: Plan

    # ---- shapes and floats

    def check(self) -> None:
        if self.heads < 1 or (self.shifts and (len(self.shifts) != self.heads or not self.convex)):
            raise self.fail("it has one public decay a head, or none")
        if any(not 1 <= shift <= LARGEST_SHIFT for shift in self.shifts):
            raise self.fail(f"a shift lies between 1 and {LARGEST_SHIFT}")

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes) != (3 if self.shifts else 4) or any(len(shape) != 3 or shape[:2] != shapes[0][:2] for shape in shapes):
            raise self.fail(f"shapes {[list(shape) for shape in shapes]} are not those of x, b, c and decays")
        x, b, c, *z = shapes
        if x[2] % self.heads or b != c or (z and z[0][2] != self.heads):
            raise self.fail(f"shapes {[list(shape) for shape in shapes]} are not those of {self.heads} heads")
        return (x[0], 1, x[2]) if self.last_only else x

    def last_position_of(self) -> Node | None:
        return None if self.last_only else Scan(self.name, self.layer, **{**self.attributes(), "last_only": True})

    def generic(self, x: Any, *others: Any) -> Any:
        y = recurrence(x, others[0], others[1], None if self.shifts else others[2], self.shifts, self.convex)
        return last_of(y) if self.last_only else y

    # ---- shares

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        party, runtime, shape = x.party, x.runtime, x.shares.shape
        heads = x.shares.map(lambda v: v[0].reshape(shape[1], self.heads, -1).transpose(0, 1))  # (H, T, P)
        z = None if self.shifts else others[2].shares.map(lambda v: v[0].T)  # (H, T)
        before: Mapping[str, Any] = runtime.state.get(self.name, {})
        how = How(self.plan.rings, self.shifts, self.convex)
        if self.name in runtime.unread or (self.last_only and not runtime.every):
            how = replace(how, wanted="none" if self.name in runtime.unread else "last")
        y, state = yield from scan(party, heads, others[0].shares, others[1].shares, z, before.get("state"), how)
        self.keep(runtime, state=state)
        if y is None:
            return x.shares
        return (yield from self.canonical(party, y.map(lambda v: v.transpose(0, 1).reshape(1, -1, shape[2]))))

    # ---- the ring plan

    def measure(self, inputs: tuple[Tensor, ...], output: Tensor) -> Iterator[tuple[str, Tensor]]:
        x, b, c, *rest = (value.double() for value in inputs)
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.float64).tril()
        yield "factors", torch.stack([b.abs().max(), c.abs().max()])
        yield "scores", c.matmul(b.transpose(1, 2)).mul(past)
        largest = x.abs().reshape(*x.shape[:2], self.heads, -1).amax(-1) * b.abs().amax(-1, keepdim=True)  # (B, T, H), of b x^T
        # h_t = a h + u v is at most the largest u v / (1 - a), however many there are
        yield "state", largest if self.convex else largest / (-torch.expm1(-rest[0])).clamp(min=1e-6)
        total = rest[0].cumsum(1) if rest else torch.zeros(1, 1, 1)
        for block in BLOCKS:
            yield f"decay_{block}", total - torch.nn.functional.pad(total, (0, 0, block, 0))[:, : total.shape[1]]

    def name_of(self, part: str) -> str:
        if part.startswith("decay_"):
            return f"a decay over {part.removeprefix('decay_')} positions"
        return {"factors": "a value of b or c", "scores": "a score", "state": "a bound of the state"}.get(part) or super().name_of(part)

    def bound_of(self, part: str, ranges: Mapping[str, float]) -> float:
        if part.startswith("decay_"):
            return float(LOWEST) if part == f"decay_{self.plan.block}" else float("inf")
        return super().bound_of(part, ranges)

    def make_plan(self, planning: Planning) -> Plan:
        ranges = planning.ranges[self.name]
        factors, scores, state, out = (float(ranges[part]) for part in ("factors", "scores", "state", "out"))

        def ring(frac: int, bound: float) -> int:
            return up(frac + math.log2(max(bound, SMALLEST)) + 2)

        decay = PUBLIC_FRAC if self.shifts else DECAY_FRAC
        score_bits = max(ring(B_FRAC + C_FRAC, scores), B_FRAC + C_FRAC + 1)  # however small a network's scores are
        weight_bits = ring(decay + SCORE_FRAC, max(scores, factors, 1.0))
        # a state, and what is left of it; an output; and each factor that is opened for these
        wide_bits = max(ring(STATE_FRAC + DECAY_FRAC, max(state, 1.0)), ring(OUT, max(out, scores, factors)))
        plan = self.Plan(
            score_bits=min(score_bits, 64),
            weight_bits=min(weight_bits, 64),
            wide_bits=min(wide_bits, 64),
            block=self._block(ranges),
            bits=planning.bits,
            frac=planning.frac,
            finer=self._finer(planning, max(scores, factors)),
        )
        if max(plan.needs, score_bits, weight_bits, wide_bits) > 64:
            raise RangeError(f"scores up to {scores:g} and states up to {state:g} do not fit a ring of 64 bits", layer=self.name)
        return plan

    def _finer(self, planning: Planning, largest: float) -> int:
        """The fraction bits that x has besides: with so many a unit of x adds as much to a product as one of what x is multiplied by."""
        source = planning.source(self.name)
        if not (getattr(planning.maker(self.name), "any_frac", False) and planning.sole_reader(source)):
            return 0
        apart = math.log2(max(largest, SMALLEST) / max(planning.out(source), SMALLEST))
        return max(0, min(FINEST, math.floor((apart + WEIGHT_FRAC - X_FRAC) / 2)))

    def _block(self, ranges: Mapping[str, float]) -> int:
        """The most positions over which decays sum, with headroom, to what an exponential is right for."""
        if self.shifts:
            return LONGEST
        found = [block for block in BLOCKS if HEADROOM * float(ranges[f"decay_{block}_seen"]) <= LOWEST]
        if not found:
            raise RangeError(
                f"decays reach {float(ranges['decay_1_seen']):g} nats a position; the plan allows for {LOWEST / HEADROOM:g}",
                layer=self.name,
                remedy="train with smaller ones, or calibrate on inputs closer to those in use",
            )
        return max(found)

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        yield Shown("scores", self.plan.score_bits, B_FRAC + C_FRAC, own.get("scores"))
        yield Shown("state", self.plan.wide_bits, STATE_FRAC + DECAY_FRAC, own.get("state"))
        if not self.shifts:
            yield Shown(f"decays of {self.plan.block} positions", 20, 12, float(LOWEST), "protocol")


@rule(torch.ops.privinf.scan.default)
def recurrence_of_values(b: Builder, x: Any, into: Any, out: Any, z: Any, shifts: Any, convex: bool) -> Value:
    """Of the operator that `protocols.recurrence` defines."""
    values = [as_value(value) for value in (x, into, out, *(() if z is None else (z,)))]
    heads = len(shifts) if shifts else values[3].shape[2]
    return b.emit(Scan, *values, heads=heads, shifts=tuple(shifts), convex=convex)
