"""The dual form of an inner linear model's mini-batches against its updates position by position, for what it declares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protocols import reference
from protocols.inner import OUT, WEIGHT_FRAC, Inner, Learnt, cost_inner_linear, inner_linear
from protocols.party import Party, Protocol_
from protocols.shares import Shares
from tests.support.two_party import Outcome, element, execute, input_of

H, P = 2, 5
BITS = 40


def drawn(count: int) -> list[Tensor]:
    """q, k, v (H, T, P), and the first weight (H, P, P)."""
    generator = torch.Generator().manual_seed(count)
    values = [torch.randn(H, count, P, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [values[0], 0.3 * values[1], values[2], torch.randn(H, P, P, generator=generator, dtype=torch.float64)]


def passes(values: list[Tensor], ends: tuple[int, ...], batch: int) -> Outcome:
    """Passes that end at these positions; each party's outputs and the last weight."""

    def program(party: Party) -> tuple[list[Shares], Shares]:
        def all_() -> Protocol_[tuple[list[Shares], Shares]]:
            first = Learnt(input_of(party, values[3], BITS, WEIGHT_FRAC))
            last, found, at = first, [], 0
            for end in ends:
                q, k, v = (input_of(party, value[:, at:end], 60, 15) for value in values[:3])
                z, first, last = yield from inner_linear(party, q, k, v, first, last, at, Inner(BITS, batch))
                found.append(z)
                at = end
            return found, last.shares

        return party.run(all_())

    return execute(program)


@pytest.mark.parametrize(
    ("ends", "batch"), [((1, 2, 3, 4, 5), 3), ((8, 11), 4), ((7,), 16), ((3, 5), 1)], ids=["tokens", "pieces", "one", "online"]
)
def test_it_is_gradient_descent(ends: tuple[int, ...], batch: int) -> None:
    values = drawn(ends[-1])
    outcome = passes(values, ends, batch)
    z, weight = reference.inner_linear(*values, batch)
    found = torch.cat([element(*both).double() / 2.0**OUT for both in zip(outcome.server[0], outcome.client[0], strict=True)], 1)
    assert float((found - z).abs().max()) < 4e-3
    assert float((element(outcome.server[1], outcome.client[1]).double() / 2.0**WEIGHT_FRAC - weight).abs().max()) < 2e-3
    starts, declared = (0, *ends[:-1]), cost_inner_linear(H, 0, P, 0, Inner(BITS, batch))
    for start, end in zip(starts, ends, strict=True):
        declared = declared + cost_inner_linear(H, end - start, P, start, Inner(BITS, batch))
    counted = outcome.counted["online"]
    assert (declared.online, declared.rounds, declared.dealer) == (counted["payload"], counted["rounds"], len(outcome.dealt))
    assert (outcome.predicted.online_bytes, outcome.predicted.rounds) == (counted["payload"], counted["rounds"])
