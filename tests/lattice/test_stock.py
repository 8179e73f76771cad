"""Rows of linear maps made in stock, against integers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.errors import TransportError
from protocols.lattice import noise, stock
from protocols.lattice.ciphertext import transformed
from protocols.lattice.parameters import limit
from protocols.lattice.rings import field as field_of
from protocols.lattice.rings import times
from protocols.lattice.stock import Rows, make
from protocols.lattice.weights import LatticeKeys, polynomials
from protocols.ring import reduce
from tests.lattice.two_ends import AMOUNTS, ROLES, Run, drawn, make_noise_largest, run, trace

S, C = ROLES


def made(rows: Rows, weight: Tensor, **how: Any) -> Run:
    return run(lambda role: make(role, rows, weight if role is S else None), **how)


def wrong(rows: Rows, weight: Tensor, outcome: Run) -> int:
    """Outputs that are not what R and W say."""
    r, share = outcome.results[C]
    matrix = weight.T if rows.transposed else weight
    expected = -np.matmul(r.numpy().astype(object), matrix.numpy().astype(object)) % (1 << rows.bits)
    total = reduce(share + outcome.results[S][1], rows.bits)
    return int((total.numpy() != expected.astype(np.uint64).view(np.int64)).sum())


@pytest.mark.parametrize(
    "case", [(2, 5, 3, 10, False), (28, 24, 40, 33, True), (33, 300, 3, 9, False), (56, 24, 4, 8200, False), (64, 7, 5, 20, True)]
)
def test_rows_are_exact_and_what_is_sent_is_what_is_predicted(case: tuple[int, int, int, int, bool]) -> None:
    bits, inner, outer, count, transposed = case
    rows = Rows("w", inner, outer, bits, count, transposed)
    weight = drawn(np.random.default_rng(bits), (outer, inner) if transposed else (inner, outer), bits)
    outcome = made(rows, weight)
    assert outcome.results[C][0].shape == (count, inner) and outcome.results[S][1].shape == (count, outer)
    assert wrong(rows, weight, outcome) == 0
    for role in ROLES:
        sent, rounds, (r, share) = trace(make(role, rows, None, traced=True))
        assert (sent, rounds) == (outcome.sent, outcome.rounds) and (r.shape, share.shape) == ((count, inner), (count, outer))
    assert sum(outcome.sent.values()) == rows.size


def test_masks_are_fresh_and_uniform() -> None:
    rows, weight = Rows("w", 40, 2, 33, 4096), torch.zeros((40, 2), dtype=torch.int64)
    first, second = (made(rows, weight).results[C][0] for _ in range(2))
    assert not torch.equal(first, second)
    for bit in (0, 17, 32):
        ones = int(((first >> bit) & 1).sum())
        assert abs(ones - first.numel() / 2) < 4 * first.numel() ** 0.5, "eight standard deviations"
    assert int(first.max()) < 1 << 33 and int(first.min()) >= 0


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_noise_is_survived_and_a_larger_one_is_not(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows("w", 64, 4, 33, 16)
    weight = torch.full((64, 4), 1 << 32)
    for much in (1, 4):
        make_noise_largest(monkeypatch, rows.budget.hiding, sign, much)
        assert (wrong(rows, weight, made(rows, weight)) == 0) == (much == 1)


def test_errors_are_those_of_any_ciphertext(monkeypatch: pytest.MonkeyPatch) -> None:
    """What S holds decrypts to R with a centred rounding beside the binomial, which is left out here: less than 1, of mean 0."""
    monkeypatch.setattr(noise, "errors", lambda stream, count: np.zeros(count, np.int64))
    found: list[tuple[LatticeKeys, list[Any]]] = []
    own_keys, own_rows = stock.LatticeKeys, stock._Columns

    class Noted(own_rows):  # type: ignore[misc, valid-type]
        def __init__(self, *what: Any) -> None:
            super().__init__(*what)
            found[-1][1].append(self.held)

    monkeypatch.setattr(stock, "LatticeKeys", lambda: found.append((keys := own_keys(), [])) or keys)
    monkeypatch.setattr(stock, "_Columns", Noted)
    rows = Rows("w", 30, 1, 20, 256)
    r = made(rows, torch.zeros((30, 1), dtype=torch.int64)).results[C][0]
    ((keys, (held,)),) = found
    ring, big = rows.budget, math.prod(rows.budget.primes)
    secrets = transformed(keys.secrets(rows.form), ring)
    phases = []
    for a, s, b, p in zip(polynomials(keys.public_seed, 0, 30, ring), secrets, held, ring.primes, strict=True):
        phases.append((b + field_of(p, ring.degree).backward(times(a, s, p)).reshape(30, -1)[:, :256]) % p)
    errors = []
    for i, k in itertools.product(range(30), range(256)):
        phase = sum(int(x[i, k]) * (big // p) * pow(big // p, -1, p) for x, p in zip(phases, ring.primes, strict=True)) % big
        off = Fraction(phase) - Fraction(big * int(r[k, i]), 1 << 20)
        errors.append(float(off - big * round(off / big)))
    assert max(map(abs, errors)) < 1 and 0.05 < np.std(errors) <= 0.5
    assert abs(np.mean(errors)) < 6 * 0.5 / len(errors) ** 0.5


def test_what_is_no_ciphertext_is_refused() -> None:
    rows, weight = Rows("w", 4, 3, 33, 16), torch.zeros((4, 3), dtype=torch.int64)

    def spoil(number: int) -> Any:
        def tamper(round_: int, role: Role, got: list[Tensor]) -> None:
            if (round_, role) == (number, S):
                got[-1 if number == 1 else 0].fill_((1 << 62) - 1)

        return tamper

    with pytest.raises(TransportError, match="residues out of range"):
        made(rows, weight, tamper=spoil(1))
    with pytest.raises(TransportError, match="digits out of range"):
        made(rows, weight, tamper=spoil(2))


def test_a_row_of_a_large_stock_takes_a_fraction_of_a_row_by_itself() -> None:
    for bits, inner, outer in ((56, 768, 2304), (32, 768, 768)):
        rows = Rows("w", inner, outer, bits, 8192)
        ring = rows.budget
        assert np.log2(float(np.prod([float(p) for p in ring.primes]))) <= limit(ring.degree)
        alone = (sum(rows.form.limbs) * ring.degree + ring.low_bits * outer) / 8
        assert rows.size / rows.count < 0.6 * alone


def many(times: int) -> int:
    weight, count = drawn(np.random.default_rng(4), (8, 128), 30), 0
    rows = Rows("w", 8, 128, 30, 8192)
    for _ in range(times):
        r, share = (outcome := made(rows, weight)).results[C]
        total = reduce(share + outcome.results[S][1], 30)
        assert torch.equal(total, -(r @ weight) & ((1 << 30) - 1))
        count += total.numel()
    return count


@AMOUNTS
def test_so_many_outputs_without_a_wrong_one(times: int, least: int) -> None:
    assert many(times) >= least
