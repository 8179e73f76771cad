"""An inner linear model of each head that learns while a text is read, with the weights that it keeps between tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from privinf.crypten_adapter import crypten_module
from privinf.graph.builder import Builder, Value, as_constant, as_value, rule
from privinf.graph.node import Node, Shape
from privinf.graph.planning import FRAC, SMALLEST, Bits, Planning, Shown, up
from privinf.graph.planning import Plan as AnyPlan
from privinf.graph.private import PrivinfTensor
from protocols.errors import RangeError
from protocols.inner import OUT, QK_FRAC, STEP, WEIGHT_FRAC, Inner, Learnt, inner_linear
from protocols.party import Protocol_
from protocols.recurrence import inner_descent
from protocols.ring import blank
from protocols.shares import Shares

STEEPEST = 1.0  # of a mini-batch's K^T K at calibration: below 2 no step lengthens W, and what it adds is K^T V


class Ttt(Node):
    """z_t = q_t W_t of every head, W learning v from k by gradient descent: q, k, v (B, T, H P) -> (B, T, H P).

    weight (H, P, P): the W that a text begins with. `batch`: positions whose gradients are taken at one W.
    """

    op = "ttt"
    arity = 3
    required = ("weight",)
    state = ("start", "now")
    any_length = True
    peaks_kept = ("steepness",)
    summed = ("drift",)
    batch: int

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """Of a mini-batch."""

        batch: Annotated[int, msgspec.Meta(ge=1, le=1024)]

    class Plan(AnyPlan, frozen=True, kw_only=True):
        """`ring`: of all products and openings."""

        ring: Bits
        bits: Bits
        frac: Bits

        def __post_init__(self) -> None:
            """A peer's plan is held to the fraction bits that the protocol has."""
            if self.ring <= OUT + 1:
                raise ValueError("a ring that does not hold the fraction bits of an inner model")

        @property
        def needs(self) -> int:
            return self.ring + FRAC - QK_FRAC

    plan: Plan

    @property
    def heads(self) -> int:
        """H."""
        return self.parameter_shapes["weight"][0]

    def check(self) -> None:
        weight = self.parameter_shapes["weight"]
        if len(weight) != 3 or weight[1] != weight[2] or 0 in weight:
            raise self.fail("weight must be (H, P, P)")

    def output_shape(self, *shapes: Shape) -> Shape:
        heads, width, _ = self.parameter_shapes["weight"]
        if len(set(shapes)) != 1 or len(shapes[0]) != 3 or shapes[0][2] != heads * width:
            raise self.fail(f"shapes {[list(shape) for shape in shapes]} are not those of q, k, v of {heads} heads of {width}")
        return shapes[0]

    def generic(self, x: Any, *others: Any) -> Any:
        weight = self.value("weight")
        if isinstance(x, torch.Tensor):
            return inner_descent(x, others[0], others[1], weight.to(x), self.batch)
        return inner_descent(x, others[0], others[1], weight, self.batch, lambda parts, dim: crypten_module().cat(parts, dim=dim))

    # ---- shares

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        runtime, shape = x.runtime, x.shares.shape
        q, k, v = (
            value.shares.map(lambda s: s[0].reshape(shape[1], self.heads, -1).transpose(0, 1)) for value in (x, *others)
        )  # (H, T, P)
        before: Mapping[str, Any] = runtime.state.get(self.name, {})
        first = before["start"] if before else self._first(x)
        last, how = before["now"] if before else first, Inner(self.plan.ring, self.batch)
        z, start, now = yield from inner_linear(x.party, q, k, v, first, last, runtime.offset, how)
        self.keep(runtime, start=start, now=now)
        return (yield from self.canonical(x.party, z.map(lambda s: s.transpose(0, 1).reshape(shape))))

    def _first(self, x: PrivinfTensor) -> Learnt:
        """What a text begins with: S's, which adds it to a share of nothing."""
        shape, constant = self.parameter_shapes["weight"], self.constant_of(x.runtime, "weight", WEIGHT_FRAC)
        value = x.shares.value
        if value.is_meta:
            return Learnt(Shares(blank(*shape), self.plan.ring, WEIGHT_FRAC))
        return Learnt(Shares(value.new_zeros(shape) if constant is None else constant, self.plan.ring, WEIGHT_FRAC))

    # ---- the ring plan

    def measure(self, inputs: tuple[Tensor, ...], output: Tensor) -> Iterator[tuple[str, Tensor]]:
        q, k, v = (value.double().reshape(*value.shape[:2], self.heads, -1).transpose(1, 2) for value in inputs)  # (B, H, T, P)
        weight = self.value("weight").double()[None]
        yield "weight", weight.flatten(2).norm(dim=-1)
        for at in range(0, q.shape[2], self.batch):
            q_, k_, v_ = (part[:, :, at : at + self.batch] for part in (q, k, v))
            error, scores = k_ @ weight - v_, q_ @ k_.mT
            yield "values", torch.stack([part.abs().max() for part in (error, v_, q_ @ weight, scores, scores.tril() @ error)])
            yield "steepness", torch.linalg.matrix_norm(k_.mT @ k_, 2)
            yield "drift", (k_.mT @ v_).flatten(2).norm(dim=-1)
            weight = weight - k_.mT @ error

    def name_of(self, part: str) -> str:
        told = {"values": "a value in a mini-batch", "weight": "the first weight", "drift": "a step", "steepness": "the size of a step"}
        return told.get(part) or super().name_of(part)

    def bound_of(self, part: str, ranges: Mapping[str, float]) -> float:
        return 2 * STEEPEST if part == "steepness" else super().bound_of(part, ranges)

    def make_plan(self, planning: Planning) -> Plan:
        ranges = planning.ranges[self.name]
        if (steepest := float(ranges["steepness_seen"])) > STEEPEST:
            raise RangeError(
                f"a mini-batch's keys have a product of norm {steepest:.3g}; the plan allows for {STEEPEST:g}, and beyond 2 W may grow",
                layer=self.name,
                remedy="train with smaller keys, or smaller mini-batches",
            )
        positions = max(planning.info.n_positions, *(size or 1 for spec in planning.info.inputs for size in spec.shape[1:2]), 1)
        # no step lengthens what W was, so that it is at most the first and what all of a context's mini-batches add
        weight = float(ranges["weight"]) + math.ceil(positions / self.batch) * float(ranges["drift"])
        values = max(float(ranges["values"]), float(ranges["out"]), SMALLEST)
        ring = max(up(OUT + math.log2(values) + 2), up(STEP + math.log2(max(weight, 1.0)) + 2))
        if ring + FRAC - QK_FRAC > 64:
            raise RangeError(f"weights up to {weight:g} and values up to {values:g} do not fit a ring of 64 bits", layer=self.name)
        return self.Plan(ring=ring, bits=planning.bits, frac=planning.frac)

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        yield Shown("products", self.plan.ring, OUT, own.get("values"))
        yield Shown("inner weight", self.plan.ring, STEP, 2.0 ** (self.plan.ring - STEP - 2), "calibration, for all of a context")


@rule(torch.ops.privinf.ttt.default)
def ttt(b: Builder, q: Any, k: Any, v: Any, weight: Any, batch: int) -> Value:
    """Of the operator that `protocols.recurrence` defines."""
    return b.emit(Ttt, as_value(q), as_value(k), as_value(v), weight=as_constant(weight).float(), batch=batch)
