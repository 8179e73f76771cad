"""What counts of the rows of further tokens, which are filled up so that shapes repeat, and what is added to rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from privinf.graph.private import PrivinfTensor
from protocols.exponential import FRAC
from protocols.memo import constant
from protocols.party import Protocol_
from protocols.ring import placed
from protocols.rowrange import RowRange
from protocols.shares import Shares
from protocols.softmax import Live
from protocols.truncation import rescale


@constant()
def _step(columns: int) -> Tensor:
    """So many ones, and as many zeros."""
    return torch.from_numpy(np.repeat(np.array([1, 0], np.int64), columns))


def live_rows(x: PrivinfTensor, filled: Sequence[int], within: RowRange | None) -> Live:
    """Of the row of a further token of each sequence, filled up to so many elements."""
    party = x.party
    ends = [end for _, end in x.runtime.windows(1)]
    rows = [(placed(_step(columns), x.runtime.device), columns, end) for columns, end in zip(filled, ends, strict=True)]

    def joined(each: Sequence[Tensor]) -> Tensor:
        return each[0] if len(each) == 1 else torch.cat(list(each))

    def mask(further: int) -> Tensor:
        return joined([step[columns - end - further : 2 * columns - end - further] for step, columns, end in rows])

    if within is None or not within.by_length:
        return Live(party.varying(mask))
    by_length = within

    def divided(part: int) -> Tensor:
        def made(further: int) -> Tensor:
            found = [by_length.divided_row(end + further)[part] for _, _, end in rows]
            return found[0] if len(found) == 1 else torch.cat([each.expand(columns) for each, columns in zip(found, filled, strict=True)])

        return party.varying(made)

    return Live(party.varying(mask), divided(0), (divided(1), divided(2)))


def row_offsets(x: PrivinfTensor, heads: int, at: int, asked: int, bits: int) -> Protocol_[Shares]:
    """Columns of x (B, T, at + heads), from `at` on, for the queries that are asked: (B heads, asked), in the ring of the scores."""
    (batch, count, _), several = x.shares.shape, x.runtime.batch
    rows = slice(count - asked, count) if several is None or asked == count else several.lasts
    added = x.shares.map(lambda v: v[:, rows, at:].transpose(1, 2).reshape(batch * heads, asked))
    return (yield from rescale(x.party, added, bits=bits, frac=FRAC))
