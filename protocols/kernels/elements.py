"""Compiled loops over ring elements: packing, keystreams, products of few rows. `protocols.kernels` says when they are used.

Every function writes into arrays that its caller has made, allocates nothing, and lets other threads run. Integers wrap modulo 2^64, as
in torch and numpy. Its twin in plain torch and numpy stands where it is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from protocols.kernels.build import compiled

# mypy: disable-error-code="no-untyped-def, no-any-return, misc"

_OCTETS = 512
_READ: Any = types.Array(types.uint8, 1, "C", readonly=True)
_VOID, _INT = types.void, types.int64
_I8, _U1 = types.int64[::1], types.uint8[::1]
_PRODUCTS = [types.void(each, each, each) for each in (types.int64[:, :, ::1], types.int32[:, :, ::1])]
_COLUMNS = 512


@compiled()
def _transposed(x):
    """An 8 x 8 matrix of bits, a row a byte, transposed (Hacker's Delight, 7-3)."""
    t = (x ^ (x >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
    x = x ^ t ^ (t << np.uint64(7))
    t = (x ^ (x >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
    x = x ^ t ^ (t << np.uint64(14))
    t = (x ^ (x >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
    return x ^ t ^ (t << np.uint64(28))


@compiled()
def _pack_bytes(x, size, place, out):
    """The bytes of an element from bit `place` on, `size` of them, little endian."""
    shift = np.uint64(place)
    if size == 1:
        for i in range(x.size):
            out[i] = np.uint8(np.uint64(x[i]) >> shift)
    elif size == 2:
        for i in range(x.size):
            v = np.uint64(x[i]) >> shift
            out[2 * i] = np.uint8(v)
            out[2 * i + 1] = np.uint8(v >> np.uint64(8))
    elif size == 4:
        for i in range(x.size):
            v = np.uint64(x[i]) >> shift
            for k in range(4):
                out[4 * i + k] = np.uint8(v >> np.uint64(8 * k))
    else:
        for i in range(x.size):
            v = np.uint64(x[i])
            for k in range(8):
                out[8 * i + k] = np.uint8(v >> np.uint64(8 * k))


@compiled()
def _pack_planes(x, number, place, out):
    """A plane for each of `number` bits from bit `place` on; in blocks of a few hundred octets, so that each loop is one of vectors."""
    count, length = x.size, (x.size + 7) // 8
    shift, mask = np.uint64(place), np.uint64((1 << number) - 1)
    words = np.empty(min(length, _OCTETS), np.uint64)
    for start in range(0, length, _OCTETS):
        stop = min(start + _OCTETS, length)
        whole = min(stop, count // 8)
        for at in range(start, whole):
            word = (np.uint64(x[8 * at]) >> shift) & mask
            word |= ((np.uint64(x[8 * at + 1]) >> shift) & mask) << np.uint64(8)
            word |= ((np.uint64(x[8 * at + 2]) >> shift) & mask) << np.uint64(16)
            word |= ((np.uint64(x[8 * at + 3]) >> shift) & mask) << np.uint64(24)
            word |= ((np.uint64(x[8 * at + 4]) >> shift) & mask) << np.uint64(32)
            word |= ((np.uint64(x[8 * at + 5]) >> shift) & mask) << np.uint64(40)
            word |= ((np.uint64(x[8 * at + 6]) >> shift) & mask) << np.uint64(48)
            word |= ((np.uint64(x[8 * at + 7]) >> shift) & mask) << np.uint64(56)
            words[at - start] = _transposed(word)
        if whole < stop:  # the last elements fill no octet
            word = np.uint64(0)
            for k in range(count - 8 * whole):
                word |= ((np.uint64(x[8 * whole + k]) >> shift) & mask) << np.uint64(8 * k)
            words[whole - start] = _transposed(word)
        for bit in range(number):
            plane = out[bit * length + start : bit * length + stop]
            for at in range(stop - start):
                plane[at] = np.uint8(words[at] >> np.uint64(8 * bit))


@compiled(_VOID(_I8, _INT, _U1))
def pack(x, bits, out):
    """`protocols.ring.pack`."""
    at, count, place, whole = 0, x.size, 0, bits // 8
    for size in (8, 4, 2, 1):
        if whole & size:
            _pack_bytes(x, size, place, out[at : at + count * size])
            at += count * size
            place += 8 * size
    if bits % 8:
        _pack_planes(x, bits % 8, place, out[at:])


@compiled(_VOID(_I8, _I8, _INT, _INT, _U1))
def pack_rest(x, share, xor, bits, out):
    """`pack` of what is left of x without a share of it, by addition or by XOR."""
    rest = np.empty(x.size, np.int64)
    if xor:
        for i in range(x.size):
            rest[i] = x[i] ^ share[i]
    else:
        for i in range(x.size):
            rest[i] = x[i] - share[i]
    pack(rest, bits, out)


@compiled()
def _unpack_bytes(raw, size, place, out):
    shift = np.uint64(place)
    if size == 1:
        for i in range(out.size):
            out[i] |= np.int64(np.uint64(raw[i]) << shift)
    elif size == 2:
        for i in range(out.size):
            out[i] |= np.int64((np.uint64(raw[2 * i]) | np.uint64(raw[2 * i + 1]) << np.uint64(8)) << shift)
    elif size == 4:
        for i in range(out.size):
            v = np.uint64(0)
            for k in range(4):
                v |= np.uint64(raw[4 * i + k]) << np.uint64(8 * k)
            out[i] |= np.int64(v << shift)
    else:
        for i in range(out.size):
            v = np.uint64(0)
            for k in range(8):
                v |= np.uint64(raw[8 * i + k]) << np.uint64(8 * k)
            out[i] |= np.int64(v)


@compiled()
def _unpack_planes(raw, number, place, out):
    count, length = out.size, (out.size + 7) // 8
    shift, octet = np.uint64(place), np.uint64(255)
    words = np.empty(min(length, _OCTETS), np.uint64)
    for start in range(0, length, _OCTETS):
        stop = min(start + _OCTETS, length)
        whole = min(stop, count // 8)
        words[:] = 0
        for bit in range(number):
            plane = raw[bit * length + start : bit * length + stop]
            for at in range(stop - start):
                words[at] |= np.uint64(plane[at]) << np.uint64(8 * bit)
        for at in range(stop - start):
            words[at] = _transposed(words[at])
        for at in range(start, whole):
            word = words[at - start]
            for k in range(8):
                out[8 * at + k] |= np.int64(((word >> np.uint64(8 * k)) & octet) << shift)
        if whole < stop:
            for k in range(count - 8 * whole):
                out[8 * whole + k] |= np.int64(((words[whole - start] >> np.uint64(8 * k)) & octet) << shift)


@compiled(_VOID(_READ, _INT, _I8))
def unpack(raw, bits, out):
    """`protocols.ring.unpack`."""
    at, count, place, whole = 0, out.size, 0, bits // 8
    out[:] = 0
    for size in (8, 4, 2, 1):
        if whole & size:
            _unpack_bytes(raw[at : at + count * size], size, place, out)
            at += count * size
            place += 8 * size
    if bits % 8:
        _unpack_planes(raw[at:], bits % 8, place, out)


@compiled(_VOID(_READ, _I8, _I8, _I8, _I8))
def unpack_many(raw, starts, counts, bits, out):
    """`unpack` of several tensors, side by side in `out`: tensor p has counts[p] elements from byte starts[p] on."""
    at = 0
    for p in range(starts.size):
        size = counts[p] * (bits[p] // 8) + (bits[p] % 8) * ((counts[p] + 7) // 8)
        unpack(raw[starts[p] : starts[p] + size], bits[p], out[at : at + counts[p]])
        at += counts[p]


@compiled(_VOID(_INT, _INT, _INT, _U1))
def counters(name, first, count, out):
    """Big endian (name, first), (name, first + 1), ...: what counter mode encrypts for a stream."""
    for i in range(count):
        block = np.uint64(first + i)
        for k in range(8):
            out[16 * i + k] = np.uint8(np.uint64(name) >> np.uint64(56 - 8 * k))
            out[16 * i + 8 + k] = np.uint8(block >> np.uint64(56 - 8 * k))


@compiled(_VOID(_I8, _I8, _U1))
def counters_many(names, counts, out):
    """The first counts[p] blocks of each of several streams, side by side."""
    at = 0
    for p in range(names.size):
        counters(names[p], 0, counts[p], out[16 * at :])
        at += counts[p]


@compiled(_VOID(_READ, _INT, _INT, _I8))
def uniform(raw, size, bits, out):
    """Elements of Z_2^bits from little endian words of `size` bytes; the representatives in [0, 2^bits), at 64 bits the int64."""
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - bits)
    if size == 1:
        for i in range(out.size):
            out[i] = np.int64(np.uint64(raw[i]) & mask)
    elif size == 2:
        for i in range(out.size):
            out[i] = np.int64((np.uint64(raw[2 * i]) | np.uint64(raw[2 * i + 1]) << np.uint64(8)) & mask)
    elif size == 4:
        for i in range(out.size):
            v = np.uint64(0)
            for k in range(4):
                v |= np.uint64(raw[4 * i + k]) << np.uint64(8 * k)
            out[i] = np.int64(v & mask)
    else:
        for i in range(out.size):
            v = np.uint64(0)
            for k in range(8):
                v |= np.uint64(raw[8 * i + k]) << np.uint64(8 * k)
            out[i] = np.int64(v & mask)


@compiled(_VOID(_READ, _I8, _I8, _I8, _I8, _I8))
def uniform_many(raw, starts, counts, sizes, bits, out):
    """`uniform` of several tensors, side by side in `out`: tensor p has counts[p] words of sizes[p] bytes from byte starts[p] on."""
    at = 0
    for p in range(starts.size):
        stop = at + counts[p]
        uniform(raw[starts[p] : starts[p] + counts[p] * sizes[p]], sizes[p], bits[p], out[at:stop])
        at = stop


@compiled(*_PRODUCTS)
def product(x, y, out):
    """x @ y: (b, n, d), (b, d, m) -> (b, n, m). Columns in blocks that the cache holds, four of y's rows at a time.

    Modulo 2^64, or of int32 modulo 2^32: twice as many in an instruction, of half the memory.
    """
    batch, rows, inner = x.shape
    columns = y.shape[2]
    for b in range(batch):
        for at in range(0, columns, _COLUMNS):
            width = min(_COLUMNS, columns - at)
            for r in range(rows):
                total = out[b, r, at : at + width]
                for j in range(width):
                    total[j] = 0
            k = 0
            while k + 4 <= inner:
                y0, y1 = y[b, k, at : at + width], y[b, k + 1, at : at + width]
                y2, y3 = y[b, k + 2, at : at + width], y[b, k + 3, at : at + width]
                for r in range(rows):
                    total = out[b, r, at : at + width]
                    x0, x1, x2, x3 = x[b, r, k], x[b, r, k + 1], x[b, r, k + 2], x[b, r, k + 3]
                    for j in range(width):
                        total[j] += x0 * y0[j] + x1 * y1[j] + x2 * y2[j] + x3 * y3[j]
                k += 4
            while k < inner:
                y0 = y[b, k, at : at + width]
                for r in range(rows):
                    total = out[b, r, at : at + width]
                    x0 = x[b, r, k]
                    for j in range(width):
                        total[j] += x0 * y0[j]
                k += 1


@compiled(*_PRODUCTS)
def product_transposed(x, y, out):
    """x @ y^T, as `product`: (b, n, d), (b, m, d) -> (b, n, m)."""
    batch, rows, inner = x.shape
    kind = out.dtype.type  # a sum of int32 would be an int64, and take its instructions
    for b in range(batch):
        for j in range(y.shape[1]):
            row = y[b, j]
            for r in range(rows):
                own = x[b, r]
                total = kind(0)
                for k in range(inner):
                    total = kind(total + own[k] * row[k])
                out[b, r, j] = total
