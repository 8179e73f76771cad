"""Linear maps with S's weight: -r W for C's own r, of which C then needs nothing of the weight."""

from __future__ import annotations

from protocols.correlations import Role, Tensors
from protocols.linear import LinearMask
from protocols.ring import blank, reduce
from protocols.rounds import Protocol_
from protocols.sources.two_party.makers.product import columns
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair


@makes(LinearMask)
def linear_mask(pair: Pair, kind: LinearMask, own: Tensors) -> Protocol_[Made]:
    """Shares of r B with B = -W, by the lattice; a diagonal W as products of columns, encrypted by S.

    C is left with its share of -r W itself and completes nothing. Learns: nothing, either; C keeps W's ciphertexts.
    """
    r = blank(*kind.shape) if pair.is_server else own[0]
    if not kind.diagonal:
        shared = yield from pair.lattice.linear(pair.weight(kind.weight), r, kind.out, kind.bits, transposed=bool(kind.transposed))
        return Made((shared,))
    weight = blank(*kind.shape[:-1], 1) if kind.window else blank(*kind.shape)
    if pair.is_server and not pair.traced:
        weight = reduce(-kind.select(pair.weight(kind.weight)), kind.bits).expand(weight.shape)
    left, right = columns(r, weight)
    shared = yield from pair.lattice.columns(Role.SERVER, left, right, kind.bits)
    return Made((shared.reshape(kind.shape),))
