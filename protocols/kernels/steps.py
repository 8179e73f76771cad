"""Compiled loops for what protocols compute locally between two rounds. `protocols.kernels` says when they are used.

All arrays are int64, of one axis unless it is said otherwise, and in order. Each twin in plain torch stands where the loop is called.
"""

from __future__ import annotations

import numpy as np
from numba import types

from protocols.kernels.build import compiled

# mypy: disable-error-code="no-untyped-def, no-any-return, misc"

_VOID, _INT = types.void, types.int64
_I8, _C8 = types.int64[::1], types.int64[:, :, ::1]
_M8, _D8 = types.int64[:, ::1], types.int64[:, :, :, ::1]


@compiled()
def _mask(bits):
    """2^bits - 1; -1 for 64."""
    return -1 if bits == 64 else (1 << bits) - 1


@compiled(_VOID(_I8, _INT, _INT, _INT, _I8))
def shift_right(x, shift, bits, more, out):
    """`protocols.ring.shift_right`, plus `more`."""
    mask = _mask(bits - shift)
    for i in range(x.size):
        out[i] = ((x[i] >> shift) & mask) + more


@compiled(_VOID(_I8, _INT, _INT, _I8, _I8, _I8))
def top_masked(x, offset, bits, own, top, mine):
    """The top bit of x + offset in Z_2^bits, and the same under an own bit."""
    for i in range(x.size):
        bit = ((x[i] + offset) >> (bits - 1)) & 1
        top[i] = bit
        mine[i] = bit ^ own[i]


@compiled(_VOID(_I8, _INT, _INT, _INT, _I8, _I8, _I8, _I8, _I8, _INT, _I8))
def rescaled(x, offset, bits, shift, top, mine, theirs, own, shared, server, out):
    """The end of `protocols.truncation.rescale`: the shifted share without its part of the wrap."""
    mask, wrap = _mask(bits - shift), bits - shift
    more = -(offset >> shift) + (1 if shift else 0) if server else 0
    added = offset if server else 0
    for i in range(x.size):
        sign = 1 - 2 * mine[i]
        product = sign * (1 - 2 * theirs[i]) * shared[i] + theirs[i] * sign * own[i]
        if server:
            product += mine[i] * theirs[i]
        out[i] = (((x[i] + added) >> shift) & mask) - ((top[i] - product) << wrap) + more


@compiled(_VOID(_I8, _I8, _I8))
def joint(variables, masks, out):
    """`protocols.comparison._joint_products`: bit k says whether all of the variables of masks[k] are 1."""
    for i in range(variables.size):
        word = 0
        for k in range(masks.size):
            word |= (1 << k) if variables[i] & masks[k] == masks[k] else 0
        out[i] = word


@compiled()
def _parity(x):
    x ^= x >> 32
    x ^= x >> 16
    x ^= x >> 8
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    return x & 1


@compiled(_VOID(_I8, _INT, _INT, _I8, _INT, _INT, _I8, _I8))
def narrow_digit(c, at, width, words, less_place, equal_place, variables, less):
    """A digit of at most 6 bits: the parity of the one-hot's bits above it, to `less` or a bit of the variables; its own bit to another."""
    mask, bits = (1 << width) - 1, _mask(1 << width)
    for i in range(c.size):
        digit = (c[i] >> at) & mask
        above = _parity(words[i] & bits & (-2 << digit))
        if less_place >= 0:
            variables[i] |= above << less_place
        else:
            less[i] = above
        if equal_place >= 0:
            variables[i] |= ((words[i] >> digit) & 1) << equal_place


@compiled(_VOID(_I8, _INT, _INT, _M8, _I8))
def wide_digit(c, at, width, words, less):
    """A digit of more than 6 bits: the parity of the bits above it, in the words (count, n) of its one-hot."""
    mask = (1 << width) - 1
    for i in range(c.size):
        digit = (c[i] >> at) & mask
        first = digit >> 6
        total = words[i, first] & (-2 << (digit & 63))
        for k in range(first + 1, words.shape[1]):
            total ^= words[i, k]
        less[i] = _parity(total)


@compiled(_VOID(_I8, _I8, _I8, _M8, _INT, _I8, _I8, _INT, _I8))
def masked_bit(opened, own, joint, terms, server, borrow, rho, top, c):
    """The end of `protocols.comparison.compare`, in place of `borrow`: that, all products, rho, and at S the top bit of c, negated.

    A term is (bit of `joint` or -1, bit of `own` or -1, bits of `opened` that must all be 1); without either of the first two it is S's.
    """
    for t in range(terms.shape[0]):
        in_joint, in_own, bits = terms[t, 0], terms[t, 1], terms[t, 2]
        if in_joint >= 0:
            for i in range(opened.size):
                borrow[i] ^= (joint[i] >> in_joint) & (1 if opened[i] & bits == bits else 0)
        elif in_own >= 0:
            for i in range(opened.size):
                borrow[i] ^= (own[i] >> in_own) & (1 if opened[i] & bits == bits else 0)
        elif server:
            for i in range(opened.size):
                borrow[i] ^= 1 if opened[i] & bits == bits else 0
    for i in range(borrow.size):
        borrow[i] = (borrow[i] & 1) ^ rho[i]
        if server:
            borrow[i] ^= ((c[i] >> top) & 1) ^ 1


@compiled(_VOID(_M8, _M8, _INT, _C8))
def differences(x, index, bits, out):
    """`protocols.maximum`: (H, N) at (groups, size) -> (H, groups, pairs), of all pairs, in Z_2^bits."""
    mask, size = _mask(bits), index.shape[1]
    for h in range(x.shape[0]):
        for g in range(index.shape[0]):
            pair = 0
            for i in range(size):
                for j in range(i + 1, size):
                    out[h, g, pair] = (x[h, index[g, i]] - x[h, index[g, j]]) & mask
                    pair += 1


@compiled(_VOID(_C8, _INT, _C8))
def patterns(beta, size, out):
    """(H, groups, pairs) -> (H, groups, size - 1): whether a candidate, but the last, beats each opponent; the first of equals does."""
    for h in range(beta.shape[0]):
        for g in range(beta.shape[1]):
            for i in range(size - 1):
                pattern, place = 0, 0
                for j in range(size):
                    if j != i:
                        low, high = min(i, j), max(i, j)
                        bit = beta[h, g, low * (2 * size - low - 1) // 2 + high - low - 1] & 1
                        pattern |= (bit ^ (1 if j < i else 0)) << place
                        place += 1
                out[h, g, i] = pattern


@compiled(_VOID(_C8, _M8, _D8, _D8, _INT, _M8, _M8, _M8, _INT, _M8))
def selected(pattern, expansion, products, shared, is_shared, x, r, index, server, out):
    """A share of x_last + sum_i w_i (x_i - x_last) for x (H, N) and shares r of its masks, at (groups, size) -> (H, groups)."""
    size = index.shape[1]
    for h in range(pattern.shape[0]):
        for g in range(pattern.shape[1]):
            last = index[g, size - 1]
            value = (x[h, last] if server else 0) - r[h, last]
            for i in range(size - 1):
                row = expansion[pattern[h, g, i]]
                difference = x[h, index[g, i]] - x[h, last]
                value += row[0] * (r[h, last] - r[h, index[g, i]] + (difference if server else 0))
                for k in range(1, row.size):
                    value += row[k] * (difference * products[h, g, i, k - 1] - (shared[h, g, i, k - 1] if is_shared else 0))
            out[h, g] = value


@compiled(_VOID(_C8, _M8, _I8, _INT, _M8, _C8))
def thresholds(words, public, sizes, highest, table, out):
    """`protocols.ceiling.combined`: words (H, N, n), public (H, N), rows of these sizes, table (columns, thresholds), highest first."""
    inside = 64 * words.shape[2] - 1
    for h in range(words.shape[0]):
        at = 0
        for row in range(sizes.size):
            for j in range(sizes[row]):
                bit = 0
                for k in range(out.shape[2]):
                    place = (public[h, at] - highest + k) & inside
                    bit ^= (words[h, at, place >> 6] >> (place & 63)) & 1
                    out[h, row, k] ^= -bit & table[j, k]
                at += 1


@compiled(_VOID(_M8, _I8, _M8, _M8))
def read(words, index, tables, out):
    """`protocols.table.read`: words (count, n), rotated left by their index, tables (t, 64 n) -> (t, count)."""
    number = words.shape[1]
    for i in range(words.shape[0]):
        for t in range(out.shape[0]):
            out[t, i] = 0
        low, skip = index[i] & 63, (index[i] >> 6) % number
        for place in range(number):
            word = words[i, (place - skip) % number] << low
            if low:
                word |= (words[i, (place - skip - 1) % number] >> (64 - low)) & ((1 << low) - 1)
            for t in range(out.shape[0]):
                total = 0
                for k in range(64):  # a loop of vectors; sums of octets, kept, would not stay in a processor's nearest cache
                    total += tables[t, 64 * place + k] & -((word >> k) & 1)
                out[t, i] += total


@compiled(_VOID(_M8, _I8, _M8))
def row_sums(x, lengths, out):
    """`protocols.rows.Rows.sum`: x (H, N), rows of these lengths side by side -> (H, rows)."""
    for h in range(x.shape[0]):
        at = 0
        for row in range(lengths.size):
            total = 0
            for j in range(at, at + lengths[row]):
                total += x[h, j]
            out[h, row] = total
            at += lengths[row]


@compiled()
def _ones(x):
    """`protocols.table.ones`."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x += x >> 8
    x += x >> 16
    return (x + (x >> 32)) & 127


@compiled()
def _from(words, i, start):
    """The 64 bits from `start` on of the words (1 or 2, n) of element i, side by side and around their end."""
    first, at = start >> 6, start & 63
    second = first + 1 if first + 1 < words.shape[0] else 0
    return ((words[first, i] >> at) & ((1 << (63 - at) << 1) - 1)) | (words[second, i] << 1 << (63 - at) if at else 0)


@compiled(_VOID(_M8, _I8, _I8, _I8, _M8, _I8, _I8, _I8, _I8, _INT, _I8, _I8))
def exponential(words, d, r, mask, table, factors, layout, drops, parts, server, own, mine):
    """`protocols.exponential`: this party's signed factors, to `own`, and what it opens, to `mine`; words (1 or 2, n) of the one-hot.

    `table` (2^low, digits), 64 of them at most; layout: first digit, top, how many above its next one, bits of the low digit and of the
    high, what each of those above adds, fraction bits of parts; drops and parts of the last axis.
    """
    first, above, low_bits, high_mask = layout[0], layout[2], layout[3], (1 << layout[4]) - 1
    low_mask, saturated, part_bits, digits = (1 << low_bits) - 1, layout[5], layout[6], table.shape[1]
    many_drops, many_parts = drops.size, parts.size
    for i in range(d.size):
        high, low = d[i] >> low_bits, d[i] & low_mask
        count, u = 0, 0
        for w in range(words.shape[0]):
            count += _ones(words[w, i])
        bits = _from(words, i, (first - high) & high_mask)
        for k in range(digits):
            u += table[low, k] & -((bits >> k) & 1)
        if above:
            start, left = layout[1] + 2 - high, above
            while left > 0:
                bits = _from(words, i, start & high_mask)
                if left < 64:
                    bits &= (1 << left) - 1
                u += _ones(bits) * saturated
                start, left = start + 64, left - 64
        sign = 1 - (count & 2)
        if server:
            sign *= (count & 1) * 2 - 1
        x, drop = sign * factors[r[i] & low_mask], drops[i % many_drops]
        own[i] = x
        u = (u * parts[i % many_parts]) >> part_bits
        mine[i] = ((u * x + (1 << (drop - 1))) >> drop) + mask[i]


@compiled(_VOID(_I8, _C8, _I8, _M8, _M8, _I8))
def chosen_line(s, lines, beta, products, places, out):
    """The end of `protocols.reciprocal`: lines (tables, 2, count), opened; beta, a bit for each table but the lowest.

    products (4 (2^tables - 1), count) are this party's shares; places (tables, 2) those of the index and of the lowest bit that counts.
    """
    number = lines.shape[0]
    coefficients = np.empty(1 << number, np.int64)
    for i in range(s.size):
        total, at, many = np.int64(0), 0, 1
        coefficients[0] = 1
        for table in range(number - 1, -1, -1):
            part = (s[i] & ((1 << places[table, 0]) - 1)) >> places[table, 1]
            value, slope = lines[table, 0, i], lines[table, 1, i]
            for k in range(many):
                line = (value + slope * part) * products[at, i] - part * products[at + 1, i] - slope * products[at + 2, i]
                total += coefficients[k] * (line + products[at + 3, i])
                at += 4
            if table:
                bit = (beta[i] >> (table - 1)) & 1
                for k in range(many):
                    coefficients[many + k] = coefficients[k] * (1 - 2 * bit)
                    coefficients[k] *= bit
                many *= 2
        out[i] = total


@compiled(_VOID(_C8, _C8, _I8, _I8, _M8))
def scored(q, k, starts, lengths, out):
    """`protocols.sequences.scored` of one row each: q (H, B, d), k (H, S, d), the first row of each and how many -> out (H, N)."""
    heads, rows, width = q.shape
    for h in range(heads):
        at = 0
        for b in range(rows):
            own = q[h, b]
            for j in range(lengths[b]):
                row, total = k[h, starts[b] + j], np.int64(0)
                for i in range(width):
                    total += own[i] * row[i]
                out[h, at + j] = total
            at += lengths[b]


@compiled(_VOID(_M8, _C8, _I8, _I8, _C8))
def mixed(p, v, starts, lengths, out):
    """`protocols.sequences.mixed` of one row each: p (H, N), v (H, S, d) -> out (H, B, d)."""
    heads, rows, width = out.shape
    for h in range(heads):
        at = 0
        for b in range(rows):
            total = out[h, b]
            for i in range(width):
                total[i] = 0
            for j in range(lengths[b]):
                weight, row = p[h, at + j], v[h, starts[b] + j]
                for i in range(width):
                    total[i] += weight * row[i]
            at += lengths[b]
