"""Products of two shared tensors, from masked wires (Beaver's triples in the masked form of ABY2.0, ePrint 2020/1225).

A wire is opened once; every product that reads it costs the dealer a sharing of the masks' product, and no message.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from protocols.correlations import Bits, Fit, Kind, Known, Layout, Names, Number, Part, Related, Shape, Shapes, Tensors, fits
from protocols.declared import Declared, dealt
from protocols.matrix import matmul, product_held
from protocols.party import Party
from protocols.ring import blank, common_shape, known
from protocols.rows import INDEX, Rows
from protocols.shares import Hidden, Shares, Wire


class ProductMask(Kind, frozen=True):
    """Shares of r_x * r_y, elementwise with broadcasting; with `rows` y has one value a row of x's packed rows."""

    x: Number
    y: Number
    shape: Shape
    bits: Bits
    rows: Layout = ()
    refers: ClassVar[tuple[str, ...]] = ("x", "y")

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    def fit(self, shapes: Shapes) -> Fit:
        x, y, index = shapes.mask(self.x), shapes.mask(self.y), 0
        if self.rows:
            rows = Rows.read(self.rows)
            fits(len(x) == 2, x[-1] == rows.count, y == (x[0], rows.number))
            y, index = x, INDEX * rows.count
        shape = np.broadcast_shapes(x, y)
        return Fit((shape,), None, 2 * math.prod(shape) + index)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        y = known.mask(self.y)
        return (known.mask(self.x) * (Rows.read(self.rows).spread(y) if self.rows else y),), None


class MatmulMask(Kind, frozen=True):
    """Shares of r_x r_y, batched: (..., n, d) x (..., d, m). `y` may name several wires, joined along their rows.

    With `reach` the first of these rows is repeated after the last, until there are so many.
    """

    x: Number
    y: Names
    shape: Shape
    bits: Bits
    reach: Number = 0
    refers: ClassVar[tuple[str, ...]] = ("x", "y")

    def shared_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    def _joined(self, shapes: Shapes) -> tuple[int, ...]:
        """Of all that `y` names."""
        found = [shapes.mask(name) for name in self.y]
        *batch, first, width = found[0]
        alike = Counter(found)  # most of them are a row each
        fits(*((*each[:-2], each[-1]) == (*batch, width) for each in alike))
        rows = sum(each[-2] * count for each, count in alike.items())
        fits(not self.reach or (first > 0 and rows <= self.reach))
        return (*batch, self.reach or rows, width)

    def joined(self, known: Known) -> Tensor:
        """All that `y` names; a source may keep them side by side."""
        rows = getattr(known, "rows", None)
        found: Tensor = joined_rows([known.mask(name) for name in self.y], self.reach) if rows is None else rows(self.y, self.reach)
        return found

    def _product(self, x: tuple[int, ...], y: tuple[int, ...], made: int = 0) -> Fit:
        """Of x (..., n, d) and y (..., d, m), where `made` elements are made besides."""
        fits(len(x) >= 2, len(y) >= 2, x[-1] == y[-2])
        batch = np.broadcast_shapes(x[:-2], y[:-2])
        sizes = (math.prod(batch), *x[-2:], y[-1])
        return Fit(((*batch, x[-2], y[-1]),), None, math.prod(y) + product_held(*sizes) + made, math.prod(sizes))

    def fit(self, shapes: Shapes) -> Fit:
        return self._product(shapes.mask(self.x), self._joined(shapes))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        return (matmul(known.mask(self.x), self.joined(known), self.bits),), None


class RowsTimesMatrixMask(MatmulMask, frozen=True):
    """The same where x is packed: the rows' elements alone, (H, N), the rest of the (rows, columns) matrix being 0."""

    rows: Layout = ()

    def fit(self, shapes: Shapes) -> Fit:
        rows, x = Rows.read(self.rows), shapes.mask(self.x)
        fits(x[-1] == rows.count)
        made = math.prod(x[:-1]) * rows.total
        return self._product((*x[:-1], rows.number, rows.columns), self._joined(shapes), made + INDEX * rows.count)

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        x = Rows.read(self.rows).unpack(known.mask(self.x))
        return (grouped(x, self.joined(known), self.bits),), None


class MatrixTimesRowsMask(MatmulMask, frozen=True):
    """Shares of the rows' elements of r_x r_y^T, (H, N): the rest is neither dealt nor sent."""

    rows: Layout = ()

    def fit(self, shapes: Shapes) -> Fit:
        rows, y = Rows.read(self.rows), self._joined(shapes)
        whole = self._product(shapes.mask(self.x), (*y[:-2], y[-1], y[-2]), INDEX * rows.count)
        *batch, number, columns = whole.values[0]
        fits((number, columns) == (rows.number, rows.columns))
        return whole._replace(values=((*batch, rows.count),))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        y = self.joined(known)
        return (Rows.read(self.rows).pack(grouped(known.mask(self.x), y.transpose(-1, -2), self.bits)),), None


class Operand(Protocol):
    """A masked value that both parties hold: a wire, or several joined."""

    @property
    def masked(self) -> Tensor:
        """x + r, known to both."""

    @property
    def mask(self) -> Tensor:
        """This party's share of r."""


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Cached(Hidden):
    """Wires joined along their rows (axis -2): the keys or values of all positions so far."""

    masked: Tensor
    mask: Tensor
    names: tuple[int, ...]
    bits: int
    frac: int
    reach: int = 0  # rows, where the first is repeated behind the last

    def __repr__(self) -> str:
        return f"Cached(shape={tuple(self.masked.shape)}, bits={self.bits}, frac={self.frac}, value hidden)"

    @staticmethod
    def join(before: Cached | None, wire: Wire) -> Cached:
        """The cache with the new rows after the old."""
        if before is None:
            return Cached(wire.masked, wire.mask, (wire.name,), wire.bits, wire.frac)
        if not known(wire.masked):
            shape = (*wire.shape[:-2], before.masked.shape[-2] + wire.shape[-2], wire.shape[-1])
            return Cached(blank(*shape), blank(*shape), (*before.names, wire.name), wire.bits, wire.frac)
        masked, mask = torch.cat([before.masked, wire.masked], -2), torch.cat([before.mask, wire.mask], -2)
        return Cached(masked, mask, (*before.names, wire.name), wire.bits, wire.frac)

    @staticmethod
    def extended(party: Party, key: tuple[str, str], before: Cached | None, wire: Wire, columns: int) -> tuple[Cached, Cached]:
        """`join`, to be kept under this key, and to be read, padded to `columns` rows unless 0."""
        if party.recording is not None and before is not None and known(wire.masked):
            both: tuple[Cached, Cached] = party.recording.extended(key, before, wire, columns)
            return both
        joined = Cached.join(before, wire)
        return joined, joined.padded(columns) if columns else joined

    def padded(self, reach: int) -> Cached:
        """With its first row repeated until there are `reach`: both what is masked and its mask, which D repeats too."""
        assert reach >= self.masked.shape[-2] > 0, "a cache is padded to as many rows as it has, or more"
        if not known(self.masked):
            found = (blank(*self.masked.shape[:-2], reach, self.masked.shape[-1]),) * 2
        else:
            found = joined_rows([self.masked], reach), joined_rows([self.mask], reach)
        return Cached(*found, self.names, self.bits, self.frac, reach)

    def shape_only(self) -> Cached:
        """For walks that know no values."""
        shape = blank(*self.masked.shape)
        return Cached(shape, shape, self.names, self.bits, self.frac)


def joined_rows(parts: Sequence[Tensor], reach: int) -> Tensor:
    """Along axis -2, and the first row again until there are `reach`, if that is given."""
    missing = reach - sum(part.shape[-2] for part in parts)
    if missing <= 0:
        return torch.cat(list(parts), -2) if len(parts) > 1 else parts[0]
    first = parts[0][..., :1, :]
    return torch.cat([*parts, first.expand(*first.shape[:-2], missing, first.shape[-1])], -2)


def beaver(server: bool, x: Operand, y: Operand, shared: Tensor, times: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """z = X Y - X r_y - r_x Y + r_x r_y, shared: S holds X (Y - r_y,S) - r_x,S Y + c_S, C the same without X Y."""
    if not known(x.masked, y.masked):
        return blank(*shared.shape)
    if x.masked.numel() < y.masked.numel():  # the same sum, with nothing to compute of the larger operand
        left = x.masked - x.mask if server else -x.mask
        return times(left, y.masked) - times(x.masked, y.mask) + shared
    right = y.masked - y.mask if server else -y.mask
    return times(x.masked, right) - times(x.mask, y.masked) + shared


def multiply(party: Party, x: Wire, y: Wire, bits: int, rows: Rows | None = None) -> Shares:
    """x * y elementwise, with broadcasting, in Z_2^bits; fraction bits add. Local once both are open; exact.

    With `rows`, y (H, number) holds one factor for each row of the packed x (H, N).
    Domain: both wires in rings of at least `bits`. Learns: nothing, either.
    """
    shape = x.shape if rows else common_shape(x.masked, y.masked)
    mask = party.take(ProductMask(x.name, y.name, shape, bits, rows.fields() if rows else ()))
    product = beaver(party.is_server, x, y, mask.shares[0], lambda a, b: a * (rows.spread(b) if rows else b))
    return Shares(product, bits, x.frac + y.frac)


def grouped(x: Tensor, y: Tensor, bits: int) -> Tensor:
    """x y, batched, modulo 2^bits: where a group of x's (..., G, n, d) has one y (..., 1, d, m), all rows of the group are one matrix."""
    if not x.dim() == y.dim() >= 3 or y.shape[-3] != 1 or x.shape[-3] == 1:
        return matmul(x, y, bits)
    *lead, group, rows, inner = x.shape
    return matmul(x.reshape(*lead, 1, group * rows, inner), y, bits).reshape(*lead, group, rows, y.shape[-1])


def matmul_wires(party: Party, x: Wire, y: Cached, bits: int) -> Shares:
    """x y, batched: (..., n, d) x (..., d, m), in Z_2^bits; local; exact."""
    shape = (*x.shape[:-1], y.masked.shape[-1])
    mask = party.take(MatmulMask(x.name, y.names, shape, bits, y.reach))
    party.macs(3 * x.masked.numel() * shape[-1])
    return Shares(beaver(party.is_server, x, y, mask.shares[0], lambda a, b: matmul(a, b, bits)), bits, x.frac + y.frac)


def scores(party: Party, q: Wire, k: Cached, rows: Rows, bits: int) -> Shares:
    """The elements of q k^T that `rows` holds: q (H, n, d), k (H, m, d) -> (H, N), in Z_2^bits; local; exact.

    Or q (H, G, n, d), k (H, 1, m, d) -> (H, G, N), where G heads of queries share keys.
    """
    *lead, _, width = q.shape
    mask = party.take(MatrixTimesRowsMask(q.name, k.names, (*lead, rows.count), bits, k.reach, rows.fields()))
    party.macs(3 * math.prod(lead) * rows.total * width)
    product = beaver(party.is_server, q, k, mask.shares[0], lambda a, b: rows.pack(_transposed(a, b, bits)))
    return Shares(product, bits, q.frac + k.frac)


def weighted(party: Party, p: Wire, v: Cached, rows: Rows, bits: int) -> Shares:
    """p v for packed rows p (H, N) and v (H, m, d) -> (H, n, d), in Z_2^bits; local; exact; with groups as in `scores`."""
    lead, width = p.shape[:-1], v.masked.shape[-1]
    mask = party.take(RowsTimesMatrixMask(p.name, v.names, (*lead, rows.number, width), bits, v.reach, rows.fields()))
    party.macs(3 * math.prod(lead) * rows.total * width)
    product = beaver(party.is_server, p, v, mask.shares[0], lambda a, b: grouped(rows.unpack(a), b, bits))
    return Shares(product, bits, p.frac + v.frac)


def _transposed(x: Tensor, y: Tensor, bits: int) -> Tensor:
    return grouped(x, y.transpose(-1, -2), bits)


def cost_multiply(count: int, bits: int) -> Declared:
    """`count` products of opened wires: their shares come from D, and no byte moves between S and C."""
    return dealt((count, bits))


def cost_matmul_wires(batch: int, rows: int, columns: int, bits: int) -> Declared:
    """(batch, rows, columns) elements of products of matrices, whatever their inner size."""
    return cost_multiply(batch * rows * columns, bits)


def cost_scores(heads: int, rows: Rows, bits: int) -> Declared:
    """The elements of q k^T that the rows hold."""
    return cost_multiply(heads * rows.count, bits)


def cost_weighted(heads: int, rows: Rows, width: int, bits: int) -> Declared:
    """p v: a row of `width` for each row."""
    return cost_multiply(heads * rows.number * width, bits)
