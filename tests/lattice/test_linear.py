"""Products with an encrypted weight and rows of an encrypted table, against integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.errors import ConfigError, CorrelationError, TransportError
from protocols.lattice import kernels
from protocols.lattice.hiding import largest, over
from protocols.lattice.lattice import Lattice
from protocols.lattice.parameters import limit
from protocols.lattice.weights import LIMB, EncryptedWeight, Form, LatticeKeys, WeightKeys, encrypt_weight, forms
from protocols.linear import LinearMask, Weight
from protocols.ring import blank, pack, packed_size, reduce, unpack
from tests.lattice.two_ends import AMOUNTS, ROLES, Clear, Run, drawn, make_noise_largest, run, trace

S, C = ROLES
KEYS = LatticeKeys()


def sealed(form: Form, matrix: Tensor) -> EncryptedWeight:
    return EncryptedWeight.read(form, encrypt_weight(KEYS, form, matrix))


def product(held: EncryptedWeight, r: Tensor) -> Run:
    form = held.form

    def make(role: Role) -> Any:
        own = (WeightKeys(KEYS, form.name), blank(*r.shape)) if role is S else (held, r)
        return Lattice(role, Clear(role)).linear(*own, form.outer, form.bits, transposed=form.transposed)

    return run(make)


def rows(held: EncryptedWeight, ids: Tensor) -> Run:
    form = held.form

    def make(role: Role) -> Any:
        own = (WeightKeys(KEYS, form.name), blank(*ids.shape)) if role is S else (held, ids)
        return Lattice(role, Clear(role)).lookup(*own, form.outer, form.bits, form.inner)

    return run(make)


def total(outcome: Run, bits: int) -> Tensor:
    return reduce(outcome.results[S] + outcome.results[C], bits)


def negative(r: Tensor, matrix: Tensor, bits: int) -> Tensor:
    found = -np.matmul(r.numpy().astype(object), matrix.numpy().astype(object)) % (1 << bits)
    return torch.from_numpy(found.astype(np.uint64).view(np.int64))


CASES = [
    (2, 24, 40, False),
    (28, 24, 40, True),
    (33, 1, 1, False),
    (56, 24, 40, True),
    (59, 24, 40, False),
    (64, 24, 40, True),
    (33, 300, 3, False),
    (56, 5, 8200, False),
]


@pytest.mark.parametrize("case", CASES)
def test_products_are_exact(case: tuple[int, int, int, bool]) -> None:
    bits, *shape, transposed = case
    generator = np.random.default_rng(bits)
    weight = Weight("w", tuple(shape), bits, 10)
    matrix = drawn(generator, weight.shape, bits)
    held = sealed(Form.of(weight, transposed), matrix)
    r = drawn(generator, (2, 2, held.form.inner), bits)
    assert torch.equal(total(product(held, r), bits), negative(r, matrix.T if transposed else matrix, bits))


@pytest.mark.parametrize(
    "entry", [(0, 0), (1, 1 << 55), (1 << 55, 1 << 55), ((1 << 55) - 1, (1 << 56) - 1), ((1 << 56) - 1, (1 << 55) + 1)]
)
@pytest.mark.parametrize("bits", [56, 64])
def test_extreme_entries_are_exact(entry: tuple[int, int], bits: int) -> None:
    weight, scalar = (each << (bits - 56) if each > 1 else each for each in entry)
    matrix, r = (torch.full(shape, each - (each >> 63 << 64)) for shape, each in (((96, 8), weight), ((3, 96), scalar)))
    held = sealed(Form("w", 96, 8, bits), matrix)
    assert torch.equal(total(product(held, r), bits), negative(r, matrix, bits))


@pytest.mark.parametrize("bits", [12, 28])
def test_rows_of_a_table_are_exact(bits: int) -> None:
    generator = np.random.default_rng(bits)
    table = drawn(generator, (70, 33), bits)
    held = sealed(Form("t", 70, 33, bits, False, True), table)
    ids = torch.tensor([0, 69, 5, 5, 31])
    outcome = rows(held, ids)
    assert torch.equal(total(outcome, bits), table[ids])
    assert outcome.sent[S] == 0 and not torch.equal(outcome.results[S][2], outcome.results[S][3]), "the same row is another share"


def test_a_prediction_is_what_is_counted() -> None:
    form, table = Form("w", 12, 20, 40), Form("t", 9, 20, 28, False, True)
    held = sealed(form, torch.ones((12, 20), dtype=torch.int64)), sealed(table, torch.ones((9, 20), dtype=torch.int64))
    for role in ROLES:
        lattice = Lattice(role, Clear(role), True)
        counted = product(held[0], torch.zeros((7, 12), dtype=torch.int64))
        sent, rounds, shape = trace(lattice.linear(None, blank(7, 12), 20, 40))
        assert (sent, rounds) == (counted.sent, counted.rounds) == (sent, 1) and shape.shape == (7, 20)
        counted = rows(held[1], torch.zeros(3, dtype=torch.int64))
        sent, rounds, shape = trace(lattice.lookup(None, blank(3), 20, 28, 9))
        assert (sent, rounds) == (counted.sent, counted.rounds) and shape.shape == (3, 20)


def test_encryption_is_the_same_each_time_and_keys_are_kept() -> None:
    form, matrix = Form("w", 130, 40, 36), drawn(np.random.default_rng(1), (130, 40), 36)
    parts = list(encrypt_weight(KEYS, form, matrix))
    again = list(encrypt_weight(LatticeKeys.from_bytes(KEYS.to_bytes()), form, matrix))
    assert parts == again and [len(part) for part in parts] == list(form.part_sizes()) and len(parts) > 1
    assert sum(map(len, parts)) == form.size
    assert parts[0] != next(encrypt_weight(LatticeKeys(), form, matrix))
    assert max(map(len, parts[1:])) <= 1 << 22
    with pytest.raises(ConfigError, match="another size"):
        LatticeKeys.from_bytes(b"short")


@pytest.mark.parametrize("bits", [1, 7, 8, 12, 16, 21, 24, 31])
def test_residues_are_unpacked_from_any_place(bits: int) -> None:
    values = drawn(np.random.default_rng(bits), (5003,), bits)
    data = pack(values, bits)
    for first in (0, 1, 8, 2049):
        for size in (0, 1, 9, 2048, 5003 - first):
            found = np.empty(size, np.int32)
            kernels.unpack(data, 5003, bits, first, found)
            assert np.array_equal(found, values.numpy()[first : first + size])


def test_rows_are_read_where_they_are_kept() -> None:
    """Across the parts that they travelled in; nothing of them stays in memory."""
    form, generator = Form("w", 300, 21, 36), np.random.default_rng(5)
    assert 1 < form.rows_of_part < 150
    parts = list(encrypt_weight(KEYS, form, drawn(generator, (300, 21), 36)))
    data, asked = memoryview(b"".join(parts)), list[int]()

    class Disk:
        def read(self, at: int, size: int) -> memoryview:
            asked.append(size)
            return data[at : at + size]

    held = EncryptedWeight.read(form, parts, Disk())
    assert not asked and held.stored is not data
    for prime, p in enumerate(form.budget.primes):
        found, size = [], form.rows_of_part
        for number, part in enumerate(parts[1:]):
            count = min(size, 300 - number * size) * 21
            at = sum(packed_size(count, q.bit_length()) for q in form.budget.primes[:prime])
            found.append(unpack(memoryview(part)[at : at + packed_size(count, p.bit_length())], (count,), p.bit_length()))
        whole = torch.cat(found).reshape(300, 21).numpy()
        for rows_ in (slice(0, 300), slice(size - 1, 2 * size + 1), slice(299, 300)):
            assert np.array_equal(held.rows(prime, rows_), whole[rows_])
        asked.clear()
        ids = np.array([299, 0, 5, 5])
        assert np.array_equal(held.chosen(ids)[prime], whole[ids])
        assert len(asked) == len(ids) * len(form.budget.primes), "a row's reading hangs on no other's"


def test_parts_that_are_not_what_the_form_says_are_refused() -> None:
    form, matrix = Form("w", 4, 40, 36), torch.zeros((4, 40), dtype=torch.int64)
    parts = list(encrypt_weight(KEYS, form, matrix))
    for wrong, text in (
        (parts[:1], "0 bytes in place of"),
        ([*parts, b""], "too many"),
        ([parts[0], parts[1][:-1]], "bytes in place of"),
        ([parts[0], b"\xff" * len(parts[1])], "out of range"),
        ([parts[0][:16] + b"\xff" * (len(parts[0]) - 16), parts[1]], "out of range"),
    ):
        with pytest.raises(TransportError, match=text):
            EncryptedWeight.read(form, wrong)


def test_another_form_than_is_kept_is_refused() -> None:
    held = sealed(Form("w", 4, 40, 36), torch.zeros((4, 40), dtype=torch.int64))
    with pytest.raises(CorrelationError, match="another form"):
        next(Lattice(C, Clear(C)).linear({held.form: held}, torch.zeros((1, 4), dtype=torch.int64), 40, 35))


def test_forms_of_kinds_are_each_told_once() -> None:
    kinds = [
        LinearMask("a", (3, 8), 5, 40),
        LinearMask("a", (9, 8), 5, 40),
        LinearMask("a", (9, 5), 8, 36, 0, 1),
        LinearMask("scale", (9, 5), 5, 36, 1),
    ]
    assert forms(kinds) == [Form("a", 8, 5, 40), Form("a", 5, 8, 36, True)]


def test_rings_stay_within_the_standard_and_keep_a_margin() -> None:
    for bits in (4, 28, 40, 56, 59, 64):
        for inner in (1, 768, 50257):
            for chosen in (False, True):
                form = Form("w", inner, 10, bits, False, chosen)
                ring = form.budget
                assert math.log2(math.prod(ring.primes)) <= limit(ring.degree) and max(ring.primes) < 1 << 23
                assert ring.margin(1 << bits) > 0 and ring.hiding.noise >= ring.hiding.deviation
                assert ring.hiding.deviation >= (2.0**54 if chosen else over(1 << bits, inner, largest(10, inner)))
                assert form.spare >= 8 and max(form.limbs) <= LIMB and form.limbs[-1] >= form.spare


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_noise_is_survived_and_a_larger_one_is_not(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form("w", 64, 16, 33)
    make_noise_largest(monkeypatch, form.budget.hiding, sign)
    generator = np.random.default_rng(9)
    matrix = drawn(generator, (64, 16), 33)
    held = sealed(form, matrix)
    r = torch.full((4, 64), 1 << 32)
    assert torch.equal(total(product(held, r), 33), negative(r, matrix, 33))
    make_noise_largest(monkeypatch, form.budget.hiding, sign, 4)
    assert not torch.equal(total(product(held, r), 33), negative(r, matrix, 33))


def many(rounds: int) -> int:
    generator, count = np.random.default_rng(4), 0
    matrix = drawn(generator, (8, 8192), 30)
    held = sealed(Form("w", 8, 8192, 30), matrix)
    for _ in range(rounds):
        r = drawn(generator, (128, 8), 30)
        found = total(product(held, r), 30)
        assert torch.equal(found, -(r @ matrix) & ((1 << 30) - 1))
        count += found.numel()
    return count


@AMOUNTS
def test_so_many_outputs_without_a_wrong_one(times: int, least: int) -> None:
    assert many(times) >= least
