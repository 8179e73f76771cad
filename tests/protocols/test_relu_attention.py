"""Attention by ReLU against its plaintext twin, within the bound that stands there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from protocols import reference
from protocols.opening import open_masked
from protocols.party import Party, Protocol_
from protocols.product import Cached
from protocols.relu_attention import ReluRings, relu_attention
from protocols.rows import Rows
from tests.support.two_party import execute, input_of


@pytest.mark.parametrize("rows", [Rows(1, 1, 1), Rows(1, 33, 1), Rows(10, 3, 1), Rows(900, 1, 1)], ids=str)
@pytest.mark.parametrize("mean_bits", [43, 57])
def test_attention_by_relu(rows: Rows, mean_bits: int) -> None:
    generator = torch.Generator().manual_seed(rows.columns)
    q = torch.randn(3, rows.number, 8, generator=generator)
    k, v = (torch.randn(3, rows.columns, 8, generator=generator) for _ in range(2))
    q, k, v = ((x * 2**12).round().long() for x in (q, k, v))

    def program(party: Party) -> Any:
        def protocol() -> Protocol_[Any]:
            values = [input_of(party, x, bits, 12) for x, bits in ((q, 33), (k, 33), (v, 44))]
            a, b, c = yield from open_masked(party, values)
            rings = ReluRings(mean_bits=mean_bits)
            return (yield from relu_attention(party, a, Cached.join(None, b), Cached.join(None, c), rows, rings))

        return party.run(protocol())

    want = reference.relu_attention(*(x.double() / 2**12 for x in (q, k, v)), rows)
    bound = reference.relu_attention_bound(float(v.abs().max()) / 2**12, float(want.abs().max()))
    assert float((execute(program).value() - want).abs().max()) < bound < 0.01
