"""Masks of wires, and the bits of a truncation's wrap."""

from __future__ import annotations

from protocols.correlations import Mask, Role, Tensors
from protocols.rounds import Protocol_
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.shared import one_sided
from protocols.truncation import OrMask


@makes(Mask, at_once=True)
def mask(pair: Pair, kind: Mask, own: Tensors) -> Protocol_[Made]:
    """r = r_S + r_C is what each drew: no message."""
    return Made(left=Secret(own[0], kind.bits))
    yield


@makes(OrMask)
def or_mask(pair: Pair, kind: OrMask, own: Tensors) -> Protocol_[Made]:
    """b_S b_C by one correlated transfer of `bits`, S's bit times C's choice. Two messages. Learns: nothing, either."""
    delta, choice = one_sided(pair, Role.SERVER, own[0], own[0])
    shared = yield from pair.transfers.correlated(Role.SERVER, choice, delta, kind.bits)
    return Made((shared,))
