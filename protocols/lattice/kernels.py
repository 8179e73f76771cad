"""Compiled kernels: residues in int64 arrays, modulo primes below 2^49.

A product modulo p is a b - floor(a b / p) p: the quotient comes from float64 and is off by one at most, since a b / p < 2^49, and the
difference is right modulo 2^64. All control flow depends on sizes alone, but for `accept`, which reads public or fresh randomness.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from protocols.compiled import compiled

WIDEST_PRIME = 49
"""Bits."""
BLOCK = 1 << 11
"""Elements that are unpacked at a time, a multiple of 8."""


@compiled
def multiply(a: Any, b: Any, p: Any, inverse: Any) -> Any:
    """One product modulo p of residues; inverse = 1 / p."""
    r = a * b - np.int64(float(a) * float(b) * inverse) * p
    r = r + p if r < 0 else r
    return r - p if r >= p else r


@compiled
def forward(x: Any, roots: Any, quotients: Any, p: Any, first: Any, last: Any) -> None:
    """Stages of the negacyclic transform of every row of x (rows, n), in place: from `first` blocks to `last` blocks.

    Cooley and Tukey's butterflies over roots in bit-reversed order (Longa and Naehrig, ePrint 2016/504): after them the k-th of m blocks
    holds
    the polynomial modulo X^(n/m) - r_k. `quotients` are the roots over p.
    """
    n = x.shape[1]
    for row in range(x.shape[0]):
        m = first
        while m < last:
            t = n // (2 * m)
            for i in range(m):
                w, f = roots[m + i], quotients[m + i]
                at = 2 * i * t
                low = x[row, at : at + t]
                high = x[row, at + t : at + 2 * t]
                for j in range(t):
                    u, v = low[j], high[j]
                    v = v * w - np.int64(float(v) * f) * p
                    v = v + p if v < 0 else v
                    v = v - p if v >= p else v
                    a = u + v
                    b = u - v
                    low[j] = a - p if a >= p else a
                    high[j] = b + p if b < 0 else b
            m *= 2


@compiled
def backward(x: Any, roots: Any, quotients: Any, p: Any, first: Any, last: Any, scale: Any) -> None:
    """The inverse of `forward` with the same bounds; `roots` are the inverses, `scale` the inverse of last / first."""
    n = x.shape[1]
    inverse = 1.0 / p
    for row in range(x.shape[0]):
        m = last // 2
        while m >= first and m > 0:
            t = n // (2 * m)
            for i in range(m):
                w, f = roots[m + i], quotients[m + i]
                at = 2 * i * t
                low = x[row, at : at + t]
                high = x[row, at + t : at + 2 * t]
                for j in range(t):
                    u, v = low[j], high[j]
                    a = u + v
                    low[j] = a - p if a >= p else a
                    b = u - v
                    b = b + p if b < 0 else b
                    b = b * w - np.int64(float(b) * f) * p
                    b = b + p if b < 0 else b
                    high[j] = b - p if b >= p else b
            m //= 2
        for j in range(n):
            x[row, j] = multiply(x[row, j], scale, p, inverse)


@compiled
def products(left: Any, right: Any, p: Any, out: Any) -> None:
    """out[k] = left[k] @ right[k] modulo p: (g, n, d), (g, d, c), (g, n, c); d below 2^12, so that sums of terms in [-p, 2p) fit."""
    inverse = 1.0 / p
    acc = np.zeros(right.shape[2], np.int64)
    for k in range(left.shape[0]):
        for i in range(left.shape[1]):
            acc[:] = 0
            for m in range(left.shape[2]):
                w = left[k, i, m]
                f = float(w) * inverse
                row = right[k, m]
                for j in range(acc.size):
                    acc[j] += row[j] * w - np.int64(float(row[j]) * f) * p
            for j in range(acc.size):
                r = acc[j] - np.int64(np.floor(float(acc[j]) * inverse)) * p
                r = r + p if r < 0 else r
                out[k, i, j] = r - p if r >= p else r


@compiled
def least(x: Any, p: Any, inverse: Any) -> Any:
    """x modulo p for 0 <= x < 2^53 and p of at least 2^10, or for x below 2^50."""
    r = x - np.int64(float(x) * inverse) * p
    r = r + p if r < 0 else r
    return r - p if r >= p else r


@compiled
def combine(scalars: Any, matrix: Any, total: Any) -> None:
    """total += scalars @ matrix: int32 (n, k), (k, c), int64 (n, c); for few rows, where cutting nothing pays."""
    for i in range(scalars.shape[0]):
        found = total[i]
        for m in range(scalars.shape[1]):
            s, row = np.int64(scalars[i, m]), matrix[m]
            for j in range(found.size):
                found[j] += s * np.int64(row[j])


@compiled
def fraction(x: Any, q: Any, unit: Any, rest: Any, whole: Any, p: Any, out: Any, frac: Any) -> None:
    """P x / Q modulo P as an integer part, modulo each p[k] (0: modulo 2^64), and a fraction in [0, 1).

    x (L, n) are residues modulo q, Q their product. x / Q = sum_i y_i / q_i modulo 1 with y_i = x unit_i, unit_i the inverse of Q / q_i;
    P y_i / q_i = whole_i y_i + rest_i y_i / q_i, whole_i = floor(P / q_i) modulo p[k], rest_i = P modulo q_i.
    """
    n = x.shape[1]
    y, quotients = np.empty(n, np.int64), np.empty(n, np.int64)
    frac[:] = 0.0
    out[:] = 0
    for i in range(q.size):
        prime, u, rest_i, row = q[i], unit[i], rest[i], x[i]
        inverse = 1.0 / prime
        for j in range(n):
            v = multiply(row[j], u, prime, inverse)
            quotient = np.int64(float(v) * float(rest_i) * inverse)
            r = v * rest_i - quotient * prime
            low = np.int64(1) if r < 0 else np.int64(0)
            high = np.int64(1) if r >= prime else np.int64(0)
            y[j] = v
            quotients[j] = quotient - low + high
            frac[j] += float(r + (low - high) * prime) * inverse
        for k in range(p.size):
            w, modulus, found = whole[i, k], p[k], out[k]
            if modulus == 0:
                for j in range(n):
                    found[j] += w * y[j] + quotients[j]
            else:
                over = 1.0 / modulus
                for j in range(n):
                    found[j] += multiply(w, least(y[j], modulus, over), modulus, over) + least(quotients[j], modulus, over)
    for j in range(n):
        y[j] = np.int64(frac[j])
        frac[j] -= float(y[j])
    for k in range(p.size):
        modulus, found = p[k], out[k]
        if modulus == 0:
            for j in range(n):
                found[j] += y[j]
        else:
            over = 1.0 / modulus
            for j in range(n):
                found[j] = least(found[j] + y[j], modulus, over)


@compiled
def digits(x: Any, p: Any, inverses: Any) -> None:
    """Residues x (K, n) to mixed radix digits in place (Garner): x_0 + x_1 p_0 + x_2 p_0 p_1; inverses[i, k] of p_i modulo p_k."""
    for k in range(1, p.size):
        inverse = 1.0 / p[k]
        for i in range(k):
            for j in range(x.shape[1]):
                r = x[k, j] - least(x[i, j], p[k], inverse)
                r = r + p[k] if r < 0 else r
                x[k, j] = multiply(r, inverses[i, k], p[k], inverse)


@compiled
def digits_to(x: Any, weights: Any, top: Any, q: Any, out: Any) -> None:
    """Mixed radix digits x (K, n) to residues modulo q: sum_k x_k weights_k, less weights_K where the last digit is at least `top`."""
    inverse = 1.0 / q
    last = x.shape[0] - 1
    out[:] = 0
    for k in range(last + 1):
        w, row = weights[k], x[k]
        for j in range(out.size):
            out[j] += multiply(least(row[j], q, inverse), w, q, inverse)
    row, less = x[last], q - weights[last + 1]
    for j in range(out.size):
        out[j] = least(out[j] + (less if row[j] >= top else np.int64(0)), q, inverse)


@compiled
def remainder(x: Any, q: Any, out: Any) -> None:
    """x modulo q, x any int64."""
    inverse = 1.0 / q
    for j in range(x.size):
        r = x[j] - np.int64(np.floor(float(x[j]) * inverse)) * q
        if r < -q or r >= 2 * q:
            r = r % q
        r = r + q if r < 0 else r
        out[j] = r - q if r >= q else r


@compiled
def accept(words: Any, mask: Any, q: Any, out: Any, at: Any) -> Any:
    """Writes words under a mask that are below q to `out` from `at` on; the place behind the last."""
    for word in words:
        if at == out.size:
            break
        value = np.int64(word) & mask
        out[at] = value
        at += np.int64(value < q)
    return at


@compiled
def accept_all(words: Any, ends: Any, masks: Any, primes: Any, out: Any) -> Any:
    """`accept` for several primes, prime i from the words before ends[i]; those whose words did not suffice."""
    short = np.zeros(primes.size, np.int64)
    count, start = 0, 0
    for i in range(primes.size):
        at, q, mask, row = np.int64(0), primes[i], masks[i], out[i]
        for j in range(start, ends[i]):
            if at == row.size:
                break
            value = np.int64(words[j]) & mask
            row[at] = value
            at += np.int64(value < q)  # no branch that is hard to foretell
        start = ends[i]
        if at < row.size:
            short[count] = i
            count += 1
    return short[:count]


@compiled
def spread(x: Any, y: Any, p: Any, out: Any) -> None:
    """out[i, k] = x[i] * y[k] for rows of residues: (r, n), (k, n), (r, k, n)."""
    inverse = 1.0 / p
    for i in range(x.shape[0]):
        for k in range(y.shape[0]):
            left, right, found = x[i], y[k], out[i, k]
            for j in range(left.size):
                found[j] = multiply(left[j], right[j], p, inverse)


@compiled
def scaled(x: Any, factor: Any, p: Any, out: Any) -> None:
    """out = x * factor."""
    inverse = 1.0 / p
    for i in range(x.size):
        out[i] = multiply(x[i], factor, p, inverse)


@compiled
def plus(x: Any, y: Any, p: Any) -> None:
    """x += y for residues, in place."""
    for i in range(x.size):
        r = x[i] + y[i]
        x[i] = r - p if r >= p else r


@compiled
def plus_limbs(x: Any, limbs: Any, weights: Any, minus: Any, p: Any) -> None:
    """x += sum_i limbs_i weights_i - minus modulo p, in place: limbs (k, n) in [0, 2^48), minus a residue."""
    inverse = 1.0 / p
    for k in range(limbs.shape[0]):
        w, limb = weights[k], limbs[k]
        for i in range(x.size):
            r = x[i] + multiply(limb[i], w, p, inverse)
            x[i] = r - p if r >= p else r
    for i in range(x.size):
        r = x[i] - minus
        x[i] = r + p if r < 0 else r


@compiled
def binomial(words: Any, out: Any) -> None:
    """A centred binomial of 21 coins each side of every word: variance 10.5."""
    for i in range(out.size):
        total = np.int64(0)
        word = words[i]
        for _ in range(21):
            total += np.int64(word & np.uint64(1)) - np.int64((word >> np.uint64(21)) & np.uint64(1))
            word >>= np.uint64(1)
        out[i] = total


@compiled
def _octets(x: Any) -> Any:
    """An 8 x 8 matrix of bits, a row a byte, transposed (Hacker's Delight, 7-3)."""
    t = (x ^ (x >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
    x = x ^ t ^ (t << np.uint64(7))
    t = (x ^ (x >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
    x = x ^ t ^ (t << np.uint64(14))
    t = (x ^ (x >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
    return x ^ t ^ (t << np.uint64(28))


@compiled
def unpack(raw: Any, count: Any, bits: Any, first: Any, out: Any) -> None:
    """`protocols.ring.unpack`, of `count` elements those from `first` on, at most 31 bits each, as int32; block by block, in the cache."""
    whole, number, length = bits // 8, bits % 8, (count + 7) // 8
    planes = raw[count * whole :]
    words = np.empty(BLOCK // 8 + 2, np.uint64)
    octets = words.view(np.uint8)
    for start in range(0, out.size, BLOCK):
        part = out[start : start + BLOCK]
        at, size = first + start, part.size
        skip, low, high = at % 8, at // 8, (at + size + 7) // 8
        words[: high - low] = 0
        for bit in range(number):
            plane = planes[bit * length + low : bit * length + high]
            for k in range(plane.size):
                words[k] |= np.uint64(plane[k]) << np.uint64(8 * bit)
        for k in range(high - low):
            words[k] = _octets(words[k])
        shift = np.uint32(8 * whole)
        for k in range(size):
            part[k] = np.int32(np.uint32(octets[skip + k]) << shift)
        shift = np.uint32(0)
        if whole & 2:
            pairs = raw[2 * at : 2 * (at + size)]
            for k in range(size):
                part[k] |= np.int32(np.uint32(pairs[2 * k]) | np.uint32(pairs[2 * k + 1]) << np.uint32(8))
            shift = np.uint32(16)
        if whole & 1:
            ones = raw[count * (whole - 1) + at : count * (whole - 1) + at + size]
            for k in range(size):
                part[k] |= np.int32(np.uint32(ones[k]) << shift)
