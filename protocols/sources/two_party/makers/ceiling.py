"""What a bound of rows takes: one-hots of the digits of a shared mask, and of those of a private one with products of private bits."""

from __future__ import annotations

import torch
from torch import Tensor

from protocols.ceiling import DIGITS, HASH, SUBSETS, WIDTH, PlaceMask, ReachedMask
from protocols.comparison import MAX_DIGIT
from protocols.correlations import Tensors
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.shared import and_, bit, bit_to_arithmetic, bits_of_sum, one_hot


@makes(PlaceMask)
def place_mask(pair: Pair, kind: PlaceMask, own: Tensors) -> Protocol_[Made]:
    """The bits of r up to the digit's, and its one-hot by doubling. Learns: nothing, either."""
    end = kind.shift + WIDTH
    bits = yield from bits_of_sum(pair, pair.mask(kind.wire), end, quick=True)
    hot = yield from one_hot(pair, bits, WIDTH, kind.shift)
    return Made((hot.value,))


@makes(ReachedMask)
def reached_mask(pair: Pair, kind: ReachedMask, own: Tensors) -> Protocol_[Made]:
    """One-hots of the digits of what is XOR-shared as it is drawn, by doubling; beside them the products of bits, and these to arithmetic.

    Learns: nothing, either.
    """
    value = Secret(own[0], HASH, True)
    *hot, made = yield from parallel(*(one_hot(pair, value, MAX_DIGIT, MAX_DIGIT * k) for k in range(DIGITS)), _products(pair, kind, own))
    return Made((torch.stack([each.value for each in hot]), made.value))


def _products(pair: Pair, kind: ReachedMask, own: Tensors) -> Protocol_[Secret]:
    """Of every set of the bits, each set by one AND of a smaller one and a bit; all that have as many bits at once."""
    found: dict[tuple[int, ...], Tensor] = {(k,): bit(own[1], k) for k in range(DIGITS)}
    for size in range(2, DIGITS + 1):
        new = [subset for subset in SUBSETS if len(subset) == size]
        left, right = torch.zeros_like(own[1]), torch.zeros_like(own[1])
        for at, subset in enumerate(new):
            left, right = left | (found[subset[:-1]] << at), right | (found[subset[-1:]] << at)
        both = yield from and_(pair, Secret(left, len(new), True), Secret(right, len(new), True))
        found |= {subset: bit(both.value, at) for at, subset in enumerate(new)}
    return (yield from bit_to_arithmetic(pair, Secret(torch.stack([found[subset] for subset in SUBSETS]), 1, True), kind.bits))
