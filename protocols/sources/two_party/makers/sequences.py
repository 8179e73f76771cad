"""Masks of several sequences' cached rows, and products with them: each sequence's by itself, all side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from protocols.correlations import Tensors
from protocols.ring import blank
from protocols.rounds import Protocol_, parallel
from protocols.rows import Rows
from protocols.sequences import GatherMask, PutRowsMask, SequencesScoresMask, SequencesWeightedMask, rows_put
from protocols.sources.two_party.makers.product import matrices, needed
from protocols.sources.two_party.making import Made, makes
from protocols.sources.two_party.pair import Pair, Secret


@makes(GatherMask, at_once=True)
def gather_mask(pair: Pair, kind: GatherMask, own: Tensors) -> Protocol_[Made]:
    """Each party's rows of its own shares: no message."""
    found = [pair.mask(name) for name in kind.wires]
    *lead, _, width = found[0].shape
    value = blank(*lead, sum(kind.sizes), width) if pair.traced else kind.of([each.value for each in found])
    return Made(left=Secret(value, min(each.bits for each in found)))
    yield


@makes(PutRowsMask, at_once=True)
def put_rows_mask(pair: Pair, kind: PutRowsMask, own: Tensors) -> Protocol_[Made]:
    """The same: rows of each party's own shares."""
    x, y = pair.mask(kind.x), pair.mask(kind.y)
    value = blank(*x.value.shape) if pair.traced else rows_put(x.value, y.value, kind.places)
    return Made(left=Secret(value, min(x.bits, y.bits)))
    yield


@makes(SequencesScoresMask, at_once=True)
def scores_mask(pair: Pair, kind: SequencesScoresMask, own: Tensors) -> Protocol_[Made]:
    """The rows' elements of r_x r_y^T for each sequence; nothing of what was encrypted for the pass before serves again."""
    x, y = pair.mask(kind.x).value, pair.mask(kind.y).value

    def one(at: int, start: int, part: Rows) -> Protocol_[Tensor]:
        left, right = _rows(x, at, part.number), _rows(y, start, part.columns)
        made = yield from matrices(pair, left, right.transpose(-1, -2), kind.bits, needed(part))
        return part.pack(made)

    made = yield from _each(kind.starts, kind.layout(), lambda part: part.number, one)
    return Made((_joined(made, -1),))


@makes(SequencesWeightedMask, at_once=True)
def weighted_mask(pair: Pair, kind: SequencesWeightedMask, own: Tensors) -> Protocol_[Made]:
    """r_x r_y for each sequence, x unpacked with zeros where its rows have no element."""
    x, y = pair.mask(kind.x).value, pair.mask(kind.y).value

    def one(at: int, start: int, part: Rows) -> Protocol_[Tensor]:
        packed = blank(*x.shape[:-1], part.count) if x.is_meta else x[..., at : at + part.count]
        return (yield from matrices(pair, part.unpack(packed), _rows(y, start, part.columns), kind.bits))

    made = yield from _each(kind.starts, kind.layout(), lambda part: part.count, one)
    return Made((_joined(made, -2),))


def _each(
    starts: tuple[int, ...], parts: tuple[Rows, ...], size: Callable[[Rows], int], one: Callable[[int, int, Rows], Protocol_[Tensor]]
) -> Protocol_[list[Tensor]]:
    """One product for each sequence, side by side: where its part of x begins, where its rows of y do."""
    tasks, at = [], 0
    for start, part in zip(starts, parts, strict=True):
        tasks.append(one(at, start, part))
        at += size(part)
    return (yield from parallel(*tasks))


def _rows(x: Tensor, start: int, size: int) -> Tensor:
    return blank(*x.shape[:-2], size, x.shape[-1]) if x.is_meta else x[..., start : start + size, :]


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    if not parts[0].is_meta:
        return torch.cat(parts, axis)
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return blank(*shape)
