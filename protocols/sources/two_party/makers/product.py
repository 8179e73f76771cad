"""Products of masks, of matrices and elementwise, by the lattice, which itself takes transfers where they are cheaper."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from protocols.correlations import Role, Tensors
from protocols.matrix import matmul
from protocols.product import MatmulMask, MatrixTimesRowsMask, ProductMask, RowsTimesMatrixMask
from protocols.ring import add, blank, known, multiply, reduce
from protocols.rounds import Protocol_
from protocols.rows import Rows
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Pieces
from protocols.sources.two_party.shared import crossed, one_sided


def _expanded(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return blank(*shape) if x.is_meta else x.expand(shape)


@makes(ProductMask, at_once=True)
def product_mask(pair: Pair, kind: ProductMask, own: Tensors) -> Protocol_[Made]:
    """r_x r_y of both shares, as products of columns: a factor of its own for each element, or one for a row of them.

    Learns: nothing, either.
    """
    x, y = pair.mask(kind.x).value, pair.mask(kind.y).value
    rows = Rows.read(kind.rows) if kind.rows else None
    if rows is not None and rows.step == 0:  # rows of one length, one after the other
        x, y = x.reshape(*y.shape, rows.first), y[..., None]
    elif rows is not None:
        y = blank(*x.shape) if pair.traced else rows.spread(y)
    left, right = (reduce(each, kind.bits) for each in columns(x, y))

    def cross(holder: Role) -> Protocol_[Tensor]:
        second, first = one_sided(pair, holder, right, left)
        return pair.lattice.columns(holder, first, second, kind.bits)

    shared = yield from crossed(pair, cross)
    return Made((reduce(add(shared, multiply(left, right)), kind.bits).reshape(kind.shape),))


def columns(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x * y with broadcasting as (n, w) and (n, 1), w being how many elements share a factor y: the more, the less is sent."""
    shape = np.broadcast_shapes(x.shape, y.shape)
    width = shape[-1] if shape and y.dim() and y.shape[-1] == 1 else 1
    factors = _expanded(y, (*shape[:-1], 1) if width > 1 else shape)
    return _expanded(x, shape).reshape(-1, width), factors.reshape(-1, 1)


def matrices(
    pair: Pair, left: Tensor, right: Tensor, bits: int, need: Tensor | None = None, pieces: Pieces | None = None
) -> Protocol_[Tensor]:
    """This party's share of left @ right: its own product, and both cross terms by the lattice, each encrypted by the right's holder.

    Where groups of lefts have one right (`protocols.product.grouped`), it is encrypted once.
    """
    if left.dim() == right.dim() == 4 and right.shape[1] == 1 < left.shape[1]:
        lines, group, rows, inner = left.shape
        need = None if need is None else need.repeat(group, 1)
        made = yield from matrices(pair, left.reshape(lines, group * rows, inner), right[:, 0], bits, need, pieces)
        return made.reshape(lines, group, rows, made.shape[-1])
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    pieces = pieces if tuple(right.shape[:-2]) == batch else None
    left = reduce(_expanded(left, (*batch, *left.shape[-2:])), bits)
    right = reduce(_expanded(right, (*batch, *right.shape[-2:])), bits)

    def cross(sender: Role) -> Protocol_[Tensor]:
        first, second = one_sided(pair, sender, right, left)
        return pair.lattice.matmul(sender, second, first, bits, need, pieces)

    shared = yield from crossed(pair, cross)
    own = matmul(left, right, bits) if known(left, right) else blank(*shared.shape)
    return reduce(add(shared, own), bits)


def needed(rows: Rows) -> Tensor:
    """(number, columns): which elements of a matrix the rows hold."""
    return torch.arange(rows.columns) < torch.from_numpy(rows.lengths)[:, None]


def _columns(pair: Pair, kind: MatmulMask) -> Tensor:
    """All that `y` names, joined along their rows."""
    found = [pair.mask(name).value for name in kind.y]
    return found[0] if len(found) == 1 else torch.cat(found, -2)


def _pieces(pair: Pair, kind: MatmulMask, axis: int) -> Pieces | None:
    """The same by name, where all of it stays for later passes: its ciphertexts then do too."""
    if not pair.kept.issuperset(kind.y):
        return None
    return Pieces(axis, tuple(kind.y), tuple(pair.mask(name).shape[-2] for name in kind.y))


@makes(MatmulMask, at_once=True)
def matmul_mask(pair: Pair, kind: MatmulMask, own: Tensors) -> Protocol_[Made]:
    """r_x r_y of both shares. Learns: nothing, either."""
    made = yield from matrices(pair, pair.mask(kind.x).value, _columns(pair, kind), kind.bits)
    return Made((made,))


@makes(RowsTimesMatrixMask, at_once=True)
def rows_times_matrix(pair: Pair, kind: RowsTimesMatrixMask, own: Tensors) -> Protocol_[Made]:
    """The same with x unpacked, zeros where its rows have no element."""
    x = Rows.read(kind.rows).unpack(pair.mask(kind.x).value)
    made = yield from matrices(pair, x, _columns(pair, kind), kind.bits, pieces=_pieces(pair, kind, -2))
    return Made((made,))


@makes(MatrixTimesRowsMask, at_once=True)
def matrix_times_rows(pair: Pair, kind: MatrixTimesRowsMask, own: Tensors) -> Protocol_[Made]:
    """The elements of r_x r_y^T that the rows hold."""
    rows = Rows.read(kind.rows)
    y = _columns(pair, kind).transpose(-1, -2)
    made = yield from matrices(pair, pair.mask(kind.x).value, y, kind.bits, needed(rows), _pieces(pair, kind, -1))
    return Made((rows.pack(made),))
