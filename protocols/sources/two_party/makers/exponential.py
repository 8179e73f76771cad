"""What the exponential takes: the one-hot of the sum of two private digits, and two products of a private mask and a private factor."""

from __future__ import annotations

import torch
from torch import Tensor

from protocols.correlations import Role, Tensors
from protocols.exponential import DROP, FACTOR_BITS, HIGH, KEPT_BITS, LOW, OUT_BITS, ExpMask, factor
from protocols.ring import blank, reduce
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair
from protocols.sources.two_party.shared import one_hot_of_sum, one_sided


@makes(ExpMask)
def exp_mask(pair: Pair, kind: ExpMask, own: Tensors) -> Protocol_[Made]:
    """The one-hot of -(R_S,h + R_C,h) by doubling; each party's sign from its share of it, and with that its factor; a_C x_S - a_S x_C.

    The products keep no more than the bits that the online phase reads: what the lower bits of a factor choose is rounded before it
    is sent, which is right on average. Rounds: 13. Transfers: 10 of 1 to 31 bits and 10 for ANDs; 42 for the products, of 22 bits at
    most; in all 1106 bits an element, both directions, beside the transfers' own. Learns: nothing, either; all that travels is uniform.
    """
    r = pair.uniform(kind.shape, LOW + HIGH)
    if not pair.traced:
        r = kind.difference(pair.mask(kind.x).value, pair.mask(kind.maximum).value)
    hot = yield from one_hot_of_sum(pair, reduce(-(r >> LOW), HIGH), HIGH)
    x = r if pair.traced else factor(r, hot.value, server=pair.is_server)
    by_client, by_server = yield from parallel(*(_times(pair, sender, own[0], x) for sender in Role))
    return Made((hot.value, reduce(by_server - by_client, KEPT_BITS)))


def _times(pair: Pair, sender: Role, mask: Tensor, x: Tensor) -> Protocol_[Tensor]:
    """Shares of a x / 2^DROP modulo 2^KEPT_BITS: a in Z_2^OUT_BITS at the sender, |x| < 2^FACTOR_BITS at the receiver.

    x + 2^FACTOR_BITS is chosen from bit by bit. Of its low DROP bits, bit i takes a 2^i / 2^DROP rounded; the others are exact.
    """
    count, sends = FACTOR_BITS + 1 - DROP, pair.role is sender
    terms, bits = blank(DROP, *mask.shape), blank(DROP, *mask.shape)
    offset = x + (1 << FACTOR_BITS)
    if not pair.traced:
        places = torch.arange(DROP, device=x.device).reshape(-1, *[1] * x.dim())
        if sends:
            terms = reduce(((reduce(mask, OUT_BITS) << places) + (1 << (DROP - 1))) >> DROP, KEPT_BITS)
        else:
            bits = (offset >> places) & 1
    upper, at_receiver = one_sided(pair, sender, mask, offset >> DROP)
    low, high = yield from parallel(
        pair.transfers.correlated(sender, bits, terms, KEPT_BITS),
        pair.transfers.product(sender, upper, at_receiver, KEPT_BITS, count),
    )
    share: Tensor = low.sum(0) + high
    return share - (mask << (FACTOR_BITS - DROP)) if sends else share
