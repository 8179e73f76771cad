"""What the reciprocal takes: for each table a one-hot of the index's mask with its sign, and products of bits, masks and signs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from protocols.correlations import Role, Tensors
from protocols.reciprocal import INDEX_BITS, ReciprocalMask, _places, sum_bits
from protocols.ring import reduce
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.shared import (
    and_,
    bit,
    bit_to_arithmetic,
    bits_of_sum,
    crossed,
    one_hot,
    one_sided,
    select,
    sign_value,
    times_sign,
)
from protocols.table import ones, own_sign, rotated


class _Sum(NamedTuple):
    """The sum's mask at one party: its own part, and its share of the bits of both."""

    own: Tensor
    bits: Secret

    def into(self, at: int) -> Secret:
        """The carry into a bit."""
        return Secret(bit(self.bits.value, at) ^ bit(self.own, at), 1, True)


@makes(ReciprocalMask)
def reciprocal_mask(pair: Pair, kind: ReciprocalMask, own: Tensors) -> Protocol_[Made]:
    """The bits of r; of these each table's one-hot, and beside it l and b l - a; then times the sign; then times products of rhos.

    Learns: nothing, either.
    """
    ring = sum_bits(kind.frac, kind.number)
    r = reduce(pair.mask(kind.sum).value, ring)
    bits, choices = yield from parallel(bits_of_sum(pair, Secret(r, ring), ring), _choices(pair, kind, own[1] if kind.number > 1 else None))
    mask = _Sum(r, bits)
    found = yield from parallel(*(_table(pair, kind, mask, own[0][p], p, choices) for p in range(kind.number)))
    words = torch.stack([hot for hot, _ in found])
    return Made((words, torch.cat([products for _, products in reversed(found)])))


def _choices(pair: Pair, kind: ReciprocalMask, rho: Tensor | None) -> Protocol_[list[Secret]]:
    """The products of the rhos of one table and more, in the kind's order: each new rho, and it times all before."""
    products: list[Secret] = []
    for table in reversed(range(1, kind.number)):
        assert rho is not None
        new = bit(rho, table - 1)
        if products:
            many = len(products)
            words = sum((product.value << k for k, product in enumerate(products)), torch.zeros_like(new))
            both = yield from and_(pair, Secret(words, many, True), Secret(-new & ((1 << many) - 1), many, True))
            products += [Secret(new, 1, True), *(Secret(bit(both.value, k), 1, True) for k in range(many))]
        else:
            products.append(Secret(new, 1, True))
    return products


def _table(pair: Pair, kind: ReciprocalMask, r: _Sum, masks: Tensor, table: int, choices: list[Secret]) -> Protocol_[tuple[Tensor, Tensor]]:
    """The words of a table's one-hot, and its products, (4 2^above, ...)."""
    hot, (low, line) = yield from parallel(_hot(pair, r, _places(kind.frac, table)[0]), _line(pair, kind, r, masks, table))
    sign = own_sign(ones(hot).sum(-1), server=pair.is_server)
    values = Secret(torch.stack([masks[1], low.value, line.value]), kind.bits)
    alone, signed = yield from parallel(sign_value(pair, sign, kind.bits), times_sign(pair, sign, values))
    terms = torch.cat([alone.value[None], signed.value])
    above = choices[: (1 << (kind.number - 1 - table)) - 1]
    if not above:
        return hot, terms
    every = Secret(terms.expand(len(above), *terms.shape), kind.bits)
    choice = torch.stack([chosen.value for chosen in above])[:, None].expand(every.shape)
    chosen = yield from select(pair, Secret(choice, 1, True), every, kind.bits)
    return hot, torch.cat([terms, chosen.value.flatten(0, 1)])


def _hot(pair: Pair, r: _Sum, at: int) -> Protocol_[Tensor]:
    """The words of the one-hot of -(r >> at): that of ~(r >> at), whose bits are r's turned round, one place on."""
    turned = r.bits.value ^ (-1 if pair.is_server else 0)
    hot = yield from one_hot(pair, Secret(reduce(turned, r.bits.bits), r.bits.bits, True), INDEX_BITS, at)
    return rotated(hot.value, torch.zeros_like(r.own) + 1)


def _line(pair: Pair, kind: ReciprocalMask, r: _Sum, masks: Tensor, table: int) -> Protocol_[tuple[Secret, Secret]]:
    """l, the bits of r from `low` to below `at`, and b l - a.

    l = l_S + l_C + e - 2^n c for the n bits of each party and the carries e into them and c out of them.
    """
    at, start = _places(kind.frac, table)
    width, ring, (a, b) = at - start, kind.bits, masks
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
