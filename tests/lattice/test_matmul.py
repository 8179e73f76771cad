"""Products of matrices by ciphertexts, against products of Python's integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.errors import TransportError
from protocols.lattice.ciphertext import Keys
from protocols.lattice.hiding import largest, over
from protocols.lattice.lattice import Lattice
from protocols.lattice.matmul import matmul
from protocols.lattice.parameters import limit
from protocols.lattice.plan import Plan, choose, layout
from protocols.ot.transfers import Transfers
from protocols.ring import blank
from tests.lattice.two_ends import AMOUNTS, ROLES, Clear, Run, drawn, make_noise_largest, run, trace

S, C = ROLES


def exact(left: Tensor, right: Tensor, bits: int) -> Tensor:
    """Modulo 2^bits, through Python's integers."""
    found = np.matmul(left.numpy().astype(object), right.numpy().astype(object)) % (1 << bits)
    return torch.from_numpy(found.astype(np.uint64).view(np.int64))


def by_plan(plan: Plan, holder: Role, left: Tensor, right: Tensor, need: Tensor | None = None, tamper: Any = None) -> Run:
    """Both ends with these operands, whatever is cheaper."""

    def make(role: Role) -> Any:
        own = (blank(*left.shape), right) if role is holder else (left, blank(*right.shape))
        return matmul(Clear(role), role, holder, Keys(plan.budget), plan, *own, need)

    return run(make, tamper)


def value(outcome: Run, bits: int) -> Tensor:
    found = outcome.results[S] + outcome.results[C]
    return found if bits == 64 else found & ((1 << bits) - 1)


SIZES = [(1, 1, 1, 1, 8), (3, 4, 5, 6, 20), (2, 3, 130, 1, 33), (5, 1, 16, 9, 48), (1, 2, 3, 300, 40), (2, 3, 4, 5, 64), (150, 2, 3, 2, 12)]


@pytest.mark.parametrize("holder", ROLES)
@pytest.mark.parametrize("size", SIZES)
def test_products_are_exact(holder: Role, size: tuple[int, ...]) -> None:
    heads, n, d, m, bits = size
    plan = layout(heads, n, d, m, bits, n * m)
    assert plan is not None
    generator = np.random.default_rng(sum(size))
    wide = 3 if bits == 64 else 1
    left, right = drawn(generator, (heads, n, d), min(bits, 62)) * wide, drawn(generator, (heads, d, m), min(bits, 62)) * wide
    assert torch.equal(value(by_plan(plan, holder, left, right), bits), exact(left, right, bits))


@pytest.mark.parametrize("entry", [(0, 0), (-1, -1), (1 << 32, 1 << 32), ((1 << 32) - 1, 1 << 32), ((1 << 32) - 1, (1 << 32) - 1)])
def test_extreme_entries_are_exact(entry: tuple[int, int]) -> None:
    plan = layout(2, 4, 64, 8, 33, 32)
    assert plan is not None
    left, right = torch.full((2, 4, 64), entry[0]), torch.full((2, 64, 8), entry[1])
    assert torch.equal(value(by_plan(plan, C, left, right), 33), exact(left, right, 33))


def test_wanted_outputs_alone_travel() -> None:
    generator = np.random.default_rng(5)
    left, right = drawn(generator, (4, 16, 8), 33), drawn(generator, (4, 8, 16), 33)
    need = torch.tril(torch.ones(16, 16, dtype=torch.bool))
    plan = layout(4, 16, 8, 16, 33, int(need.sum()))
    assert plan is not None
    some, everything = by_plan(plan, S, left, right, need), by_plan(plan, S, left, right)
    assert torch.equal(value(some, 33)[:, need], exact(left, right, 33)[:, need])
    assert some.sent[C] < everything.sent[C]


def ends(transfers: type[Any] = Clear) -> dict[Role, Lattice]:
    return {role: Lattice(role, transfers(role)) for role in ROLES}


def test_a_prediction_is_what_is_counted_and_keys_travel_once() -> None:
    generator = np.random.default_rng(6)
    left, right = drawn(generator, (2, 3, 12, 16), 33), drawn(generator, (1, 3, 16, 12), 33)
    both = ends()

    def make(role: Role) -> Any:
        return both[role].matmul(S, *((blank(*left.shape), right) if role is S else (left, blank(*right.shape))), 33)

    counted = []
    for _ in range(2):
        sent, rounds, shape = trace(both[C].trace().matmul(S, blank(*left.shape), blank(*right.shape), 33))
        outcome = run(make)
        assert (outcome.sent, outcome.rounds) == (sent, rounds) and shape.shape == outcome.results[S].shape
        assert torch.equal(value(outcome, 33), exact(left, right, 33))
        counted.append(outcome.sent)
    assert counted[1][S] < counted[0][S] and counted[1][C] == counted[0][C]


def test_by_real_transfers() -> None:
    generator, both = np.random.default_rng(7), ends(Transfers)
    operands = [(drawn(generator, s, 30), drawn(generator, (s[0], s[2], s[1]), 30)) for s in ((2, 5, 8), (2, 40, 32))]

    def program(role: Role) -> Any:
        yield from both[role].transfers.start()
        found = []
        for left, right in operands:
            own = (left, blank(*right.shape)) if role is S else (blank(*left.shape), right)
            found.append((yield from both[role].matmul(C, *own, 30)))
        return found

    outcome = run(program)
    for k, (left, right) in enumerate(operands):
        total = (outcome.results[S][k] + outcome.results[C][k]) & ((1 << 30) - 1)
        assert torch.equal(total, exact(left, right, 30))
    assert choose(2, 5, 8, 5, 30, 25) is None and choose(2, 40, 32, 40, 30, 1600) is not None


def test_shares_are_not_the_value() -> None:
    """Each share alone is spread over the ring, whatever the product."""
    plan = layout(4, 32, 2, 32, 16, 1024)
    assert plan is not None
    outcome = by_plan(plan, C, torch.zeros((4, 32, 2), dtype=torch.int64), torch.zeros((4, 2, 32), dtype=torch.int64))
    for role in ROLES:
        counts = np.bincount(outcome.results[role].reshape(-1).numpy() >> 12, minlength=16)
        assert counts.min() > 150 and counts.max() < 370, "4096 shares in 16 classes, 256 each, seven deviations"


def test_plans_stay_within_the_standard_and_keep_a_margin() -> None:
    for heads, n, d, m in ((1, 1, 1, 1), (12, 128, 64, 128), (144, 128, 128, 64), (8, 1, 32, 200), (48, 1024, 64, 1024), (3, 7, 1000, 5)):
        for bits in (8, 24, 33, 41, 48):
            plan = layout(heads, n, d, m, bits, n * m)
            assert plan is not None
            ring = plan.budget
            assert math.log2(math.prod(ring.primes)) <= limit(ring.degree)
            assert ring.margin(plan.modulus) > 0 and ring.hiding.noise > ring.hiding.deviation
            least = over(plan.modulus, plan.steps * plan.roots, largest(plan.secrets * plan.width, plan.steps, plan.roots))
            assert ring.hiding.deviation >= least
            assert plan.modulus > d << (2 * bits) and all(p % (2 * plan.roots) == 1 for p in plan.plain)
            assert plan.groups * plan.roots >= heads * plan.parts and plan.parts * plan.steps >= d and plan.secrets * plan.width >= m


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_noise_is_survived_and_a_larger_one_is_not(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = layout(8, 4, 64, 16, 33, 64)
    assert plan is not None
    make_noise_largest(monkeypatch, plan.budget.hiding, sign)
    # the largest plaintexts, in no pattern that would cancel
    generator = np.random.default_rng(9)
    left, right = drawn(generator, (8, 4, 64), 1) + (1 << 32) - 1, drawn(generator, (8, 64, 16), 1) + (1 << 32) - 1
    assert torch.equal(value(by_plan(plan, C, left, right), 33), exact(left, right, 33))
    make_noise_largest(monkeypatch, plan.budget.hiding, sign, 4)
    assert not torch.equal(value(by_plan(plan, C, left, right), 33), exact(left, right, 33))


@pytest.mark.parametrize("round_", [1, 2])
def test_residues_out_of_range_are_refused(round_: int) -> None:
    plan = layout(2, 4, 8, 4, 33, 16)
    assert plan is not None

    def tamper(at: int, role: Role, values: list[Tensor]) -> None:
        if at == round_ and not values[1].is_meta:
            bits = plan.budget.primes[0].bit_length()
            values[1].reshape(-1)[3] = (1 << bits) - 1

    zeros = torch.zeros((2, 4, 8), dtype=torch.int64)
    with pytest.raises(TransportError, match="out of range"):
        by_plan(plan, C, zeros, zeros.transpose(1, 2), tamper=tamper)


def many(times: int) -> int:
    plan = layout(32, 128, 8, 256, 33, 128 * 256)
    assert plan is not None
    generator, count = np.random.default_rng(11), 0
    for k in range(times):
        left, right = drawn(generator, (32, 128, 8), 33), drawn(generator, (32, 8, 256), 33)
        found = value(by_plan(plan, ROLES[k % 2], left, right), 33)
        assert torch.equal(found, (left @ right) & ((1 << 33) - 1))
        count += found.numel()
    return count


@AMOUNTS
def test_so_many_outputs_without_a_wrong_one(times: int, least: int) -> None:
    assert many(times) >= least
