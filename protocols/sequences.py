"""Several sequences in one pass: the keys or values that they have cached, one sequence below the other, and products with them.

A pass stacks what its sequences hold: rows of earlier wires and rows of new ones are gathered under one name, so that who has left is
left out, who has come stands at the end, and what a product names does not grow with the replies. Lengths are public, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.correlations import Bits, Fit, Kind, Known, Layout, Names, Number, Part, Related, Shape, Shapes, Tensors, fits
from protocols.declared import Declared
from protocols.matrix import product_held
from protocols.party import Party
from protocols.product import beaver, cost_scores, cost_weighted, grouped
from protocols.ring import array, blank, known
from protocols.rows import INDEX, Rows, Stacked
from protocols.shares import Hidden, Shares, Wire

Segment = tuple[int, int, int]
"""Rows of one of several values: which value, the first row, how many."""


class GatherMask(Kind, frozen=True):
    """The mask of rows of earlier wires (..., n, d), joined along their rows: no bytes. It outlives its pass, and they need not.

    A segment is rows `starts[i]` .. `starts[i] + sizes[i]` of the wire `wires[i]`; no two segments need differ.
    """

    wires: Names
    starts: Names
    sizes: Names

    def fit(self, shapes: Shapes) -> Fit:
        fits(len(self.wires) == len(self.starts) == len(self.sizes))
        found = {name: shapes.mask(name) for name in set(self.wires)}
        *lead, _, width = found[self.wires[0]]
        for name, start, size in zip(self.wires, self.starts, self.sizes, strict=True):
            fits(found[name] == (*lead, found[name][-2], width), size > 0, start + size <= found[name][-2])
        left = (*lead, sum(self.sizes), width)
        return Fit((), left, 2 * math.prod(left))

    @property
    def outlives(self) -> bool:
        """See `Kind`."""
        return True

    def replaces(self) -> tuple[int, ...]:
        """See `Kind`."""
        return tuple(dict.fromkeys(self.wires))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        found = {name: known.mask(name) for name in set(self.wires)}
        return (), self.of([found[name] for name in self.wires])

    def of(self, values: Sequence[Tensor]) -> Tensor:
        """The rows of these values, (..., S, d)."""
        places = zip(values, self.starts, self.sizes, strict=True)
        return torch.cat([value[..., start : start + size, :] for value, start, size in places], -2)


class PutRowsMask(Kind, frozen=True):
    """The mask of an earlier wire (..., `rows`, d) of which some rows are others now, those of y (..., R, d) in order: no bytes.

    It outlives its pass, and neither of the two need.
    """

    x: Number
    y: Number
    places: Names
    rows: Number
    refers: ClassVar[tuple[str, ...]] = ("x", "y")
    moves: ClassVar[tuple[str, ...]] = ("places",)

    def fit(self, shapes: Shapes) -> Fit:
        x, y = shapes.mask(self.x), shapes.mask(self.y)
        fits(len(x) >= 2, x[-2] == self.rows, y == (*x[:-2], len(self.places), x[-1]))
        fits(max(self.places) < self.rows, len(set(self.places)) == len(self.places))
        return Fit((), x, 2 * math.prod(x))

    @property
    def outlives(self) -> bool:
        """See `Kind`."""
        return True

    def replaces(self) -> tuple[int, ...]:
        """See `Kind`."""
        return (self.x,)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        put = getattr(known, "put", None)  # a source may keep them in one memory
        return (), rows_put(known.mask(self.x), known.mask(self.y), self.places) if put is None else put(self)


def rows_put(x: Tensor, rows: Tensor, places: Sequence[int]) -> Tensor:
    """x (..., S, d) with other rows (..., R, d) at these places."""
    out = x.clone()
    out[..., torch.tensor(places, device=x.device), :] = rows
    return out


class SequencesScoresMask(Kind, frozen=True):
    """Shares of the rows' elements of r_x r_y^T, sequence by sequence: x (H, R, d) -> (H, N).

    Each has its own rows of y (H, S, d), which begin at `starts`. Or x (H, G, R, d) and y (H, 1, S, d) -> (H, G, N), where heads share.
    """

    x: Number
    y: Number
    shape: Shape
    bits: Bits
    starts: Names
    rows: Layout
    refers: ClassVar[tuple[str, ...]] = ("x", "y")

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    def layout(self) -> tuple[Rows, ...]:
        """Of each sequence."""
        rows = Rows.read(self.rows)
        return rows.parts if isinstance(rows, Stacked) else (rows,)

    def _fit(self, shapes: Shapes, x: tuple[int, ...], value: tuple[int, ...]) -> Fit:
        """Of x with these leading axes."""
        rows, parts, y = Rows.read(self.rows), self.layout(), shapes.mask(self.y)
        fits(len(parts) == len(self.starts), len(y) in (3, 4), x == y[:-2] or (len(x) == 2 and x[0] == y[0] and y[1] == 1))
        fits(*(start + part.columns <= y[-2] for start, part in zip(self.starts, parts, strict=True)))
        batch, total = math.prod(x), sum(part.total for part in parts)
        held = product_held(batch, rows.number, y[-1], rows.columns) + 2 * math.prod(y) + batch * total + INDEX * rows.count
        macs = batch * y[-1] * total
        return Fit((value,), None, held, macs)

    def fit(self, shapes: Shapes) -> Fit:
        rows, x, y = Rows.read(self.rows), shapes.mask(self.x), shapes.mask(self.y)
        fits(len(x) >= 3, x[-2] == rows.number, x[-1] == y[-1])
        return self._fit(shapes, x[:-2], (*x[:-2], rows.count))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        return (scored(known.mask(self.x), known.mask(self.y), self.starts, self.layout(), self.bits),), None


class SequencesWeightedMask(SequencesScoresMask, frozen=True):
    """Shares of r_x r_y, sequence by sequence, x packed: (H, N) -> (H, R, d)."""

    def fit(self, shapes: Shapes) -> Fit:
        rows, x, y = Rows.read(self.rows), shapes.mask(self.x), shapes.mask(self.y)
        fits(len(x) >= 2, x[-1] == rows.count)
        return self._fit(shapes, x[:-1], (*x[:-1], rows.number, y[-1]))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        return (mixed(known.mask(self.x), known.mask(self.y), self.starts, self.layout(), self.bits),), None


def scored(q: Tensor, k: Tensor, starts: Sequence[int], parts: Sequence[Rows], bits: int) -> Tensor:
    """q k^T for each sequence, packed: q (H, R, d), k (H, S, d) -> (H, N)."""
    if _rows_alone(q, k, parts):
        out = torch.empty((len(q), sum(part.first for part in parts)), dtype=torch.int64)
        kernels.fast.scored(array(q.contiguous()), array(k.contiguous()), *_places(starts, parts), array(out))
        return out
    found, at = [], 0
    for start, part in zip(starts, parts, strict=True):
        own = k[..., start : start + part.columns, :].transpose(-1, -2)
        scores = grouped(q[..., at : at + part.number, :], own, bits)
        found.append(scores[..., 0, :] if part.number == 1 else part.pack(scores))
        at += part.number
    return torch.cat(found, -1)


def mixed(p: Tensor, v: Tensor, starts: Sequence[int], parts: Sequence[Rows], bits: int) -> Tensor:
    """p v for each sequence, p packed: p (H, N), v (H, S, d) -> (H, R, d)."""
    if _rows_alone(p, v, parts):
        out = torch.empty((len(p), len(parts), v.shape[-1]), dtype=torch.int64)
        kernels.fast.mixed(array(p.contiguous()), array(v.contiguous()), *_places(starts, parts), array(out))
        return out
    found, at = [], 0
    for start, part in zip(starts, parts, strict=True):
        weights = p[..., at : at + part.count]
        weights = weights[..., None, :] if part.number == 1 else part.unpack(weights)
        found.append(grouped(weights, v[..., start : start + part.columns, :], bits))
        at += part.count
    return torch.cat(found, -2)


def _rows_alone(x: Tensor, y: Tensor, parts: Sequence[Rows]) -> bool:
    """Whether a compiled loop takes them all: one row of each sequence, and no heads that share."""
    return kernels.fast is not None and x.is_cpu and y.dim() == 3 and all(part.number == 1 for part in parts)


def _places(starts: Sequence[int], parts: Sequence[Rows]) -> tuple[np.ndarray, np.ndarray]:
    """Where each sequence's rows begin, and how many there are, as compiled loops read them."""
    return np.array(starts, np.int64), np.array([part.first for part in parts], np.int64)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Stack(Hidden):
    """A wire (H, S, d) of what all sequences have cached; those of the pass under way begin at the rows `starts`."""

    masked: Tensor
    mask: Tensor
    name: int
    bits: int
    frac: int
    starts: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Stack(shape={tuple(self.masked.shape)}, bits={self.bits}, frac={self.frac}, value hidden)"

    def shape_only(self) -> Stack:
        """For walks that know no values."""
        return Stack(blank(*self.masked.shape), blank(*self.mask.shape), self.name, self.bits, self.frac, self.starts)


def gather(party: Party, before: Stack | None, wire: Wire, segments: Sequence[Segment], starts: Sequence[int]) -> Stack:
    """Rows of what was cached (value 0 of a segment) and of a new wire (value 1), both (..., n, d), as one; local, no bytes.

    `starts`: the first row of each sequence of the pass in the result. Neither operand is needed after the pass. Learns: nothing, either.
    """
    values = (wire if before is None else before, wire)
    chosen = [values[segment[0]] for segment in segments]
    kind = GatherMask(*(tuple(field) for field in ([value.name for value in chosen], *list(zip(*segments, strict=True))[1:])))
    name = party.take(kind).name
    if not known(wire.masked):
        shape = (*wire.shape[:-2], sum(kind.sizes), wire.shape[-1])
        return Stack(blank(*shape), blank(*shape), name, wire.bits, wire.frac, tuple(starts))
    masked, mask = (kind.of([getattr(value, part) for value in chosen]) for part in ("masked", "mask"))
    return Stack(masked, mask, name, wire.bits, wire.frac, tuple(starts))


def put(party: Party, key: tuple[str, str], before: Stack, wire: Wire, places: Sequence[int], starts: Sequence[int]) -> Stack:
    """What was cached with a new row (..., R, d) of each sequence at its place, to be kept under this key; local, no bytes.

    The row that stood there filled up its sequence. Neither operand is needed after the pass. Learns: nothing, either.
    """
    name = party.take(PutRowsMask(before.name, wire.name, tuple(places), before.masked.shape[-2])).name
    shape = blank(*before.masked.shape)
    into = Stack(shape, shape, name, wire.bits, wire.frac, tuple(starts))
    if not known(wire.masked):
        return into
    if party.recording is not None:
        found: Stack = party.recording.put(key, before, wire, places, into)
        return found
    return replace(into, masked=rows_put(before.masked, wire.masked, places), mask=rows_put(before.mask, wire.mask, places))


def scores_of_sequences(party: Party, q: Wire, k: Stack, rows: Rows, bits: int) -> Shares:
    """`product.scores` for each sequence and its own keys: q (H, R, d) -> (H, N), in Z_2^bits; local; exact."""
    *lead, _, width = q.shape
    kind = SequencesScoresMask(q.name, k.name, (*lead, rows.count), bits, k.starts, rows.fields())
    mask, parts = party.take(kind), kind.layout()
    party.macs(3 * math.prod(lead) * width * sum(part.total for part in parts))
    product = beaver(party.is_server, q, k, mask.shares[0], lambda a, b: scored(a, b, k.starts, parts, bits))
    return Shares(product, bits, q.frac + k.frac)


def weighted_of_sequences(party: Party, p: Wire, v: Stack, rows: Rows, bits: int) -> Shares:
    """`product.weighted` for each sequence and its own values: packed p (H, N) -> (H, R, d), in Z_2^bits; local; exact."""
    *lead, _ = p.shape
    width = v.masked.shape[-1]
    kind = SequencesWeightedMask(p.name, v.name, (*lead, rows.number, width), bits, v.starts, rows.fields())
    mask, parts = party.take(kind), kind.layout()
    party.macs(3 * math.prod(lead) * width * sum(part.total for part in parts))
    product = beaver(party.is_server, p, v, mask.shares[0], lambda a, b: mixed(a, b, v.starts, parts, bits))
    return Shares(product, bits, p.frac + v.frac)


def cost_gather() -> Declared:
    """Nothing moves, and nothing is dealt."""
    return Declared()


def cost_put() -> Declared:
    """Nothing moves, and nothing is dealt."""
    return Declared()


def cost_scores_of_sequences(heads: int, rows: Rows, bits: int) -> Declared:
    """The elements that the rows hold."""
    return cost_scores(heads, rows, bits)


def cost_weighted_of_sequences(heads: int, rows: Rows, width: int, bits: int) -> Declared:
    """A row of `width` for each row."""
    return cost_weighted(heads, rows, width, bits)
