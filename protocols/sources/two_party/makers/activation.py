"""What the pieces of GELU take: a one-hot of an index's mask, its sign, and that times masks and a product of two."""

from __future__ import annotations

import torch

from protocols.activation import PRODUCT_BITS, PiecesMask
from protocols.correlations import Tensors
from protocols.ring import reduce
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.lines import Index, part_and_line, turned_hot
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.shared import bits_of_sum, sign_value, times_sign
from protocols.table import ones, own_sign


@makes(PiecesMask)
def pieces_mask(pair: Pair, kind: PiecesMask, own: Tensors) -> Protocol_[Made]:
    """The bits of r that are read; of these the one-hot, and beside it l and b l - a; then b, l and that times both parts of the sign.

    Learns: nothing, either.
    """
    ring, (a, b) = PRODUCT_BITS, own[0]
    width = kind.shift + kind.index_bits
    r = reduce(pair.mask(kind.x).value, width)
    bits = yield from bits_of_sum(pair, Secret(r, width), width)
    index = Index(r, bits)
    found = part_and_line(pair, index, a, b, 0, kind.shift, ring)
    hot, (low, line) = yield from parallel(turned_hot(pair, index, kind.shift, kind.index_bits), found)
    sign = own_sign(ones(hot).sum(-1), server=pair.is_server)
    values = Secret(torch.stack([b, low.value, line.value]), ring)
    alone, signed = yield from parallel(sign_value(pair, sign, ring), times_sign(pair, sign, values))
    return Made((hot, torch.cat([alone.value[None], signed.value])))
