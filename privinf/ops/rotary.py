"""Rotary positions of heads that lie side by side."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from privinf.crypten_adapter import crypten_module
from privinf.graph.builder import Builder, Value, rule
from privinf.graph.kinds import Product
from privinf.graph.node import Shape
from privinf.graph.planning import FRAC, Planning, ProductPlan, bits_for
from privinf.graph.private import PrivinfTensor
from protocols.party import Protocol_
from protocols.rotary import FRAC as TABLE_FRAC
from protocols.rotary import Rotation, floats, rotate, turned
from protocols.shares import Shares


class Rotary(Product):
    """x (B, T, heads * width), every head turned by its position. Where it stands before attention, that node takes the rotation over."""

    op = "rotary"
    any_length = True
    batches = True
    rotation: Rotation

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """The angles, with the width of a head."""

        rotation: Rotation

    plan: ProductPlan

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        if len(shape) != 3 or shape[2] % self.rotation.width:
            raise self.fail(f"{list(shape)} does not hold heads of {self.rotation.width}")
        return shape

    def generic(self, x: Any, *others: Any) -> Any:
        batch, count, width = x.size()
        apart = x.reshape(batch, count, -1, self.rotation.width).permute(0, 2, 1, 3)  # (B, heads, T, width)
        return turned_floats(apart, self.rotation, 0).permute(0, 2, 1, 3).reshape(batch, count, width)

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        shape, width = x.shares.shape, self.rotation.width
        apart = x.shares.narrow(self.plan.ring).map(lambda v: v.reshape(*shape[:2], -1, width).transpose(1, 2))
        y = rotate(apart, self.rotation, x.runtime.windows(apart.shape[-2]), varying=x.party.varying)
        return (yield from self.canonical(x.party, y.map(lambda v: v.transpose(1, 2).reshape(shape))))

    def make_plan(self, planning: Planning) -> ProductPlan:
        ring = bits_for(self.name, FRAC + TABLE_FRAC, planning.out(self.name))
        return self.Plan(ring=ring, bits=planning.bits, frac=planning.frac)


def turned_floats(x: Any, rotation: Rotation, start: int) -> Any:
    """x (..., T, width) of positions from `start`: floats, or stock CrypTen's."""
    cosine, sine = floats(rotation, start, start + x.size(-2))
    if isinstance(x, torch.Tensor):
        return turned(x, cosine.to(x), sine.to(x))
    return turned(x, cosine, sine, lambda parts, dim: crypten_module().cat(parts, dim=dim))


@rule(torch.ops.privinf.rotary.default)
def rotary(b: Builder, x: Value, *fields: Any) -> Value:
    """Of the operator that `protocols.rotary` defines."""
    return b.emit(Rotary, x, rotation=Rotation(*fields))
