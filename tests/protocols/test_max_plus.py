"""Max-plus products against their plaintext twins, which they equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from protocols import reference
from protocols.max_plus import max_plus, max_plus_attention, tropical, tropical_mixed, tropical_scores
from protocols.party import Party, Protocol_
from protocols.rows import Rows
from tests.support.two_party import execute, input_of


def drawn(*shape: int) -> torch.Tensor:
    """Integers with many equal ones among them, and as large as the domain allows."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator) * 21000


@pytest.mark.parametrize(("count", "inner", "outputs"), [(1, 1, 1), (3, 5, 2), (2, 70, 9)])
def test_a_layer(count: int, inner: int, outputs: int) -> None:
    x, weight = drawn(count, inner), drawn(inner, outputs)

    def program(party: Party) -> Any:
        def protocol() -> Protocol_[Any]:
            return (yield from max_plus(party, input_of(party, x, 19, 0), weight if party.is_server else None, outputs))

        return party.run(protocol())

    assert torch.equal(execute(program).value(), reference.max_plus(x, weight).double())


@pytest.mark.parametrize("rows", [Rows(1, 1, 1), Rows(1, 9, 1), Rows(10, 3, 1), Rows(40, 1, 1)], ids=str)
def test_attention(rows: Rows) -> None:
    q, k, v = drawn(2, rows.number, 3), drawn(2, rows.columns, 3), drawn(2, rows.columns, 3)

    def program(party: Party) -> Any:
        def protocol() -> Protocol_[Any]:
            return (yield from max_plus_attention(party, *(input_of(party, x, 20, 0) for x in (q, k, v)), rows))

        return party.run(protocol())

    assert torch.equal(execute(program).value(), reference.max_plus_attention(q, k, v, rows).double())


def test_products_in_float_and_their_gradients() -> None:
    """Values and gradients of what a network is trained with, against all sums at once."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 3), (2, 5, 3), (2, 5, 3), (3, 4)))
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scores = (q[:, :, None] + k[:, None]).amax(-1).masked_fill(future, -torch.inf)
        return ((scores[..., None] + v[:, None]).amax(-2)[..., None] + weight).amax(-2)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return tropical(tropical_mixed(tropical_scores(q, k), v), weight)

    inputs = [each.requires_grad_() for each in (q, k, v, weight)]
    found, wanted = ours(*inputs), plainly(*inputs)
    assert torch.equal(found, wanted)
    factors = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    of_ours, of_theirs = (torch.autograd.grad((y * factors).sum(), inputs) for y in (found, wanted))
    for mine, theirs in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(mine, theirs)
