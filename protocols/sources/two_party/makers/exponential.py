"""What the exponential takes: the one-hot of the sum of two private digits, and two products of a private mask and a private factor."""

from __future__ import annotations

from torch import Tensor

from protocols.correlations import Role, Tensors
from protocols.exponential import ExpMask, dropped, factor, factor_bits, place_of
from protocols.ring import reduce
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair
from protocols.sources.two_party.shared import one_hot_of_sum, one_sided


@makes(ExpMask)
def exp_mask(pair: Pair, kind: ExpMask, own: Tensors) -> Protocol_[Made]:
    """The one-hot of -(R_S,h + R_C,h) by doubling; each party's sign from its share of it, and with that its factor; a_C x_S - a_S x_C.

    The products keep no more than the bits that the online phase reads: what the lower bits of a factor choose is rounded before it is
    sent, which is right on average. Rounds: 13, or 15 without a maximum. Transfers: 20 for the one-hot, or 24, half of them for ANDs, and
    42 for the products, or 34 to 38, of 22 bits at most beside a maximum; 1090 bits an element beside the transfers' own.
    Learns: nothing, either; all that travels is uniform.
    """
    r, places, high = pair.mask(kind.x).value, kind.places, kind.high
    if kind.maximum:
        r = pair.uniform(kind.shape, places + high) if pair.traced else kind.difference(r, pair.mask(kind.maximum).value)
    r = reduce(r, places + high)
    hot = yield from one_hot_of_sum(pair, place_of(r >> places, high), high)
    words = hot.value[None] if kind.maximum else hot.value
    x = r if pair.traced else factor(r, words, kind.low, kind.finer, server=pair.is_server)
    by_client, by_server = yield from parallel(*(_times(pair, sender, own[0], x, kind) for sender in Role))
    return Made((words, reduce(by_server - by_client, kind.bits - dropped(kind.low))))


def _times(pair: Pair, sender: Role, mask: Tensor, x: Tensor, kind: ExpMask) -> Protocol_[Tensor]:
    """Shares of a x / 2^drop modulo 2^(bits - drop): a in Z_2^bits at the sender, |x| < 2^factor_bits at the receiver.

    x + 2^factor_bits is chosen from bit by bit. Of its low `drop` bits, bit i takes a 2^i / 2^drop rounded; the others are exact.
    """
    bits, drop, size = kind.bits, dropped(kind.low), factor_bits(kind.low)
    at_sender, at_receiver = one_sided(pair, sender, mask, x + (1 << size))
    share = yield from pair.transfers.product(sender, at_sender, at_receiver, bits - drop, size + 1, drop)
    return share - (mask << (size - drop)) if pair.role is sender else share
