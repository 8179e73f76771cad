"""That answers hide what was multiplied: by brute force at small sizes, and bounds on errors against errors that were drawn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from protocols import security
from protocols.lattice import gauss, noise
from protocols.lattice.ciphertext import fine_bits, hide
from protocols.lattice.hiding import hints, largest, multiples, norm, over, row, smoothing
from protocols.lattice.linear import combined
from protocols.lattice.matmul import _plaintexts
from protocols.lattice.parameters import Budget, weight_budget
from protocols.lattice.plan import layout
from protocols.lattice.rings import Base, reduced, times
from protocols.lattice.rings import field as field_of
from protocols.lattice.weights import EncryptedWeight, Form, LatticeKeys, encrypt_weight, polynomials


def drawn(*shape: int) -> Any:
    """Errors with the rounding that varies most."""
    count, coins = math.prod(shape), np.random.default_rng(1)
    return (noise.errors(noise.fresh(), count) + coins.integers(0, 2, count) - 0.5).reshape(shape)


def seen(errors: Any, r: tuple[int, ...], t: int, multiplier: float, added: float) -> Any:
    """P(E x + y = v) for x of the Gaussian on r + t Z^n and y of that on Z^m, on a grid of v, (.., ..)."""
    outputs = len(errors)
    most = math.ceil(9 * multiplier / t)
    reach = math.ceil(9 * (added + np.abs(errors).sum(1).max() * multiplier))
    grid = np.arange(-reach, reach + 1)
    total = np.zeros((grid.size,) * outputs)
    one = [np.array([each + t * k for k in range(-most, most + 1)]) for each in r]
    for x in itertools.product(*one):
        weight = math.exp(-sum(c * c for c in x) / (2 * multiplier**2))
        at = errors @ np.array(x)
        axes = [np.exp(-((grid - c) ** 2) / (2 * added**2)) for c in at]
        total += weight * (axes[0] if outputs == 1 else np.multiply.outer(*axes))
    return total / total.sum()


CASES = [(5, [[2]]), (3, [[3, -1]]), (4, [[1], [-2]]), (2, [[1, 1], [1, -1]])]


@pytest.mark.parametrize(("t", "errors"), CASES)
def test_what_is_seen_hangs_on_no_multiplier(t: int, errors: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """For all multipliers, at eps = 2^-20: every pair is within 2 eps; with three fifths of the deviations it is far from that."""
    monkeypatch.setattr(security, "SMOOTH", 20)
    monkeypatch.setattr(security, "COSET", 1.5)
    matrix = np.array(errors)
    inner, added = matrix.shape[1], over(t, matrix.shape[1], float(np.linalg.norm(matrix, 2)))
    distances = []
    for part in (1.0, 0.6):
        views = [seen(matrix, r, t, 1.5 * t * part, added * part) for r in itertools.product(range(t), repeat=inner)]
        distances.append(max(np.abs(a - b).sum() / 2 for a, b in itertools.combinations(views, 2)))
    assert distances[0] < 2.0**-19 < 2.0**-10 < distances[1]


@pytest.mark.parametrize("dimension", [1, 768, 50257])
def test_a_shifted_lattice_weighs_the_same_from_the_smoothing_deviation_on(dimension: int) -> None:
    """By Poisson's sum over the dual: (1 + 2 sum_k e^(-2 pi^2 k^2 s^2))^n is at most 1 + 2^-SMOOTH."""
    s = smoothing(dimension)
    terms = 2 * dimension * (math.exp(-2 * (math.pi * s) ** 2) + math.exp(-8 * (math.pi * s) ** 2))
    assert 2.0 ** -(security.SMOOTH + 1) < terms < 2.0**-security.SMOOTH * (1 + 1e-9)


@pytest.mark.parametrize(("outputs", "inner", "roots"), [(700, 300, 1), (2000, 30, 1), (1, 40, 1), (16, 20, 64), (64, 1, 16)])
def test_singular_values_of_drawn_errors_are_below_their_bound(outputs: int, inner: int, roots: int) -> None:
    errors, bound = drawn(outputs, inner, roots), largest(outputs, inner, roots)
    # Y^roots + 1: transforms at its roots, which are the odd powers of a root of unity of twice the order
    values = np.fft.fft(errors * np.exp(1j * np.pi * np.arange(roots) / roots), axis=2)
    found = max(np.linalg.norm(values[..., k], 2) for k in range(roots))
    assert found < bound < 10 * found and (bound < 1.8 * found or min(outputs, inner) < 100)
    rows = np.linalg.norm(errors.reshape(outputs, -1), axis=1)
    assert rows.max() < norm(inner * roots, outputs) and (inner * roots < 300 or norm(inner * roots, outputs) < 2 * rows.max())


def test_errors_of_an_encrypted_weight_are_below_the_bounds() -> None:
    keys, form = LatticeKeys(), Form("w", 60, 70, 20)
    held, ring = EncryptedWeight.read(form, encrypt_weight(keys, form, torch.zeros((60, 70), dtype=torch.int64))), form.budget
    p, secret = ring.primes[0], keys.secrets(form)
    transform = field_of(p, ring.degree)
    hidden = transform.backward(times(polynomials(held.seed, 0, 60, ring)[0], transform.forward(reduced(secret, p)), p))[:, 0, :70]
    errors = reduced(held.rows(0, slice(0, 60)) + hidden, p)
    errors = np.where(errors > p // 2, errors - p, errors)
    assert 3 < errors.std() < 3.5 and np.linalg.norm(errors, 2) < largest(70, 60)
    assert ring.hiding.deviation > over(1 << 20, 60, float(np.linalg.norm(errors, 2)))


@pytest.mark.parametrize(("degree", "secrets"), [(1024, 1), (4096, 13), (8192, 2)])
def test_hints_leave_what_encrypts_zeros_as_wide_as_rlwe_needs(degree: int, secrets: int) -> None:
    """The condition with errors and secrets that were drawn, at every place."""
    turned = np.exp(1j * np.pi * np.arange(degree) / degree)
    bound = np.zeros(degree)
    for _ in range(secrets):
        for x in (noise.errors(noise.fresh(), degree), noise.secret(noise.fresh(), degree)):
            bound += np.abs(np.fft.fft(x * turned)) ** 2
    added = hints(degree, secrets)
    assert 2 * (1 / security.HINT**2 + bound.max() / added**2) < 1 / security.RLWE_DEVIATION**2
    assert math.sqrt(2) * smoothing(2 * degree) < security.RLWE_DEVIATION
    assert multiples(2, 5, 5, degree, secrets).deviation > added and row(5, degree, secrets).deviation > added


def test_rows_that_are_taken_are_hidden_by_a_flood_for_their_number() -> None:
    errors, found = drawn(1, 1024), row(1024, 4096, 1)
    moved = float(np.linalg.norm(errors)) * math.sqrt(security.TAKEN) / found.deviation
    assert 0.4 * moved < 2.0**-security.SIGMA < 0.4 * 4 * moved


def ring_of(bits: int) -> Budget:
    found = weight_budget(bits, 40, 50)
    assert found is not None
    return found


@pytest.mark.parametrize("bits", [6, 20, 40, 64])
def test_what_is_added_has_its_deviation_and_low_bits_are_exact(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """c0 that is near a bound, where a float does not tell, is rounded as Python's integers are."""
    ring = ring_of(bits)
    big, generator = math.prod(ring.primes), np.random.default_rng(bits)
    fine = fine_bits(ring.hiding.deviation)
    assert fine == {6: 80, 20: 40, 40: 40, 64: 0}[bits] and ring.hiding.deviation * 2.0**fine >= 2.0**64
    added = [0, 1, (1 << fine) - 1, 1 << fine >> 1, *(x << fine >> 40 for x in generator.integers(0, 1 << 40, 60).tolist())]
    bounds = [big * k // (1 << (bits + ring.low_bits)) + near for k in range(16) for near in (-1, 0, 1, 2)]

    def given(stream: Any, count: int, deviation: float) -> Any:
        value = gauss.offset_of(deviation)
        return np.stack([np.array([(value + x) >> 40 * i & ((1 << 40) - 1) for x in added]) for i in range(gauss.limbs_of(deviation))])

    monkeypatch.setattr(gauss, "wide", given)
    second = [np.array([x % p for x in bounds]) for p in ring.primes]
    (whole,), low = hide(second, ring, Base((), bits), noise.fresh())
    for i, (x, y) in enumerate(zip(bounds, added, strict=True)):
        value, one = (x % big << fine) + y << bits + ring.low_bits, big << fine
        exact = value // one % (1 << bits + ring.low_bits)
        assert (int(whole[i]) % (1 << bits), int(low[i])) == (exact >> ring.low_bits, exact % (1 << ring.low_bits))


@pytest.mark.parametrize("bits", [6, 40])
def test_real_answers_are_moved_by_the_whole_deviation(bits: int) -> None:
    ring, count = ring_of(bits), 4000
    big = math.prod(ring.primes)
    middle = big // (2 << (bits + ring.low_bits))  # of the lowest class of low bits
    unit = (big >> (bits + ring.low_bits)) / ring.hiding.deviation
    second = [np.full(count, middle % p) for p in ring.primes]
    _, low = hide(second, ring, Base((), bits), noise.fresh())
    inside = math.erf(unit / 2 / math.sqrt(2))
    assert abs(np.count_nonzero(low == 0) / count - inside) < 6 * math.sqrt(inside * (1 - inside) / count) + 0.002


def test_what_multiplies_an_encrypted_weight_is_drawn_anew_on_the_scalars_coset() -> None:
    """Seen with the secret key, and with errors of which the client knows nothing, before anything is added."""
    bits, inner, outer = 20, 12, 40
    keys, form = LatticeKeys(), Form("w", inner, outer, bits)
    held, ring = EncryptedWeight.read(form, encrypt_weight(keys, form, torch.zeros((inner, outer), dtype=torch.int64))), form.budget
    scalars = np.tile(np.random.default_rng(3).integers(-(1 << bits - 1), 1 << bits - 1, inner), (300, 1))

    def phases(first: list[Any], second: list[Any]) -> Any:
        base, rows = Base(ring.primes), []
        for a, b, p in zip(first, second, ring.primes, strict=True):
            transform = field_of(p, ring.degree)
            hidden = transform.backward(times(a.astype(np.int64), transform.forward(reduced(keys.secrets(form), p)), p))
            rows.append(reduced(b + hidden[:, 0, :outer], p))
        big, digits = base.modulus, base.digits(np.stack(rows))
        whole = sum(d.astype(object) * w for d, w in zip(digits, base.weights[:-1], strict=True))
        return np.where(whole > big // 2, whole - big, whole).astype(np.float64)

    every = slice(0, inner)
    errors = phases(polynomials(held.seed, 0, inner, ring), [held.rows(i, every).astype(np.int64) for i in range(len(ring.primes))])
    assert np.abs(errors).max() <= 21
    found = phases(*combined(held, scalars, noise.fresh(), slice(0, 300)))
    x, *_ = np.linalg.lstsq(errors.T, found.T)  # (inner, 300)
    x = np.rint(x).astype(np.int64).T
    assert np.array_equal(x @ errors.astype(np.int64), found.astype(np.int64))
    assert not ((x - scalars) % (1 << bits)).any(), "the same modulo t"
    deviation = (x / (1 << bits)).std()
    assert abs(deviation - security.COSET) < 6 * security.COSET / math.sqrt(2 * x.size) and len(np.unique(x[:, 0])) > 12


def test_what_multiplies_a_products_ciphertexts_is_drawn_anew_on_the_coset_of_each_coefficient() -> None:
    plan = layout(6, 40, 16, 24, 20, 960)
    assert plan is not None
    base, ring = Base(plan.plain), plan.budget
    left = np.random.default_rng(4).integers(-(1 << 19), 1 << 19, (plan.roots, plan.steps, 40))
    found = []
    for p, values in zip(ring.primes, _plaintexts(plan, base, left, noise.fresh()), strict=True):
        # (roots, n, steps) to (n, steps, roots)
        found.append(field_of(p, ring.degree).backward(np.ascontiguousarray(values.transpose(1, 2, 0)), 1, plan.roots))
    whole = Base(ring.primes)
    digits = whole.digits(np.stack(found))
    x = sum(d.astype(object) * w for d, w in zip(digits, whole.weights[:-1], strict=True))
    x = np.where(x > whole.modulus // 2, x - whole.modulus, x)
    deviation = (x / plan.modulus).astype(np.float64).std()
    assert abs(deviation - security.COSET) < 6 * security.COSET / math.sqrt(2 * x.size)
    for p in plan.plain:
        values = field_of(p, plan.roots).forward((x % p).astype(np.int64))
        assert np.array_equal(values, (left % p).transpose(2, 1, 0))
