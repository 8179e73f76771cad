"""What counts of the rows of further tokens, which are filled up so that shapes repeat, and what is added to rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from privinf.graph.private import PrivinfTensor
from protocols.memo import constant
from protocols.party import Protocol_
from protocols.ring import placed
from protocols.rowrange import RowRange
from protocols.shares import Shares
from protocols.softmax import Live
from protocols.truncation import rescale


@constant(64)
def _mask(filled: tuple[int, ...], ends: tuple[int, ...]) -> Tensor:
    """For rows of so many elements as many ones as they have, and zeros: of one row after the other; the same in all layers."""
    pairs = zip(filled, ends, strict=True)
    return torch.from_numpy(np.repeat([1, 0] * len(ends), [many for columns, end in pairs for many in (end, columns - end)]))


@constant(64)
def _divided(within: RowRange, filled: tuple[int, ...], ends: tuple[int, ...], part: int) -> Tensor:
    """What hangs on the lengths of rows, see `RowRange.divided_row`: of one row for it, else for each element of all."""
    found = {end: within.divided_row(end)[part] for end in set(ends)}
    if len(ends) == 1:
        return found[ends[0]]
    return torch.from_numpy(np.repeat(np.concatenate([found[end].numpy() for end in ends]), filled))


def live_rows(x: PrivinfTensor, filled: Sequence[int], within: RowRange | None) -> Live:
    """Of the row of a further token of each sequence, filled up to so many elements."""
    party, columns = x.party, tuple(filled)
    ends, device = tuple([end for _, end in x.runtime.windows(1)]), x.runtime.device

    def varying(make: Callable[[tuple[int, ...]], Tensor], *key: Hashable) -> Tensor:
        """Layers that are alike have one and the same."""
        return party.varying(lambda further: placed(make(tuple([end + further for end in ends])), device), ("rows", columns, ends, *key))

    mask = varying(lambda ends: _mask(columns, ends))
    if within is None or not within.by_length:
        return Live(mask)
    offset, *parts = [varying(partial(_divided, within, columns, part=part), within, part) for part in range(3)]
    return Live(mask, offset, (parts[0], parts[1]))


def row_offsets(x: PrivinfTensor, heads: int, at: int, asked: int, bits: int, frac: int) -> Protocol_[Shares]:
    """Columns of x (B, T, at + heads), from `at` on, for the queries that are asked: (B heads, asked), as the scores are."""
    (batch, count, _), several = x.shares.shape, x.runtime.batch
    rows = slice(count - asked, count) if several is None or asked == count else several.lasts
    added = x.shares.map(lambda v: v[:, rows, at:].transpose(1, 2).reshape(batch * heads, asked))
    return (yield from rescale(x.party, added, bits=bits, frac=frac))
