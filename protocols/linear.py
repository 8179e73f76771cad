"""Linear maps with a weight that only the server knows: `linear`, its diagonal form `scale`, and row look-up.

Source: Delphi's preprocessed linear layer (ePrint 2020/050) with the client's part made by a dealer from a masked
weight, as in `docs/protocols.md`. Set-up, once per client and model: S and D expand B from a seed that S drew, S sends
W~ = W + B to C. D never sees W~, C never sees B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from protocols.correlations import Bits, Fit, Flag, Kind, Known, Layout, Number, Part, Related, Shape, Shapes, Tensors, Text, fits
from protocols.declared import NONE, UP, Declared
from protocols.matrix import NARROW, matmul, matmul_transposed, product_held
from protocols.party import Item, Party, Protocol_
from protocols.prg import Prg, derive
from protocols.ring import BLOCK, Packing, add, blank, known, packed_size
from protocols.shares import Shares


@dataclass(frozen=True, slots=True)
class Weight:
    """The public side of a server's tensor: its name, shape (in, out), ring and fraction bits.

    `small`: that its encoded entries lie in [-2^21, 2^21), which makes S's products cheaper; the ring plan says so.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    frac: int
    small: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """In what the parties hold it, its mask, or it masked: upper bits are arbitrary, and half the memory is half the time of a row."""
        return torch.int32 if self.bits <= NARROW else torch.int64


def _mask_blocks(seed: bytes, weight: Weight, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
    """B, flat, in the order of its one keystream: a large one is never whole in int64."""
    key = derive(seed, f"weight mask {weight.name} {weight.shape} {weight.bits} {weight.frac}")
    stream, count = Prg(key).stream(0), math.prod(weight.shape)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        yield slice(start, stop), stream.uniform((stop - start,), weight.bits, device)


def weight_mask(seed: bytes, weight: Weight, device: torch.device | str = "cpu") -> Tensor:
    """B: uniform in the weight's ring, fresh per (seed, tensor, encoding); a seed belongs to one lowering. In the weight's `dtype`."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    flat = out.view(-1)
    for where, block in _mask_blocks(seed, weight, device):
        flat[where] = block
    return out


def masked_weight(encoded: Tensor, seed: bytes, weight: Weight) -> memoryview:
    """W~ = W + B, packed, what S sends to C once."""
    assert tuple(encoded.shape) == weight.shape, f"{weight.name}: a mask must cover its tensor once"
    flat = encoded.reshape(-1)
    packing = Packing(flat.numel(), weight.bits)
    for where, block in _mask_blocks(seed, weight, encoded.device):
        packing.add(block.add_(flat[where]))
    return packing.out.data


class LinearMask(Kind, frozen=True):
    """r (rows, in) of C; shares of r B, (rows, out), of which C makes shares of -r W. Diagonal: r (rows..., n), shares of r * B[slice]."""

    weight: Text
    shape: Shape  # of the input
    out: Number  # columns of the output
    bits: Bits
    diagonal: Flag = 0
    transposed: Flag = 0
    window: Layout = ()  # diagonal: first and last + 1 index of the weight's second axis, once or several times
    drawn_early: ClassVar[bool] = True
    shared_early: ClassVar[bool] = True
    moves: ClassVar[tuple[str, ...]] = ("window",)

    def client_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part((*self.shape[:-1], self.out), self.bits),)

    def select(self, weight: Tensor) -> Tensor:
        """The part of the weight that this product reads; diagonal weights (H, n) become (H, rows, 1)."""
        if len(self.window) <= 2:
            return weight[:, self.window[0] : self.window[1], None] if self.window else weight
        return torch.cat([weight[:, first:end] for first, end in self._windows()], 1)[..., None]

    def _windows(self) -> Iterator[tuple[int, int]]:
        return zip(self.window[::2], self.window[1::2], strict=True)

    def times(self, x: Tensor, weight: Tensor, small: bool = False) -> Tensor:
        """The product that this mask is for, modulo 2^bits."""
        w = self.select(weight)
        if self.diagonal:
            return x * w if known(x, w) else blank(*x.shape)
        return matmul_transposed(x, w, self.bits, small) if self.transposed else matmul(x, w, self.bits, small)

    def fit(self, shapes: Shapes) -> Fit:
        w = shapes.weight_mask(self.weight)
        if self.window:
            fits(len(w) == 2, len(self.window) % 2 == 0, *(first <= end <= w[1] for first, end in self._windows()))
            w = (w[0], sum(end - first for first, end in self._windows()), 1)
        if self.diagonal:
            shape = np.broadcast_shapes(self.shape, w)
            return Fit((shape,), None, math.prod(shape))
        inner, columns = reversed(w) if self.transposed else w
        fits(len(self.shape) > 0, self.shape[-1] == inner)
        sizes = (1, math.prod(self.shape[:-1]), inner, columns)
        return Fit(((*self.shape[:-1], columns),), None, product_held(*sizes), math.prod(sizes))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        return (self.times(client[0], known.weight_mask(self.weight)),), None

    def complete(self, weights: Mapping[str, Tensor], own: Tensors, shares: Tensors) -> tuple[Tensor, ...]:
        """C, before the query: its share of the output, (share of r B) - r W~."""
        return (shares[0] - self.times(own[0], weights[self.weight]),)


def linear(
    party: Party, x: Shares | Sequence[Shares], weight: Weight, *, bits: int, transposed: bool = False, client_only: bool = False
) -> Protocol_[Shares]:
    """x W for S's weight W, in Z_2^bits; x (..., n), W (n, m) -> (..., m), fraction bits added.

    Of several values x is what they are side by side along the last axis; what C has of each leaves as soon as it is known.

    Steps: C sends x_C + r; S's share is (x_S + x_C + r) W + u, C's is v - r W~, where u + v = r B (D). With
    `client_only` S's share of x is known to be 0.
    Domain: any x in a ring of at least `bits`; |x W| < 2^(bits-1). Exact.
    Rounds: 1 message C -> S. Bits: `bits` per input element, none back, none per output.
    Learns: S the uniform x + r; C nothing. C's output share depends on no query (`early`).
    """
    out, parts = weight.shape[0] if transposed else weight.shape[1], [x] if isinstance(x, Shares) else x
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    return _product(party, parts, weight, LinearMask(weight.name, shape, out, bits, 0, int(transposed)), client_only)


def scale(party: Party, x: Shares, weight: Weight, *, bits: int, window: Sequence[int] = ()) -> Protocol_[Shares]:
    """x * w elementwise for S's w, in Z_2^bits: `linear` with a diagonal weight; the same steps, domain and leaks.

    x (H, rows, d) and w (H, n) read at `window` of its second axis, from and to, once or several times, broadcast over d; or w
    broadcastable to x.
    Rounds: 1 message C -> S of `bits` per element; where x is `early` it leaves before the query, and no round is left.
    """
    kind = LinearMask(weight.name, x.shape, x.shape[-1], bits, 1, 0, tuple(window))
    return _product(party, [x], weight, kind, False)


def _product(party: Party, parts: Sequence[Shares], weight: Weight, kind: LinearMask, client_only: bool) -> Protocol_[Shares]:
    narrowest = min(weight.bits, *(part.bits for part in parts))
    assert kind.bits <= narrowest, f"{weight.name}: a ring of {kind.bits} bits is wider than its operands"
    correlation = party.take(kind)
    party.macs(math.prod(kind.shape) * (1 if kind.diagonal else kind.out))
    if party.is_server:
        masked = yield [Item(x.value, kind.bits, from_server=False, early=x.early) for x in parts]
        totals = masked if client_only else [add(x.value, theirs) for x, theirs in zip(parts, masked, strict=True)]
        total = totals[0] if len(totals) == 1 else torch.cat(totals, -1) if known(*totals) else blank(*kind.shape)
        shared = correlation.shares[0]
        value = shared
        if known(total):
            held = party.weights[weight.name]
            if kind.window and party.recording is not None:
                held = party.recording.windowed(held, kind.window)
            value = kind.times(total, held, weight.small) + shared
    else:
        items, ends = [], list(accumulate(part.shape[-1] for part in parts))
        for x, end in zip(parts, ends, strict=True):
            # a share that is not known yet is a shape, and its mask is not expanded for it
            own = x.value if x.value.is_meta else x.value + correlation.own[0][..., end - x.shape[-1] : end]
            items.append(Item(own, kind.bits, from_server=False, early=x.early))
        yield items
        value = correlation.shares[0]
    return Shares(value, kind.bits, parts[0].frac + weight.frac, early=True)


def lookup(party: Party, ids: Tensor | None, count: int, table: Weight, *, bits: int) -> Protocol_[Shares]:
    """Rows of S's table (V, d) at C's secret indices, in Z_2^bits: `linear` on one-hot rows; -> (count, d).

    Or, where C holds the table encrypted (`party.tables`), by one message of a masked ciphertext a row (`protocols.lattice.linear`).
    `ids` (count,) at C (or None where they are not known yet), None at S. Rounds: 1 message C -> S. Bits: V * bits a row.
    Learns: nothing, either; the number of rows is public.
    """
    size = table.shape[0]
    if party.tables is not None:
        hidden = ids if ids is not None and not party.is_server else blank(count)
        return Shares((yield from party.tables.lookup(table.name, hidden, table.shape[1], bits, size)), bits, table.frac)
    if party.is_server or ids is None or ids.is_meta:
        value = blank(count, size)
    else:
        value = torch.zeros((count, size), dtype=torch.int64, device=ids.device)
        value[torch.arange(count, device=ids.device), ids] = 1
    return (yield from linear(party, Shares(value, bits, 0), table, bits=bits, client_only=True))


def cost_linear(rows: int, inputs: int, outputs: int, bits: int, *, early: bool = False) -> Declared:
    """x W for x (rows, inputs): an element per input from C, an element per output from D."""
    sent = packed_size(rows * inputs, bits)
    dealer = packed_size(rows * outputs, bits)
    return Declared(dealer=dealer, early=sent, steps=NONE) if early else Declared(sent, dealer, steps=UP)


def cost_scale(count: int, bits: int, *, early: bool = False) -> Declared:
    """x * w for x of `count` elements."""
    return cost_linear(1, count, count, bits, early=early)


def cost_lookup(count: int, vocabulary: int, width: int, bits: int) -> Declared:
    """`count` rows of a table: `linear` on one-hot rows."""
    return cost_linear(count, vocabulary, width, bits)
