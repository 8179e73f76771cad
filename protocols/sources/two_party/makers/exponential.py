"""What the exponential takes: the one-hot of the sum of two private digits, and two products of a private mask and a private factor."""

from __future__ import annotations

import torch
from torch import Tensor

from protocols.correlations import Role, Tensors
from protocols.exponential import DROP, FACTOR_BITS, HIGH, LOW, ExpMask, factor, place_of
from protocols.ring import parity, reduce
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.shared import carry, one_hot_of_sum, one_sided, select_words


@makes(ExpMask)
def exp_mask(pair: Pair, kind: ExpMask, own: Tensors) -> Protocol_[Made]:
    """The one-hot of -(R_S,h + R_C,h) by doubling; each party's sign from its share of it, and with that its factor; a_C x_S - a_S x_C.

    Without a maximum the one-hot times the carry of the low digits besides, which is found beside it. The products keep no more than
    the bits that the online phase reads: what the lower bits of a factor choose is rounded before it is sent, which is right on
    average. Rounds: 13, or 23. Transfers: 20 for the one-hot, half of them for ANDs, and 42 for the products, of 22 bits at most
    beside a maximum; 1090 bits an element beside the transfers' own. Learns: nothing, either; all that travels is uniform.
    """
    r = pair.mask(kind.x).value
    if kind.maximum:
        r = pair.uniform(kind.shape, LOW + HIGH) if pair.traced else kind.difference(r, pair.mask(kind.maximum).value)
    r = reduce(r, LOW + HIGH)
    if kind.maximum:
        hot = yield from one_hot_of_sum(pair, place_of(r >> LOW), HIGH)
        words = hot.value[None]
    else:
        hot, over = yield from parallel(one_hot_of_sum(pair, place_of(r >> LOW), HIGH), carry(pair, r, LOW))
        # entry 0 does not travel: the entries' sum is the carry, since a one-hot's is 1
        rest = yield from select_words(pair, over, Secret((hot.value >> 1) & ((1 << 63) - 1), 63, True))
        second = (rest.value << 1) | (over.value ^ parity(rest.value))
        words = torch.stack([hot.value ^ second, second])
    x = r if pair.traced else factor(r, words, server=pair.is_server)
    by_client, by_server = yield from parallel(*(_times(pair, sender, own[0], x, kind.bits) for sender in Role))
    return Made((words, reduce(by_server - by_client, kind.bits - DROP)))


def _times(pair: Pair, sender: Role, mask: Tensor, x: Tensor, bits: int) -> Protocol_[Tensor]:
    """Shares of a x / 2^DROP modulo 2^(bits - DROP): a in Z_2^bits at the sender, |x| < 2^FACTOR_BITS at the receiver.

    x + 2^FACTOR_BITS is chosen from bit by bit. Of its low DROP bits, bit i takes a 2^i / 2^DROP rounded; the others are exact.
    """
    at_sender, at_receiver = one_sided(pair, sender, mask, x + (1 << FACTOR_BITS))
    share = yield from pair.transfers.product(sender, at_sender, at_receiver, bits - DROP, FACTOR_BITS + 1, DROP)
    return share - (mask << (FACTOR_BITS - DROP)) if pair.role is sender else share
