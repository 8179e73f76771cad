"""What the pieces of GELU take: a one-hot of an index's mask, its sign, and that times masks and a product of two."""

from __future__ import annotations

import torch

from protocols.activation import INDEX_BITS, PRODUCT_BITS, PiecesMask
from protocols.correlations import Tensors
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.shared import bits_of_sum, one_hot, product, sign_value, times_sign
from protocols.table import ones, own_sign


@makes(PiecesMask)
def pieces_mask(pair: Pair, kind: PiecesMask, own: Tensors) -> Protocol_[Made]:
    """The bits of -i and their one-hot; beside it b r; both parties' parts of the sign are their own, and multiply a, b, r and b r.

    Learns: nothing, either.
    """
    a, b = (Secret(value, PRODUCT_BITS) for value in (own[0][0], own[0][1]))
    r, index = pair.mask(kind.x), pair.mask(kind.index)
    hot, both = yield from parallel(
        _hot(pair, Secret(-index.value, index.bits)), product(pair, b, Secret(r.value, PRODUCT_BITS), PRODUCT_BITS)
    )
    sign = own_sign(ones(hot.value).sum(-1), server=pair.is_server)
    values = Secret(torch.stack([a.value, b.value, r.value, both.value]), PRODUCT_BITS)
    alone, signed = yield from parallel(sign_value(pair, sign, PRODUCT_BITS), times_sign(pair, sign, values))
    return Made((hot.value, alone.value, *signed.value))


def _hot(pair: Pair, place: Secret) -> Protocol_[Secret]:
    bits = yield from bits_of_sum(pair, place, INDEX_BITS)
    return (yield from one_hot(pair, bits, INDEX_BITS))
