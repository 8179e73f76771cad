"""Compiled loops of `gauss`: what words of a stream tell. Their time depends on what is drawn, and shows on no wire."""

from __future__ import annotations

from typing import Any

import numpy as np

from protocols.compiled import compiled

UNDECIDED = -(1 << 62)
"""What a kernel writes where a word does not tell."""


@compiled
def gaussians(words: Any, upper: Any, first: Any, guide: Any, shift: Any, out: Any) -> Any:
    """Values whose cumulative probabilities are around words; how many are undecided. See `gauss.Table`."""
    undecided = 0
    for i in range(out.size):
        word = words[i]
        k = guide[word >> np.uint64(shift)]
        k += np.int64(word > upper[k])  # no branch that is hard to foretell: mostly this is all
        while word > upper[k]:
            k += 1
        out[i] = first + k
        if word == upper[k]:
            out[i] = UNDECIDED
            undecided += 1
    return undecided


@compiled
def wide_gaussians(words: Any, upper: Any, first: Any, guide: Any, shift: Any, multipliers: Any, bits: Any, out: Any) -> Any:
    """Sums of such values times multipliers (terms, limbs of so many bits), plus half of what the limbs hold: (limbs, n)."""
    terms, limbs = multipliers.shape
    mask, undecided, at = (np.int64(1) << bits) - np.int64(1), 0, 0
    total = np.zeros(limbs, np.int64)
    for i in range(out.shape[1]):
        total[:] = 0
        total[limbs - 1] = np.int64(1) << (bits - 1)
        told = True
        for j in range(terms):
            word = words[at]
            at += 1
            k = guide[word >> np.uint64(shift)]
            k += np.int64(word > upper[k])
            while word > upper[k]:
                k += 1
            told = told and word != upper[k]
            value = np.int64(first + k)
            for m in range(limbs):
                total[m] += value * multipliers[j, m]
        carry = np.int64(0)
        for m in range(limbs):
            carry += total[m]
            out[m, i] = carry & mask
            carry >>= bits
        if not told:
            out[0, i] = UNDECIDED
            undecided += 1
    return undecided


@compiled
def coset_gaussians(
    words: Any,
    used: Any,
    ratios: Any,
    at: Any,
    upper: Any,
    guide: Any,
    first: Any,
    shift: Any,
    variance: Any,
    bound: Any,
    centres: Any,
    near: Any,
    out: Any,
) -> Any:
    """Rejection as `gauss.coset` says, from `used` and `at` on, by two words each; where it ends, and whether it is undecided there."""
    least = np.exp(-2.0 * bound) - near
    while used < words.size and at < ratios.size:
        ratio = ratios[at]
        row = np.int64(np.floor(ratio * centres + 0.5))
        which = row + centres // 2
        word = words[used]
        k = guide[which, word >> np.uint64(shift)]
        k += np.int64(word > upper[which, k])
        while word > upper[which, k]:
            k += 1
        if word == upper[which, k]:
            return at, used, True
        value = np.int64(first + k)
        coin = float(words[used + 1]) * 2.0**-64
        if coin >= least:
            centre = row / centres
            chance = np.exp(-((value + centre) * (ratio - centre) / variance + bound))
            if abs(coin - chance) < near:
                return at, used, True
            if coin > chance:
                used += 2
                continue
        out[at] = value
        at += 1
        used += 2
    return at, used, False
