"""Z[X]/(X^N + 1) modulo a product of primes: tables of transforms, and changes of modulus."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from protocols.lattice import kernels
from protocols.lattice.noise import Array

_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # of Miller and Rabin's test: it is right below 2^64 with these


def is_prime(n: int) -> bool:
    """For n < 2^64."""
    if n < 2 or any(n % p == 0 for p in _BASES):
        return n in _BASES
    d, s = n - 1, 0
    while d % 2 == 0:
        d, s = d // 2, s + 1
    for base in _BASES:
        x = pow(base, d, n)
        if x in (1, n - 1):
            continue
        for _ in range(s - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


@cache
def primes_above(least: int, step: int, count: int, without: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The first primes from `least` on that are 1 modulo `step`."""
    found: list[int] = []
    n = least + (1 - least) % step
    while len(found) < count:
        if n not in without and is_prime(n):
            found.append(n)
        n += step
    return tuple(found)


def primes_for(bits: float, step: int, widest: int, without: tuple[int, ...] = ()) -> tuple[int, ...]:
    """As few primes as `widest` bits allow, 1 modulo `step`, of about equal size, whose product is at least 2^bits."""
    count = max(1, math.ceil(bits / (widest - 0.05)))
    found: list[int] = []
    for left in range(count, 0, -1):
        rest = bits - sum(math.log2(p) for p in found)
        found += primes_above(math.ceil(2 ** (rest / left)), step, 1, (*without, *found))
    assert max(found).bit_length() <= max(widest, step.bit_length() + 4)
    return tuple(found)


def scaled(x: Array, factor: int, p: int) -> Array:
    """x * factor modulo p, for residues."""
    out = np.empty(x.shape, np.int64)
    kernels.scaled(np.ascontiguousarray(x).reshape(-1), np.int64(factor % p), p, out.reshape(-1))
    return out


def times(x: Array, y: Array, p: int) -> Array:
    """Every row of x (r, n) times every row of y (k, n) modulo p: (r, k, n)."""
    out = np.empty((len(x), len(y), x.shape[1]), np.int64)
    kernels.spread(np.ascontiguousarray(x), np.ascontiguousarray(y), p, out)
    return out


def reduced(x: Array, p: int) -> Array:
    """x modulo p, any int64s; a new array."""
    out = np.empty(x.shape, np.int64)
    kernels.remainder(np.ascontiguousarray(x).reshape(-1), p, out.reshape(-1))
    return out


def plus(x: Array, y: Array, p: int) -> Array:
    """x += y for residues of one shape, x whole in memory."""
    kernels.plus(x.reshape(-1), np.ascontiguousarray(y).reshape(-1), p)
    return x


@cache
def primes_below(bits: int, step: int, count: int, without: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The largest primes of so many bits that are 1 modulo `step`; fewer where there are not so many."""
    found: list[int] = []
    n = (1 << bits) - step + 1
    while len(found) < count and n.bit_length() == bits:
        if n not in without and is_prime(n):
            found.append(n)
        n -= step
    return tuple(found)


def packed_primes(bits: float, step: int, widest: int, without: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Primes, 1 modulo `step`, whose product is at least 2^bits and whose elements take few bits on a wire."""
    left = max(1, math.ceil(bits / (widest - 0.01)))
    found: list[int] = []
    rest = bits
    while rest > 0:
        width = min(widest, max(math.ceil(rest / max(1, left)), step.bit_length() + 3))
        next_ = primes_below(width, step, 1, (*without, *found))
        if left <= 1 and next_ and math.log2(next_[0]) < rest and width < widest:
            next_ = primes_below(width + 1, step, 1, (*without, *found))
        if not next_:
            next_ = primes_above(1 << width, step, 1, (*without, *found))
        found += next_
        rest -= math.log2(next_[0])
        left -= 1
    return tuple(found)


def wrapped(n: int) -> int:
    """The int64 that is n modulo 2^64."""
    return (n + (1 << 63)) % (1 << 64) - (1 << 63)


class Field:
    """Transforms of up to `size` points modulo one prime that is 1 modulo 2 size."""

    def __init__(self, p: int, size: int) -> None:
        assert p % (2 * size) == 1 and p.bit_length() <= kernels.WIDEST_PRIME
        self.p, self.size = p, size
        root = next(w for g in range(2, 9999) if pow(w := pow(g, (p - 1) // (2 * size), p), size, p) == p - 1)
        self._roots, self._quotients = self._table(root)
        self._inverses, self._inverse_quotients = self._table(pow(root, -1, p))

    def _table(self, root: int) -> tuple[Array, Any]:
        # in bit-reversed order the second half of each power of two is the first times one root more
        roots, step = np.ones(1, np.int64), self.size // 2
        while step:
            roots = np.concatenate([roots, scaled(roots, pow(root, step, self.p), self.p)])
            step //= 2
        return roots, roots / self.p

    def forward(self, x: Array, first: int = 1, last: int | None = None) -> Array:
        """In place, along the last axis, which may be longer than `size` where `last` says so."""
        kernels.forward(x.reshape(-1, x.shape[-1]), self._roots, self._quotients, self.p, first, last or self.size)
        return x

    def backward(self, x: Array, first: int = 1, last: int | None = None) -> Array:
        """Its inverse."""
        last = last or self.size
        scale = pow(last // first, -1, self.p)
        kernels.backward(x.reshape(-1, x.shape[-1]), self._inverses, self._inverse_quotients, self.p, first, last, scale)
        return x


@cache
def field(p: int, size: int) -> Field:
    """One for each prime."""
    return Field(p, size)


class Base:
    """A plaintext modulus P: residues modulo several primes, or where there is none, modulo 2^64 of which 2^power is a divisor."""

    def __init__(self, primes: tuple[int, ...], power: int = 0) -> None:
        self.primes, self.modulus = primes, math.prod(primes) << power
        self._p = np.array(primes or (0,), np.int64)
        count = len(primes)
        self._inverses = np.array([[pow(a, -1, b) if i < k else 0 for k, b in enumerate(primes)] for i, a in enumerate(primes)], np.int64)
        self.weights = [math.prod(primes[:k]) for k in range(count + 1)]

    def residues(self, x: Array) -> Array:
        """Of int64s (...): (K, ...)."""
        out = np.empty((len(self.primes), *x.shape), np.int64)
        for row, p in zip(out, self.primes, strict=True):
            kernels.remainder(np.ascontiguousarray(x).reshape(-1), p, row.reshape(-1))
        return out

    def digits(self, x: Array) -> Array:
        """Mixed radix digits of residues (K, ...)."""
        out = np.ascontiguousarray(x).copy()
        kernels.digits(out.reshape(len(out), -1), self._p, self._inverses)
        return out

    def wrapped(self, digits: Array) -> Array:
        """The numbers of such digits in [0, P), modulo 2^64."""
        words = [np.int64(wrapped(w)) for w in self.weights[:-1]]
        return np.asarray(sum(d * w for d, w in zip(digits, words, strict=True)))

    def lift(self, digits: Array, q: int, centred: bool = True) -> Array:
        """Such numbers modulo another prime, of [0, P), or of about [-P/2, P/2)."""
        out = np.empty(digits.shape[1:], np.int64)
        top = (self.primes[-1] + 1) // 2 if centred else 1 << 62
        weights = np.array([w % q for w in self.weights], np.int64)
        kernels.digits_to(digits.reshape(len(digits), -1), weights, top, q, out.reshape(-1))
        return out

    def plus(self, x: Array, y: Any) -> Array:
        """x + y for residues (K, ...) and 0 <= y < 2."""
        found = x + y
        for row, p in zip(found, self.primes, strict=False):
            row -= (row >= p) * np.int64(p)
        return np.asarray(found)

    def ratios(self, digits: Array) -> Any:
        """The numbers of such digits over P, of [-1/2, 1/2] as `lift` has them, as floats."""
        weights = [w / self.modulus for w in self.weights[:-1]]
        return sum(d * w for d, w in zip(digits, weights, strict=True)) - (digits[-1] >= (self.primes[-1] + 1) // 2)

    def ratio(self, digits: Array) -> Fraction:
        """One of them, exactly."""
        value = sum(int(d) * w for d, w in zip(digits, self.weights[:-1], strict=True))
        return Fraction(value, self.modulus) - int(digits[-1] >= (self.primes[-1] + 1) // 2)

    def fraction(self, x: Array, q: tuple[int, ...]) -> tuple[Array, Any]:
        """P x / Q modulo P, x (L, ...) residues modulo q: integer parts (K, ...) and fractions in [0, 1)."""
        big = math.prod(q)
        unit = np.array([pow(big // p, -1, p) for p in q], np.int64)
        rest = np.array([self.modulus % p for p in q], np.int64)
        whole = np.array([[self.modulus // p % k if k else self.modulus // p for k in self._p.tolist()] for p in q], np.int64)
        flat = np.ascontiguousarray(x).reshape(len(q), -1)
        out, frac = np.zeros((len(self._p), flat.shape[1]), np.int64), np.empty(flat.shape[1])
        kernels.fraction(flat, np.array(q, np.int64), unit, rest, whole, self._p, out, frac)
        return out.reshape(-1, *x.shape[1:]), frac.reshape(x.shape[1:])

    def scale(self, x: Array, q: tuple[int, ...]) -> tuple[list[Array], Any]:
        """floor(Q x / P) modulo each of q, and what was cut off, for x (K, ...) modulo P; K = 1 for a power of two up to 2^64."""
        big = math.prod(q)
        if not self.primes:
            cut = x[0] * np.int64(wrapped(big)) & np.int64(self.modulus - 1 if self.modulus < 1 << 64 else -1)
            above = cut < 0  # the word's upper half, where the modulus is 2^64
            rests = [reduced(reduced(cut, p) + above * np.int64(self.modulus % p), p) for p in q]
            return [scaled(rest, -pow(self.modulus, -1, p), p) for rest, p in zip(rests, q, strict=True)], cut / self.modulus + above
        rest = np.stack([scaled(row, big, p) for row, p in zip(x, self.primes, strict=True)])
        found = self.digits(rest)
        cut = np.asarray(sum(d * (w / self.modulus) for d, w in zip(found, self.weights[:-1], strict=True)))
        return [scaled(self.lift(found, p, False), -pow(self.modulus, -1, p), p) for p in q], cut


def drop(x: list[Array], q: tuple[int, ...], keep: int) -> list[Array]:
    """round(x Q' / Q) for residues x modulo q, Q' the product of the first `keep`: one prime after the other."""
    x = list(x)
    while len(x) > keep:
        last, p = x.pop(), q[len(x)]
        last = last - (last > p // 2) * np.int64(p)
        x = [scaled(reduced(row - last, r), pow(p, -1, r), r) for row, r in zip(x, q, strict=False)]
    return x
