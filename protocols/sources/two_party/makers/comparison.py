"""What a comparison takes: one-hots of the digits of a shared number, products of masks of bits, and the bit rho in arithmetic."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from protocols.comparison import JOINT_BITS, BitMask, CompareMask, _joint
from protocols.correlations import Tensors
from protocols.ring import reduce
from protocols.rounds import Protocol_
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.schedule import beside
from protocols.sources.two_party.shared import RIPPLE, WORD_BITS, bit, bit_to_arithmetic, bits_of_sum, doubled, one_hot, select


class Own:
    """`Known` of one party's shares: what is linear in masks, a kind makes of its shares as of the masks themselves."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    def mask(self, name: int) -> Tensor:
        """This party's share."""
        return self._pair.mask(name).value

    def server_mask(self, name: int) -> Tensor:
        """Nobody knows S's but S."""
        raise LookupError(name)

    def weight_mask(self, name: str) -> Tensor:
        """Nothing is made of it here."""
        raise LookupError(name)


@makes(CompareMask)
def compare_mask(pair: Pair, kind: CompareMask, own: Tensors) -> Protocol_[Made]:
    """The bits of R from both parties' parts of it, beside them the one-hots of its digits by doubling, and the products of masks.

    rho = s_S ^ s_C ^ msb(R) is left as it is shared. Learns: nothing, either; all that travels is uniform.
    """
    difference = Own(pair)
    r = blank_or(kind, pair, difference)
    bits = Bits(r)
    number = len(kind.digits)
    top, joint, *words = yield from beside(
        bits.ripple(pair, kind.bits),
        _joint_products(pair, kind, own[1] if len(own) > 1 else None),
        *(_digit(pair, bits, width, at) for at, width in kind.digits),
    )
    assert len(words) == number
    rho = own[0] ^ top.expand(kind.shape) if not own[0].is_meta else own[0]
    return Made((*words, *joint), Secret(rho, 1, True))


def blank_or(kind: CompareMask, pair: Pair, view: Own) -> Tensor:
    """This party's share of R."""
    return pair.uniform(kind.r_shape, kind.bits) if pair.traced else reduce(kind.difference(view), kind.bits)


class Bits:
    """The XOR-shared bits of a sum of both parties' numbers, as they become known."""

    def __init__(self, own: Tensor) -> None:
        self._own, self.known, self.value = own, 0, own

    def ripple(self, pair: Pair, count: int) -> Protocol_[Tensor]:
        """Finds them, of `count`, one a round, or where they are many all at once; the highest."""
        if count > RIPPLE + 1:
            self.value = (yield from bits_of_sum(pair, Secret(self._own, count), count)).value
        else:
            zero, c = torch.zeros_like(self._own), torch.zeros_like(self._own)
            a, b = (self._own, zero) if pair.is_server else (zero, self._own)
            for at in range(count - 1):
                self.known = at + 1
                step = yield from pair.transfers.ands(bit(a, at) ^ c, bit(b, at) ^ c, 1)
                c = c ^ step
                self.value = self.value ^ (c << (at + 1))
        self.known = count
        return bit(self.value, count - 1)


def _digit(pair: Pair, bits: Bits, width: int, at: int) -> Protocol_[Tensor]:
    """The one-hot of a digit, doubling as its bits become known; a wide one when all are."""
    if width > WORD_BITS:
        while bits.known < at + width:
            yield []
        return (yield from one_hot(pair, Secret(bits.value, at + width, True), width, at)).value
    while bits.known <= at:
        yield []
    x = bit(bits.value, at)
    hot = (x << 1) | (x ^ 1 if pair.is_server else x)
    for k in range(1, width):
        while bits.known <= at + k:
            yield []
        hot = yield from doubled(pair, hot, 1 << k, bit(bits.value, at + k))
    return hot


@lru_cache
def _steps(number: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...]:
    """How each product of masks is made of two shorter ones, (product, first, second), shortest first."""
    found = []
    for product in sorted(_joint(number), key=len):
        half = 1 << (len(product) - 1).bit_length() - 1  # the depth is the logarithm
        found.append((product, product[:half], product[half:]))
    return tuple(found)


def _joint_products(pair: Pair, kind: CompareMask, masks: Tensor | None) -> Protocol_[list[Tensor]]:
    """ANDs of the XOR-shared masks of the variables, all of one length at a time in a word; packed as the kind's elements."""
    number = len(kind.digits)
    if masks is None or number < 2:
        return []
    have: dict[tuple[int, ...], Tensor] = {(k,): bit(masks, k) for k in range(2 * (number - 1))}
    todo = list(_steps(number))
    while todo:
        ready = [step for step in todo if step[1] in have and step[2] in have]
        todo = [step for step in todo if step[0] not in {done[0] for done in ready}]
        for start in range(0, len(ready), JOINT_BITS):
            part = ready[start : start + JOINT_BITS]
            left, right = torch.zeros_like(masks), torch.zeros_like(masks)
            for k, (_, first, second) in enumerate(part):
                left, right = left | (have[first] << k), right | (have[second] << k)
            done = yield from pair.transfers.ands(left, right, len(part))
            for k, (product, _, _) in enumerate(part):
                have[product] = bit(done, k)
    words: list[Tensor] = []
    for place, product in enumerate(_joint(number)):
        if place % JOINT_BITS == 0:
            words.append(torch.zeros_like(masks))
        words[-1] = words[-1] | (have[product] << (place % JOINT_BITS))
    return words


@makes(BitMask)
def bit_mask(pair: Pair, kind: BitMask, own: Tensors) -> Protocol_[Made]:
    """rho by one transfer of `bits` - 1, or rho times r, by two of `bits`. Learns: nothing, either."""
    rho = pair.mask(kind.compare)
    if not kind.wire:
        made = yield from bit_to_arithmetic(pair, rho, kind.bits)
        return Made((made.value,))
    r = pair.mask(kind.wire)
    spread = r.value.reshape(kind.spread).expand(kind.shape)
    choice = Secret(rho.value.expand(kind.shape), 1, True)
    made = yield from select(pair, choice, Secret(spread, r.bits), kind.bits)
    return Made((made.value,))
