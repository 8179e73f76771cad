"""The kernels of `protocols/ot/kernels.py` in NumPy, for blocks as rows of two words."""

from __future__ import annotations

import numpy as np

from protocols.ot.words import Words

EVEN = np.uint64(2**64 - 2)


def transpose(rows: Words) -> Words:
    bits = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")
    return np.packbits(np.ascontiguousarray(bits.T), axis=1, bitorder="little").view(np.uint64)


def to_hash(nodes: Words, m: int) -> Words:
    """Nodes (trees, n, 2) to (trees, m, 2)."""
    x = nodes[:, :m]
    return np.stack([x[..., 1], x[..., 0] ^ x[..., 1]], -1)


def expand(nodes: Words, hashed: Words, aes: Words) -> tuple[Words, Words]:
    """The next level (trees, 2 m, 2), from nodes (trees, m, 2), and its left sums."""
    left = hashed ^ aes
    return np.concatenate([left, nodes ^ left], 1), np.bitwise_xor.reduce(left, 1)


def repair(nodes: Words, hole: Words, bits: Words, keys: Words) -> tuple[Words, Words]:
    """A level (trees, 2 m, 2) whose hole's children are filled in as far as they can be, the other 0; and the next holes."""
    level, m = nodes.copy(), nodes.shape[1] // 2
    for tree, (at, bit) in enumerate(zip(hole.astype(int), bits.astype(int), strict=True)):
        level[tree, at] = level[tree, at + m] = 0
        side = level[tree, m * bit : m * (bit + 1)]
        level[tree, at + m * bit] = keys[tree] ^ np.bitwise_xor.reduce(side, 0)
    return level, hole + np.uint64(m) * (np.uint64(1) - bits)


def finish(nodes: Words, hole: Words | None) -> Words:
    leaves = nodes.copy()
    leaves[..., 0] &= EVEN
    for tree, at in enumerate([] if hole is None else hole.astype(int)):
        leaves[tree, at] = 0
        leaves[tree, at] = np.bitwise_xor.reduce(leaves[tree], 0) | np.array([1, 0], np.uint64)
    return leaves


def encode(noise: Words, places: np.ndarray, secret: Words) -> Words:
    return noise ^ np.bitwise_xor.reduce(secret[read_places(places)], 1)


def read_places(places: np.ndarray) -> np.ndarray:
    """(outputs, 10)."""
    return places[:, :10].astype(np.int64) | (places[:, 10:].astype(np.int64) >> np.arange(10) & 1) << 16


def pack(values: Words, bits: int) -> Words:
    planes = np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1, count=bits, bitorder="little").reshape(-1)
    planes = np.concatenate([planes, np.zeros(-len(planes) % 64, np.uint8)])
    return np.packbits(planes, bitorder="little").view(np.uint64)


def unpack(words: Words, count: int, bits: int) -> Words:
    planes = np.unpackbits(words.view(np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    planes = np.concatenate([planes, np.zeros((count, 64 - bits), np.uint8)], 1)
    return np.packbits(planes, axis=1, bitorder="little").reshape(-1).view(np.uint64)


def lay(blocks: Words, first: int) -> Words:
    number = np.arange(first, first + len(blocks), dtype=np.uint64)
    return np.stack([blocks[:, 1] ^ number, blocks[:, 1] ^ blocks[:, 0]], 1)


def shifts_of(count: int, drop: int) -> Words:
    return np.maximum(np.arange(count) - drop, 0).astype(np.uint64)[:, None]


def scale_payloads(near: Words, far: Words, x: Words, xor: bool, drop: int = 0) -> Words:
    """(y_bits, n): what the sender masks by the pads of choice 0 and 1."""
    rounded = [((x >> np.uint64(drop - 1 - i)) + np.uint64(1)) >> np.uint64(1) if i < drop else x for i in range(len(near))]
    return near ^ far ^ x if xor else near + far + np.stack(rounded)


def scale_send(near: Words, far: Words, x: Words, bits: int, xor: bool, drop: int = 0) -> tuple[Words, Words]:
    """From the pads (y_bits, n) of choice 0 and 1: the payloads' string, and the share."""
    shifts = shifts_of(len(near), drop)
    payloads = scale_payloads(near, far, x, xor, drop)
    bit_rows = [
        np.unpackbits(row.view(np.uint8).reshape(-1, 8), axis=1, count=bits - max(0, i - drop), bitorder="little").reshape(-1)
        for i, row in enumerate(payloads)
    ]
    string = np.concatenate(bit_rows)
    string = np.packbits(np.concatenate([string, np.zeros(-len(string) % 64, np.uint8)]), bitorder="little").view(np.uint64)
    share = np.bitwise_xor.reduce(near, 0) if xor else (np.uint64(0) - (near << shifts)).sum(0, dtype=np.uint64)
    return string, share


def scale_choose(pads: Words, y: Words, xor: bool, drop: int = 0) -> Words:
    """The receiver's share before payloads, from its pads (y_bits, n)."""
    if xor:
        return np.bitwise_xor.reduce(pads, 0)
    places = np.arange(len(pads), dtype=np.uint64)[:, None]
    return (np.where(y >> places & np.uint64(1), np.uint64(0) - pads, pads) << shifts_of(len(pads), drop)).sum(0, dtype=np.uint64)


def scale_finish(payloads: Words, y: Words, xor: bool, drop: int = 0) -> Words:
    """What the payloads (y_bits, n) that y chooses add to the receiver's share."""
    chosen = payloads * (y >> np.arange(len(payloads), dtype=np.uint64)[:, None] & np.uint64(1))
    return np.bitwise_xor.reduce(chosen, 0) if xor else (chosen << shifts_of(len(payloads), drop)).sum(0, dtype=np.uint64)


def table_send(pads: Words, flips: Words, table: Words, per: int, bits: int) -> Words:
    """Masked tables, groups (n, groups) of `per` slots: pads (m, n, 2, groups), flips (m, n), table (n, 2^m)."""
    n, slots = table.shape
    out = np.zeros((n, slots // per), np.uint64)
    for i in range(n):
        for slot in range(slots):
            group, place = divmod(slot, per)
            value = int(table[i, slot])
            for k in range(len(pads)):
                value ^= int(pads[k, i, (slot >> k & 1) ^ int(flips[k, i]), group]) >> place * bits
            out[i, group] |= np.uint64((value & (1 << bits) - 1) << place * bits)
    return out


def table_choose(pads: Words, groups: Words, index: Words, per: int, bits: int) -> Words:
    """Slots of masked tables (n, groups), by the receiver's pads (m, n, 1, groups)."""
    group, place = (index // np.uint64(per)).astype(int), index % np.uint64(per)
    rows = np.arange(len(index))
    found = groups[rows, group] ^ np.bitwise_xor.reduce(pads[:, rows, 0, group], 0)
    return found >> place * np.uint64(bits) & np.uint64((1 << bits) - 1)
