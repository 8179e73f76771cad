"""Opening shared values in masked form, and the only way out of the secret: `reveal`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from protocols.correlations import Mask, Role
from protocols.declared import BOTH, DOWN, UP, Declared
from protocols.party import Item, Party, Protocol_
from protocols.ring import add, blank, known, packed_size, reduce
from protocols.shares import Shares, Wire


def open_masked(party: Party, values: Sequence[Shares], *, keep: bool = False) -> Protocol_[list[Wire]]:
    """Masked wires X = x + r of shared values, all in one round (ABY2.0, ePrint 2020/1225).

    Steps: r = r_S + r_C from both seeds (D knows both); S sends x_S + r_S, C sends x_C + r_C.
    Rounds: 1; an `early` value's part of C leaves before the query, and S's part alone is a one-way message.
    Bits: `bits` each way per element. Learns: the uniform X, both. `keep`: the mask outlives the pass.
    """
    masks = [party.take(Mask(x.shape, x.bits, int(keep))) for x in values]
    # a share that is not known yet is a shape, and its mask is not expanded for it
    own = [x.value if x.value.is_meta else x.value + mask.own[0] for x, mask in zip(values, masks, strict=True)]
    peer = yield [Item(value, x.bits, early=x.early) for x, value in zip(values, own, strict=True)]
    return [
        Wire(reduce(add(mine, theirs), x.bits), theirs if theirs.is_meta else mask.own[0], mask.name, x.bits, x.frac)
        for x, mask, mine, theirs in zip(values, masks, own, peer, strict=True)
    ]


def unmasked(party: Party, wire: Wire) -> Shares:
    """Shares of a wire: S holds X - r_S, C holds -r_C; local."""
    if not known(wire.masked, wire.mask):
        return Shares(blank(*wire.shape), wire.bits, wire.frac)
    value = wire.masked - wire.mask if party.is_server else -wire.mask
    return Shares(value, wire.bits, wire.frac)


def reveal(party: Party, x: Shares, *, to: Role) -> Protocol_[Tensor | None]:
    """The value itself, for one party; the other gets None.

    Steps: the other party sends its share. The receiver's share is uniform, so that it learns the value alone.
    Rounds: 1 one-way message of `bits` per element. Representatives in [0, 2^bits).
    """
    from_server = to is Role.CLIENT
    (theirs,) = yield [Item(x.value, x.bits, from_server=from_server, from_client=not from_server)]
    if party.role is not to:
        return None
    return reduce(add(x.value, theirs), x.bits)


def private_input(x: Tensor, bits: int, frac: int, *, own: bool) -> Shares:
    """A value that one party holds in the clear, as trivial shares (the owner's share is the value); local."""
    return Shares(x if own or x.is_meta else x * 0, bits, frac)


def add_server_constant(party: Party, x: Shares, constant: Tensor | None) -> Shares:
    """x plus an integer tensor of S (a bias, a row of positions) with x's fraction bits; local. C passes None."""
    if not party.is_server or constant is None:
        return x
    return x.with_value(add(x.value, constant))


def cost_open_masked(*values: tuple[int, int], early: Sequence[bool] = ()) -> Declared:
    """(count, bits) of each value: it goes both ways; C's part of an early one has gone before."""
    sizes = [packed_size(count, bits) for count, bits in values]
    ahead = sum(size for size, is_early in zip(sizes, early, strict=False) if is_early)
    alone = len(early) == len(values) and all(early)
    return Declared(online=2 * sum(sizes) - ahead, early=ahead, steps=DOWN if alone else BOTH)


def cost_reveal(count: int, bits: int, to: Role) -> Declared:
    """One share, one way."""
    return Declared(online=packed_size(count, bits), steps=DOWN if to is Role.CLIENT else UP)
