"""A linear map with a weight that several nodes have in common, and of each a difference of low rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from privinf.crypten_adapter import crypten_module
from privinf.graph.node import Node, Shape
from privinf.graph.planning import FRAC, Bits, Planning, Shown, Wanted, is_small
from privinf.graph.private import Runtime
from privinf.ops.linear import Linear
from protocols.linear import Weight
from protocols.linear import linear as times_matrix
from protocols.party import Protocol_, parallel
from protocols.shares import Shares
from protocols.truncation import rescale

DOWN_MORE = 12  # bits by which x A is made in a wider ring, so that rounding it is a reduction


class SharedLinear(Linear):
    """x -> x W + (x A) B + b, of one value (..., in) or of two side by side. W (in, out), A (in, r), B (r, out), b (out).

    W may be that of an earlier node, `shared_with`: one weight, encoded and masked once for all. A (`down`) and B (`up`) are the node's
    own, or absent. Source: Bae et al., "Relaxed Recursive Transformers" (arXiv 2410.20672).
    """

    op = "shared_linear"
    arity = None
    optional = ("bias", "down", "up")
    encoded = ("weight", "down", "up")
    shared_with: str | None

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """The node that the weight is of, if it is not this one's."""

        shared_with: str | None = None

    class Plan(Linear.Plan, frozen=True, kw_only=True):
        """All nodes with the same weight have the same of a map's, and where there is a difference:

        `down_ring`: the ring of x A, which is then rounded to `in_frac` + `down_frac` - (`down_ring` - `ring`) fraction bits; those of
        both factors, and whether they are small (`protocols.linear.Weight`).
        """

        down_ring: Bits = 0
        down_frac: Bits = 0
        up_frac: Bits = 0
        down_small: Bits = 0
        up_small: Bits = 0

        def input_ring(self, frac: int) -> int:
            return max(self.ring, self.down_ring) + frac - self.in_frac

        def __post_init__(self) -> None:
            """A peer's plan is held to what the protocol can do."""
            more = self.down_ring - self.ring
            fits = 0 <= more <= self.in_frac + self.down_frac and self.down_frac + self.up_frac == self.weight_frac + more
            if self.down_ring and not fits:
                raise ValueError("factors of a difference that do not fit the map")

    plan: Plan

    # ---- shapes and floats

    def check(self) -> None:
        super().check()
        weight, down, up = (self.parameter_shapes.get(key) for key in ("weight", "down", "up"))
        assert weight is not None
        if (down is None) != (up is None) or (down is not None and up is not None and (*down, *up) != (weight[0], up[0], up[0], weight[1])):
            raise self.fail("down must be (in, r) and up (r, out)")

    def output_shape(self, *shapes: Shape) -> Shape:
        first = shapes[0]
        if len(shapes) > 2 or not first or any(shape[:-1] != first[:-1] for shape in shapes):
            raise self.fail(f"shapes {[list(shape) for shape in shapes]} do not line up along the last axis")
        return super().output_shape((*first[:-1], sum(shape[-1] for shape in shapes)))

    def generic(self, x: Any, *others: Any) -> Any:
        if others:
            x = torch.cat([x, *others], -1) if isinstance(x, Tensor) else crypten_module().cat([x, *others], dim=x.dim() - 1)
        y = super().generic(x)
        return y if "down" not in self.parameter_shapes else y.add(x.matmul(self.value("down")).matmul(self.value("up")))

    # ---- shares

    def times(self, runtime: Runtime, x: list[Shares], weight: Weight) -> Protocol_[Shares]:
        """Both maps in one round: x A is rounded by a reduction, and what C then sends of it depends on no query."""
        party, plan = runtime.party, self.plan
        shared = times_matrix(party, [part.narrow(plan.ring) for part in x], weight, bits=plan.ring)
        if not plan.down_ring:
            return (yield from shared)

        def difference() -> Protocol_[Shares]:
            down, up = (runtime.weights[f"{self.name}.{key}"] for key in ("down", "up"))
            y = yield from times_matrix(party, x, down, bits=plan.down_ring)
            y = yield from rescale(party, y, bits=plan.ring, frac=y.frac - (plan.down_ring - plan.ring))
            return (yield from times_matrix(party, y, up, bits=plan.ring))

        found: list[Shares] = yield from parallel(shared, difference())
        return found[0] + found[1]

    # ---- the ring plan

    def users(self, planning: Planning) -> list[Linear]:
        owner = self.shared_with or self.name
        return [node for node in planning.graph.nodes if isinstance(node, SharedLinear) and owner in (node.name, node.shared_with)]

    def _differ(self, planning: Planning) -> bool:
        return any("down" in node.parameter_shapes for node in self.users(planning))

    def _fine(self, planning: Planning, readers: Sequence[Node], headroom: int, weight_frac: int) -> dict[str, int]:
        return {}  # the factors of a difference have none

    def headroom(self, planning: Planning, wanted: Wanted) -> int:
        return (wanted.least or wanted.headroom) if self._differ(planning) else wanted.headroom

    def make_plan(self, planning: Planning) -> Plan:
        common = super().make_plan(planning)
        fields = {name: getattr(common, name) for name in Linear.Plan.__struct_fields__}
        if not self._differ(planning):
            return self.Plan(**fields)
        more = max(0, min(DOWN_MORE, 64 - (common.ring + FRAC - common.in_frac)))
        down_frac = math.ceil((common.weight_frac + more) / 2)
        up_frac = common.weight_frac + more - down_frac
        small = {"down_small": is_small(self.value("down"), down_frac), "up_small": is_small(self.value("up"), up_frac)}
        rings = {"down_ring": common.ring + more, "down_frac": down_frac, "up_frac": up_frac}
        return self.Plan(**fields, **rings, **{name: int(value) for name, value in small.items()})

    def encoding(self, key: str) -> tuple[int, int, bool]:
        plan = self.plan
        if key == "weight":
            return super().encoding(key)
        return (plan.down_ring, plan.down_frac, bool(plan.down_small)) if key == "down" else (plan.ring, plan.up_frac, bool(plan.up_small))

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        yield from super().inner_wires(own, source)
        if self.plan.down_ring:
            more = self.plan.down_ring - self.plan.ring
            yield Shown("x down", self.plan.ring, self.plan.in_frac + self.plan.down_frac - more, None, "any")
