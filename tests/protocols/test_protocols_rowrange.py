"""Softmax without a maximum against its plaintext twin: within the range, at its ends, and beyond them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from protocols import reference
from protocols.exponential import exponential
from protocols.opening import open_masked
from protocols.party import Party, Protocol_
from protocols.product import Cached
from protocols.ring import encode
from protocols.rowrange import RowRange
from protocols.rows import Rows
from protocols.shares import Shares
from protocols.softmax import AttentionRings, attention, bounded_exponentials
from tests.support.two_party import input_of, run

RANGES = [
    RowRange(6, 10, 8, True),
    RowRange(2, 4, 4, True),
    RowRange(6, 12, 12, False),
    RowRange(0, 2, 2, True),
    RowRange(12, 14, 14, False),
    RowRange(16, 22, 13, True),
    RowRange(10, 16, 12, True, 2),
    RowRange(2, 4, 4, True, 1),
    RowRange(4, 8, 6, False, 1),
]
ROWS = [*(Rows(n, 6, 0) for n in (1, 2, 3, 17)), Rows(1, 40, 1), Rows(128, 8, 0), Rows(1018, 7, 1)]


def names(value: object) -> str:
    return str(value.fields()) if isinstance(value, Rows) else str(value)


def rings(within: RowRange, columns: int) -> AttentionRings:
    """Wide enough for values of v below 4."""
    bits = 16 + 12 + math.ceil(math.log2(within.largest(columns))) + 4
    return AttentionRings(v_bits=bits, within=within, out_bits=30)


def ends(within: RowRange) -> tuple[float, float]:
    return (within.top - within.depth) / 2, (within.top - within.depth + within.spread) / 2


def logarithms(x: Tensor, rows: Rows, within: RowRange) -> Tensor:
    """Of the rows' sums, or means, (H, number)."""
    total = torch.stack([torch.logsumexp(x[:, part].double(), -1) for part in reference._row_slices(rows)], -1)
    return total - torch.from_numpy(rows.lengths).double().log() if within.by_length else total


def scores_within(within: RowRange, heads: int, rows: Rows) -> Tensor:
    """Rows whose sums lie all over the range, (H, N) with 12 fraction bits: some flat, some with one that dominates."""
    low, high = ends(within)
    shape = (heads, rows.number)
    x = torch.randn(heads, rows.count) * torch.rand(heads, 1) * 2
    x[:, torch.from_numpy(rows.lengths).cumsum(0) - 1] += 4 * torch.rand(shape).round().float()
    aim = low + (high - low) * torch.rand(shape, dtype=torch.float64)
    aim[0, 0], aim[-1, -1] = low, high
    x = x.double() + rows.spread(aim - logarithms(x, rows, within))
    return encode(x.clamp(max=within.top / 2), 12)


def weights_of(x: Tensor, rows: Rows, within: RowRange) -> Tensor:
    """Attention whose weights are read off: each position's v is a unit vector, (H, number, columns)."""
    heads, columns = x.shape[0], rows.columns
    q = encode(rows.unpack(x.double() / 2.0**12), 12)  # (H, number, columns): with unit keys the scores are q
    unit = encode(torch.eye(columns).expand(heads, columns, columns), 12)
    ring = rings(within, columns)

    def program(party: Party) -> Protocol_[Shares]:
        inputs = [input_of(party, y, bits, 12) for y, bits in ((q, ring.qk_bits), (unit, ring.qk_bits), (unit, ring.v_bits))]
        a, b, c = yield from open_masked(party, inputs)
        return (yield from attention(party, a, Cached.join(None, b), Cached.join(None, c), rows, ring))

    return run(program).value()


@pytest.mark.parametrize("within", RANGES, ids=names)
@pytest.mark.parametrize("rows", ROWS, ids=names)
def test_exponentials_are_within_their_bound(rows: Rows, within: RowRange) -> None:
    x = scores_within(within, 3, rows)

    def program(party: Party) -> Protocol_[Shares]:
        return (yield from bounded_exponentials(party, input_of(party, x, 21, 12), rows, 56, within))

    offset, divisor = within.divided(rows)
    d = (x - offset).double() / 2.0**12
    if divisor is not None:
        d = d - divisor[0] * math.log(2) + (divisor[1] / 2.0**15).log()
    if within.by_length:
        lengths = torch.from_numpy(np.repeat(rows.lengths, rows.lengths)).double()
        assert (d - (x / 2.0**12 - within.high / 2 - lengths.log())).abs().max() < 1.3e-4
    error = (run(program).value() - within.scale * torch.exp(d)).abs()
    assert (error <= 1.2e-4 * within.scale * torch.exp(d) + 4e-5 + 2.0**-24 * within.scale).all()


@pytest.mark.parametrize("within", RANGES, ids=names)
@pytest.mark.parametrize("rows", ROWS[:-1], ids=names)
def test_softmax_within_its_range(rows: Rows, within: RowRange) -> None:
    x = scores_within(within, 3, rows)
    want = rows.unpack(reference.softmax(x / 2.0**12, rows))
    low, high = ends(within)
    total = logarithms(x / 2.0**12, rows, within)
    inside = (total >= low - 1e-3) & (total <= high + 1e-3)  # what is above the top was cut off
    assert inside.any()
    bound = reference.attention_bound(rows, 1.0)
    assert ((weights_of(x, rows, within) - want).abs() <= bound)[inside].all()


@pytest.mark.parametrize("within", RANGES[-4:], ids=names)
def test_scores_that_wrap_leave_weights(within: RowRange) -> None:
    """Beyond the widest score a row looks elsewhere, and is no garbage: the widest of one row count as if they were far below."""
    rows, period = Rows(6, 4, 0), 2.0 ** (within.score_bits - 12)
    x = torch.randn(1, 4, 6).double()
    x[0, 0, 2] = period / 2 + 3
    x[0, 1, 4] = -period / 2 - 3
    x[0, 2, :3] = period * 0.7
    weights = weights_of(encode(x.reshape(1, -1), 12), rows, within)
    assert float(weights.min()) > -2e-3 and float(weights.sum(-1).max()) < 1.35
    assert float(weights[0, 0, 2].abs()) < 2e-3 and float(weights[0, 3].sum()) > 0.9


@pytest.mark.parametrize("within", [*RANGES[:3], *RANGES[-3:]], ids=names)
def test_rows_out_of_range_are_softened(within: RowRange) -> None:
    """Whatever the scores, the weights are weights: none is negative, and they come to 1, or to less where all are far below."""
    rows, widest = Rows(9, 8, 0), within.widest_score - 0.1
    x = torch.randn(1, 8, 9).double()
    x[0, 0, :] += 20  # all above
    x[0, 1, :] = widest
    x[0, 2, :] = -widest
    x[0, 3, :] -= 12
    x[0, 4, :] = torch.linspace(-100, 100, 9) / 120 * widest
    x[0, 5, :] -= 8
    x[0, 5, 3] += 35  # one above, and nothing else near the top
    x[0, 6, :4] = 29
    x[0, 7, :] = torch.tensor([60.0, 50, -60, -50, 40, 30, 20, 10, 0]).clamp(-widest, widest)
    weights = weights_of(encode(rows.pack(x), 12), rows, within)[0]
    assert weights.min() > -0.04 and weights.max() < 1.3  # a sum's last bit, 2^-12, times the largest reciprocal, 80
    sums = weights.sum(-1)
    assert ((sums - 1).abs()[[0, 1, 4, 5, 6, 7]] < 0.3).all() and (sums < 1.3).all() and sums[2].abs() < 0.3
    assert weights[5, 3] > 0.9  # above the top counts as the top at least
    assert weights[6, :4].min() > 0.9 / 4 / within.topmost and weights[6, 4:].max() < 0.35
    assert weights[7, [2, 3]].max() < 4e-3


@pytest.mark.parametrize(("top", "digit"), [(0, 4), (3, 4), (4, 4), (12, 4), (0, 2), (5, 2), (12, 2), (0, 1), (2, 1)])
def test_the_tables_saturate_and_do_not_wrap(top: int, digit: int) -> None:
    within = RowRange(2 * top, 8, 8, False, digit)
    assert within.has_tables(1)
    d = encode(torch.linspace(-within.widest_score - top, within.widest_score - 0.01 - top, 4001), 12)[None] / 2.0**12
    rows = Rows(d.shape[1], 1, 0)

    def program(party: Party) -> Protocol_[Shares]:
        (x,) = yield from open_masked(party, [input_of(party, encode(d, 12), 21, 12)])
        return (yield from exponential(party, x, None, rows, 0, window=within.window))

    e = run(program).value() / within.scale
    assert (e[d > 0] >= 1 - 1e-3).all() and (e <= within.topmost * (1 + 1e-3)).all()
    exact = d <= 0
    assert ((e - torch.exp(d)).abs()[exact] <= reference.exponential_bound(d)[exact]).all()


def test_a_ring_that_is_wide_at_once_saves_a_round_and_changes_nothing_else() -> None:
    within, rows = RANGES[0], Rows(12, 1, 0)
    x = scores_within(within, 3, rows)

    def program(party: Party, at_once: bool) -> Protocol_[Shares]:
        return (yield from bounded_exponentials(party, input_of(party, x, 21, 12), rows, 44, within, at_once=at_once))

    narrow, wide = (run(lambda party, once=once: program(party, once)) for once in (False, True))
    assert ((narrow.value() - wide.value()).abs() <= 2.2e-4 * wide.value() + 2.0**-14).all()
    assert (narrow.counted["online"]["rounds"], wide.counted["online"]["rounds"]) == (3, 2)
