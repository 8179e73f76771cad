"""What LayerNorm takes: sums of squares of masks, and for the inverse root a one-hot with its sign and powers of two masks."""

from __future__ import annotations

import math
from itertools import product as pairs

import torch
from torch import Tensor

from protocols.correlations import Role, Tensors
from protocols.norm import INDEX_BITS, RING, InverseRootMask, SquareMask
from protocols.ring import reduce
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.shared import bits_of_sum, one_hot, one_sided, times_sign
from protocols.table import ones, own_sign

_POWERS = tuple(pairs(range(2), range(4)))  # (j, i) of r^j a^i, in the kind's order


@makes(SquareMask, at_once=True)
def square_mask(pair: Pair, kind: SquareMask, own: Tensors) -> Protocol_[Made]:
    """The sums of r_S^2 and of r_C^2, which are private, and 2 r_S r_C, by the lattice, a row by itself. Learns: nothing, either."""
    r = reduce(pair.mask(kind.wire).value, kind.bits)
    server, client = one_sided(pair, Role.SERVER, r, r)
    cross = yield from pair.lattice.matmul(Role.SERVER, client[..., None, :], server[..., None], kind.bits)
    return Made((reduce((r * r).sum(-1) + 2 * cross[..., 0, 0], kind.bits),))


@makes(InverseRootMask)
def inverse_root_mask(pair: Pair, kind: InverseRootMask, own: Tensors) -> Protocol_[Made]:
    """The bits of the negated index and their one-hot; beside it a^i r^j, of each party's powers; then times both parts of the sign.

    Learns: nothing, either.
    """
    index = pair.mask(kind.index)
    r = pair.mask(kind.mantissa).value
    hot, powers = yield from parallel(_hot(pair, Secret(-index.value, index.bits)), _powers(pair, own[0], r))
    signed = yield from times_sign(pair, own_sign(ones(hot.value).sum(-1), server=pair.is_server), powers)
    return Made((hot.value, signed.value))


def _hot(pair: Pair, place: Secret) -> Protocol_[Secret]:
    bits = yield from bits_of_sum(pair, place, INDEX_BITS, quick=True)
    return (yield from one_hot(pair, bits, INDEX_BITS))


def _powers(pair: Pair, a: Tensor, r: Tensor) -> Protocol_[Secret]:
    """Shares of (a_S + a_C)^i (r_S + r_C)^j, (8, ...): by the binomials, products of a monomial of S's and one of C's."""
    one = torch.zeros_like(a) + 1
    own = {(0, 0): one, (0, 1): a, (0, 2): a * a, (0, 3): a * a * a}
    own |= {(1, i): own[0, i] * r for i in range(4)}
    mixed = [(x, y) for x, y in pairs(_POWERS, _POWERS) if any(x) and any(y) and x[0] + y[0] <= 1 and x[1] + y[1] <= 3]
    ours = torch.stack([reduce(own[x if pair.is_server else y], RING) for x, y in mixed])
    x, y = one_sided(pair, Role.SERVER, ours, ours)
    found = yield from pair.transfers.product(Role.SERVER, x, y, RING, RING)
    # what both powers leave alone, 1, is S's
    sums = {power: own[power] if any(power) or pair.is_server else own[power] - 1 for power in _POWERS}
    for k, ((j, i), (n, m)) in enumerate(mixed):
        sums[j + n, i + m] = sums[j + n, i + m] + math.comb(i + m, i) * found[k]
    return Secret(reduce(torch.stack([sums[power] for power in _POWERS]), RING), RING)
