"""Tables read at a masked index through a shared one-hot (Pika, ePrint 2022/826).

The dealer shares, by XOR, the one-hot of -r for the index's mask r; rotated by the public index it is the one-hot of the
index itself. Each party sums its own bits times the table's entries; the difference of the two sums is the entry, up to
the sign of (S's bit - C's bit) at the hot place, which the dealer knows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.memo import constant
from protocols.ring import array, flat, like

WORD = 64
BLOCK = 1 << 14  # entries that are read at a time


def one_hot(mask: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """D: the words of the one-hot of -mask, and the sign, from S's shares of the words (..., words)."""
    size = WORD * shares.shape[-1]
    place = -mask & (size - 1)
    word = (place >> 6)[..., None]
    hot = torch.zeros_like(shares).scatter_(-1, word, (torch.ones_like(place) << (place & 63))[..., None])
    return hot, 2 * (shares.gather(-1, word)[..., 0] >> (place & 63) & 1) - 1


def ones(words: Tensor) -> Tensor:
    """The number of bits of every 64-bit word."""
    # >> is arithmetic: the masks clear what comes in from the left
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


def own_sign(count: Tensor, *, server: bool) -> Tensor:
    """A party's part of the sign of (S's bit - C's bit) at the hot place, from the number of bits of its share alone.

    The sign is the product of both parts: the shares differ in one place, so that n_S - n_C is the sign. Modulo 4,
    n_S - n_C = 2 (n_S mod 2) - 1 + 2 (s ^ c) for the second bits s of n_S and c of n_C, which is (2 (n_S mod 2) - 1) (1 - 2 s) (1 - 2 c).
    """
    second = 1 - (count & 2)
    return ((count & 1) * 2 - 1) * second if server else second


def hot_held(count: int, words: int) -> int:
    """Elements that `one_hot` makes for `count` places."""
    return count * (2 * words + 12)


def rotated(words: Tensor, places: Tensor) -> Tensor:
    """Every row of words (..., n) rotated left by its number of bits."""
    if words.is_meta:
        return words
    count = words.shape[-1]
    which = (torch.arange(count, device=words.device) - (places >> 6)[..., None]) % count
    low, high = (places & 63)[..., None], words.gather(-1, (which - 1) % count)
    # >> is arithmetic: what comes in from the left is cleared; a shift by 64 is made of two
    carried = ((high >> 1) & ((1 << 63) - 1)) >> (63 - low)
    return (words.gather(-1, which) << low) | carried


@constant()
def _octet_bits() -> Tensor:
    """(256, 8): the bits of every octet, lowest first."""
    octets = np.arange(256, dtype=np.uint8)[:, None]
    return torch.from_numpy(np.unpackbits(octets, axis=1, bitorder="little").astype(np.int64))


@constant(64)
def _octet_sums(tables: Tensor) -> Tensor:
    """(8 n, 256, t): the sums of the entries at the bits of every octet. Kept by the identity of a public constant."""
    count = len(tables)
    return tables.reshape(count, -1, 1, 8).mul(like(_octet_bits(), tables)).sum(-1).permute(1, 2, 0).contiguous()


def read(words: Tensor, index: Tensor, tables: Tensor) -> Tensor:
    """One party's sums of its bits times the entries: words (..., n), index (...), tables (t, 64 n) -> (t, ...).

    Eight bits at a time: their partial sums are tabulated, so that an entry costs no operation of its own.
    """
    if kernels.fast is not None and words.is_cpu:
        return _compiled(words, index, tables)
    octets = rotated(words, index).contiguous().view(torch.uint8)  # (..., 8 n), lowest bits first
    sums = _octet_sums(like(tables, words)).flatten(0, 1)  # (8 n * 256, t)
    places = octets.reshape(-1, octets.shape[-1]).long() + 256 * torch.arange(octets.shape[-1], device=words.device)
    step = max(1, BLOCK // places.shape[1])
    out = [sums[part].sum(1) for part in torch.split(places, step)]  # (step, t) each
    return torch.cat(out).T.reshape(len(tables), *index.shape)


def _compiled(words: Tensor, index: Tensor, tables: Tensor) -> Tensor:
    number, out = words.shape[-1], torch.empty((len(tables), *index.shape), dtype=torch.int64)
    rows = array(out.view(len(tables), index.numel()))
    kernels.fast.read(array(words.reshape(index.numel(), number).contiguous()), flat(index), array(tables.contiguous()), rows)
    return out
