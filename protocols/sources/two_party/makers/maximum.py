"""What a tournament takes: the masks of upper bits, and the products of the bits by which a candidate wins."""

from __future__ import annotations

import torch
from torch import Tensor

from protocols.correlations import Tensors
from protocols.maximum import SelectorMask, UpperMask, _group, _opponents
from protocols.ring import like
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.shared import and_, bit_to_arithmetic, select, upper
from protocols.sources.two_party.sketch import sketch


@makes(UpperMask)
def upper_mask(pair: Pair, kind: UpperMask, own: Tensors) -> Protocol_[Made]:
    """r >> shift, exactly: each party shifts its share, and the carry of the lower bits is added. Learns: nothing, either."""
    made = yield from upper(pair, pair.mask(kind.wire), kind.shift, kind.bits)
    return Made((made.value,) if kind.deals else (), made)


def _rhos(pair: Pair, kind: SelectorMask, rho: Tensor) -> Tensor:
    """(H, groups, size - 1, size - 1): of every candidate but the last and each opponent."""
    heads, groups, candidates, _ = kind.shape
    if pair.traced:
        return sketch((heads, groups, candidates, candidates))
    return rho[..., like(_opponents(candidates + 1)[0], rho)]


@makes(SelectorMask)
def selector_mask(pair: Pair, kind: SelectorMask, own: Tensors) -> Protocol_[Made]:
    """Products of rhos by ANDs, in words, a doubling for each opponent; then each to arithmetic, or times r_i - r_last.

    Learns: nothing, either.
    """
    rho = _rhos(pair, kind, pair.mask(kind.compare).value)
    opponents = rho.shape[-1]
    products = [rho[..., 0]]  # by sets of opponents, as the kind's second index counts them from 1
    for k in range(1, opponents):
        new = rho[..., k]
        left, right = torch.zeros_like(new), torch.zeros_like(new)
        for at, product in enumerate(products):
            left, right = left | (product << at), right | (new << at)
        both = yield from and_(pair, Secret(left, len(products), True), Secret(right, len(products), True))
        products += [new, *((both.value >> at) & 1 for at in range(len(products)))]
    value = Secret(torch.stack(products, -1), 1, True)
    if not kind.wire:
        made = yield from bit_to_arithmetic(pair, value, kind.bits)
        return Made((made.value,))
    r = pair.mask(kind.wire)
    if pair.traced:
        difference = sketch(kind.shape)
    else:
        found = r.value[:, like(_group(kind.rows, kind.level, kind.group).index, r.value)]
        difference = (found[..., :-1] - found[..., -1:])[..., None].expand(kind.shape)
    (made,) = yield from parallel(select(pair, value, Secret(difference, r.bits), kind.bits))
    return Made((made.value,))
