"""The bound of rows by thresholds: where it lies, and what a softmax of one row makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protocols import ceiling, kernels, reference
from protocols.ceiling import LOWEST, THRESHOLDS, combined, row_ceiling
from protocols.opening import open_masked
from protocols.party import Party, Protocol_
from protocols.ring import encode
from protocols.rows import Rows
from protocols.shares import Shares, Wire
from protocols.softmax import LARGEST, bounded_by_thresholds, exponentials, softmax
from tests.support.two_party import input_of, run


def bounds(x: Tensor, rows: Rows) -> Tensor:
    """Of integers x (H, N) with 12 fraction bits, in units of 1."""

    def program(party: Party) -> Protocol_[Wire]:
        (wire,) = yield from open_masked(party, [input_of(party, x, 21, 12)])
        return (yield from row_ceiling(party, wire, rows, 12))

    return run(program).element()


@pytest.mark.parametrize(
    "rows", [Rows(1, 1, 0), Rows(2, 3, 0), Rows(1, 9, 1), Rows(129, 1, 0), Rows(40, 3, 7)], ids=lambda rows: str(rows.fields())
)
def test_it_lies_within_a_unit_of_the_maximum(rows: Rows) -> None:
    for x in (
        torch.rand(4, rows.count) * 240 - 120,
        torch.randn(4, rows.count),
        torch.full((4, rows.count), -120.0),
        torch.full((4, rows.count), 126.99),
    ):
        found, largest = bounds(encode(x, 12), rows), reference.row_maximum(encode(x, 12), rows) / 4096
        assert (found - 1 <= largest).all() and (largest < found + 1).all()


def test_every_threshold_is_found() -> None:
    """Of scores in whole units, whose lower bits are 0, so that nothing is carried into a digit."""
    x = torch.arange(LOWEST, -LOWEST + 1).repeat(2, 1).T.contiguous()  # (THRESHOLDS, 2), whole units
    found = bounds(x << 12, Rows(2, 1, 0))[:, 0]
    assert len(x) == THRESHOLDS and torch.equal(found, x[:, 0])


def test_combinations_are_of_the_rows_bits() -> None:
    """Against sums modulo 2 of the coefficients, bit by bit, of words that are no shares."""
    rows = Rows(3, 2, 2)
    digits, public = torch.randint(0, 256, (2, rows.count)), torch.randint(0, 256, (2, rows.count))
    words = torch.zeros(2, rows.count, 4, dtype=torch.int64)
    words.scatter_(-1, (digits >> 6)[..., None], (torch.ones_like(digits) << (digits & 63))[..., None])
    with kernels.plain():
        found = combined(words, public, rows)
    table = ceiling._coefficients(rows.columns).flip(-1)  # the lowest threshold first
    for h in range(2):
        at = 0
        for row, length in enumerate(rows.lengths.tolist()):
            for k in range(THRESHOLDS):
                value = 0
                for j in range(length):
                    score = (int(public[h, at + j] - digits[h, at + j]) + 128) % 256 - 128
                    value ^= int(table[j, k]) if score >= LOWEST + k else 0
                assert int(found[h, row, THRESHOLDS - 1 - k]) == value
            at += length


@pytest.mark.parametrize("length", [9, 33, 129, 700])
def test_a_softmax_of_one_row_is_within_its_bound(length: int) -> None:
    rows = Rows(length, 1, 0)
    assert bounded_by_thresholds(rows) and not bounded_by_thresholds(Rows(length, 2, 0)) and not bounded_by_thresholds(Rows(8, 1, 0))
    sink = torch.full((8, length), -10.0) - torch.rand(8, length)
    sink[:, 0] = torch.rand(8) * 2
    for x in (torch.randn(8, length) * 2, torch.rand(8, length) * 200 - 100, torch.full((8, length), 3.2), sink):
        scores = encode(x, 12)

        def program(party: Party, x: Tensor = scores) -> Protocol_[Shares]:
            return (yield from softmax(party, input_of(party, x, 21, 12), rows, bits=30, frac=24))

        def weights(party: Party, x: Tensor = scores) -> Protocol_[Shares]:
            return (yield from exponentials(party, input_of(party, x, 21, 12), rows, 44))

        error = run(program).value() - reference.softmax(scores / 2.0**12, rows)
        assert error.abs().max() < 1.8e-4 + 2.8 * 6 * 1.3e-5 * length**0.5
        e = run(weights).value()
        assert e.min() > -4e-5 and e.max(-1).values.min() > 0.219 and e.max() < LARGEST


def test_a_threshold_that_is_missed_makes_a_rows_weights_larger_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coefficients that cancel, which happens once in 2^24: of two equal scores, the highest threshold is found by neither."""
    rows, x = Rows(9, 1, 0), torch.full((1, 9), -20.0)
    x[:, :2] = torch.tensor([5.5, 5.5])
    table = torch.randint(1, 1 << 24, (9, THRESHOLDS))
    table[1, 5 - LOWEST] = table[0, 5 - LOWEST]
    monkeypatch.setattr(ceiling, "_coefficients", lambda columns: table[:columns])

    def program(party: Party) -> Protocol_[Shares]:
        return (yield from softmax(party, input_of(party, encode(x, 12), 21, 12), rows, bits=30, frac=24))

    error = run(program).value() - reference.softmax(x.double(), rows)
    assert error.abs().max() < 1e-3


@pytest.mark.parametrize("length", [13, 38, 129])
def test_a_flat_row_is_right_where_its_threshold_is_missed(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores reach the threshold that is missed: every weight, and the sum, is e times too large."""
    rows, x = Rows(length, 1, 0), torch.full((16, length), 5.0) + torch.rand(16, 1)
    table = torch.randint(1, 1 << 24, (length, THRESHOLDS))
    table[0, 5 - LOWEST] = 0
    for j in range(1, length):
        table[0, 5 - LOWEST] ^= table[j, 5 - LOWEST]
    monkeypatch.setattr(ceiling, "_coefficients", lambda columns: table[:columns])

    def program(party: Party) -> Protocol_[Shares]:
        return (yield from softmax(party, input_of(party, encode(x, 12), 21, 12), rows, bits=30, frac=24))

    error = run(program).value() - reference.softmax(x.double(), rows)
    assert error.abs().max() < 2e-3
