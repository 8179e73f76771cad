"""What a table of lines takes: of a shared number's bits a one-hot of the upper ones, and the lower ones' value, times a slope's mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.ring import reduce
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.shared import bit, bit_to_arithmetic, crossed, one_hot, one_sided, select
from protocols.table import rotated


class Index(NamedTuple):
    """A number r at one party: its own part, and its share of the bits of both."""

    own: Tensor
    bits: Secret

    def into(self, at: int) -> Secret:
        """The carry into a bit."""
        return Secret(bit(self.bits.value, at) ^ bit(self.own, at), 1, True)


def turned_hot(pair: Pair, r: Index, at: int, width: int) -> Protocol_[Tensor]:
    """The words of the one-hot of -(r >> at): that of ~(r >> at), whose bits are r's turned round, one place on."""
    turned = r.bits.value ^ (-1 if pair.is_server else 0)
    hot = yield from one_hot(pair, Secret(reduce(turned, r.bits.bits), r.bits.bits, True), width, at)
    return rotated(hot.value, torch.zeros_like(r.own) + 1)


def part_and_line(pair: Pair, r: Index, a: Tensor, b: Tensor, start: int, at: int, ring: int) -> Protocol_[tuple[Secret, Secret]]:
    """l, the bits of r from `start` to below `at`, and b l - a, modulo 2^ring, for an entry's mask a and a slope's b.

    l = l_S + l_C + e - 2^n c for the n bits of each party and the carries e into them and c out of them.
    """
    width = at - start
    if not width:
        nothing = torch.zeros_like(a)
        return Secret(nothing, ring), Secret(-a, ring)
    part = reduce(r.own, at) >> start
    slope = Secret(b, ring)

    def cross(sender: Role) -> Protocol_[Tensor]:
        first, second = one_sided(pair, sender, reduce(b, ring), part)
        return pair.transfers.product(sender, first, second, ring, width)

    top, bottom = ring - width, [r.into(start)] if start else []
    carry = r.into(at)
    mixed, out, slope_out, *ins = yield from parallel(
        crossed(pair, cross),
        bit_to_arithmetic(pair, carry, top),
        select(pair, carry, slope, top),
        *(bit_to_arithmetic(pair, into, ring) for into in bottom),
        *(select(pair, into, slope, ring) for into in bottom),
    )
    low, line = part - (out.value << width), b * part + mixed - (slope_out.value << width) - a
    if ins:
        low, line = low + ins[0].value, line + ins[1].value
    return Secret(reduce(low, ring), ring), Secret(reduce(line, ring), ring)
