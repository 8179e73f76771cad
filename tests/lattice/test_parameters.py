"""Parameters of rings, against Microsoft SEAL, which keeps the HE standard's tables and refuses moduli beyond them."""

from __future__ import annotations

import math

import pytest

from protocols import security
from protocols.lattice.hiding import VARIANCE, Hiding
from protocols.lattice.parameters import budget, limit
from protocols.lattice.plan import layout

seal = pytest.importorskip("seal")


def test_moduli_are_a_little_narrower_than_seal_allows() -> None:
    level = seal.sec_level_type.tc128
    for degree, bits in security.HE_STANDARD.items():
        assert 0.96 * seal.CoeffModulus.MaxBitCount(degree, level) < bits < seal.CoeffModulus.MaxBitCount(degree, level)
    assert limit(512) == 0 and VARIANCE >= security.RLWE_DEVIATION**2


@pytest.mark.parametrize("size", [(144, 128, 64, 128, 33), (12, 128, 128, 64, 41), (2, 3, 4, 5, 8), (4, 4, 64, 4, 48)])
def test_seal_takes_a_plans_ring(size: tuple[int, int, int, int, int]) -> None:
    heads, n, d, m, bits = size
    plan = layout(heads, n, d, m, bits, n * m)
    assert plan is not None
    parameters = seal.EncryptionParameters(seal.scheme_type.ckks)
    parameters.set_poly_modulus_degree(plan.budget.degree)
    parameters.set_coeff_modulus([seal.Modulus(p) for p in plan.budget.primes])
    context = seal.SEALContext(parameters, True, seal.sec_level_type.tc128)
    assert context.parameters_set(), context.parameter_error_message()


def test_what_no_ring_of_a_degree_holds_has_none() -> None:
    noise = Hiding(2.0**68, 2.0**68)
    assert budget(4096, 1 << 40, noise) is None
    found = budget(8192, 1 << 40, noise)
    assert found is not None and math.log2(math.prod(found.primes)) <= 214
    assert found.margin(1 << 40) > 0 > found.margin(1 << 44)
