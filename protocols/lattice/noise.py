"""Randomness of lattices, from the one generator: uniform residues, ternary secrets, centred binomial errors; `gauss` has what hides."""

from __future__ import annotations

from typing import Any

import numpy as np

from protocols.lattice import kernels
from protocols.prg import Prg, Stream, new_seed

Array = np.ndarray[Any, np.dtype[np.int64]]
_WORDS = 1 << 17


def fresh() -> Stream:
    """A stream of the operating system's randomness, stretched."""
    return Prg(new_seed()).stream(0)


def uniform(stream: Stream, count: int, modulus: int) -> Array:
    """Elements of Z_modulus, exactly uniform: words of the modulus' bits, those left out that are none."""
    out, at = np.empty(count, np.int64), 0
    bits = (modulus - 1).bit_length()
    word = np.uint32 if bits <= 32 else np.int64
    while at < count:
        size = min(_WORDS, (count - at) + (count - at) // 8 + 8)
        words = stream.raw(size * np.dtype(word).itemsize).view(word)
        at = kernels.accept(words, np.int64((1 << bits) - 1), np.int64(modulus), out, at)
    return out


def errors(stream: Stream, count: int) -> Array:
    """Centred binomial of 21 coins, variance 10.5."""
    out = np.empty(count, np.int64)
    for start in range(0, count, _WORDS):
        part = out[start : start + _WORDS]
        kernels.binomial(stream.raw(8 * part.size).view(np.uint64), part)
    return out


def ternary(stream: Stream, count: int) -> Array:
    """Uniform in -1, 0, 1."""
    return uniform(stream, count, 3) - 1


def secret(stream: Stream, count: int) -> Array:
    """Uniform in -1, 0, 1; drawn anew, one time in millions, where more than 7 of 10 are none zeros, so that budgets may count on it."""
    while True:
        found = ternary(stream, count)
        if count < 1024 or 10 * int(np.count_nonzero(found)) <= 7 * count:
            return found
