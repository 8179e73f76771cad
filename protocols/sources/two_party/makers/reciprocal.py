"""What the reciprocal takes: for each table a one-hot of the index's mask with its sign, and products of bits, masks and signs."""

from __future__ import annotations

import torch
from torch import Tensor

from protocols.correlations import Tensors
from protocols.reciprocal import INDEX_BITS, ReciprocalMask
from protocols.ring import reduce
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.lines import Index, part_and_line, turned_hot
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.shared import (
    and_,
    bit,
    bits_of_sum,
    select,
    sign_value,
    times_sign,
)
from protocols.table import ones, own_sign


@makes(ReciprocalMask)
def reciprocal_mask(pair: Pair, kind: ReciprocalMask, own: Tensors) -> Protocol_[Made]:
    """The bits of r; of these each table's one-hot, and beside it l and b l - a; then times the sign; then times products of rhos.

    Learns: nothing, either.
    """
    ring = kind.tables.bits(kind.frac)
    r = reduce(pair.mask(kind.sum).value, ring)
    bits, choices = yield from parallel(
        bits_of_sum(pair, Secret(r, ring), ring, quick=True), _choices(pair, kind, own[1] if kind.number > 1 else None)
    )
    mask = Index(r, bits)
    found = yield from parallel(
        *(_table(pair, kind, mask, own[0][p], p, choices[: (1 << (kind.number - 1 - p)) - 1]) for p in range(kind.number))
    )
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


def _table(pair: Pair, kind: ReciprocalMask, r: Index, masks: Tensor, table: int, above: list[Secret]) -> Protocol_[tuple[Tensor, Tensor]]:
    """The words of a table's one-hot, and its products, (4 2^above, ...)."""
    at, start = kind.tables.places(kind.frac, table)
    hot, (low, line) = yield from parallel(
        turned_hot(pair, r, at, INDEX_BITS), part_and_line(pair, r, masks[0], masks[1], start, at, kind.bits)
    )
    sign = own_sign(ones(hot).sum(-1), server=pair.is_server)
    values = Secret(torch.stack([masks[1], low.value, line.value]), kind.bits)
    alone, signed = yield from parallel(sign_value(pair, sign, kind.bits), times_sign(pair, sign, values))
    terms = torch.cat([alone.value[None], signed.value])
    if not above:
        return hot, terms
    every = Secret(terms.expand(len(above), *terms.shape), kind.bits)
    choice = torch.stack([chosen.value for chosen in above])[:, None].expand(every.shape)
    chosen = yield from select(pair, Secret(choice, 1, True), every, kind.bits)
    return hot, torch.cat([terms, chosen.value.flatten(0, 1)])
