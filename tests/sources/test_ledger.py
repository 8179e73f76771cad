"""Prices by kind of correlation: they add up to what is predicted, and a kind's is its own whatever is made beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from privinf.lowering.explain import explain
from privinf.lowering.joint import Forecast
from protocols.correlations import Kind, Mask
from protocols.maximum import UpperMask
from protocols.sources.two_party.ledger import TRANSFERS
from protocols.truncation import OrMask
from tests.support.ladder import make


@pytest.mark.parametrize("variant", ["SM(t)+ScFuFFN", "SM+LN+G"])
@pytest.mark.parametrize("size", [{"new_tokens": 2}, {"cached": 5}, {"chunk": 3}], ids=str)
def test_kinds_add_up_to_what_is_made_before_the_passes(tmp_path: Path, variant: str, size: dict[str, Any]) -> None:
    lowered, _ = make(tmp_path, variant, n_positions=16, vocab_size=33, n_embd=8, n_head=2)
    found = explain(lowered, 6, trust="two-party", **size)
    (row,) = [op for op in found["ops"] if op["op"] == "preprocess"]
    kinds = {each["kind"]: each for each in found["kinds"]}
    assert sum(each["offline_bytes"] for each in kinds.values()) == row["offline_bytes"] > 0
    assert kinds["LinearMask"]["offline_bytes"] > 0 and (TRANSFERS in kinds or "cached" in size)  # where as many are there already
    assert all(each["count"] == each["transfers"] == 0 for name, each in kinds.items() if name == TRANSFERS)
    assert kinds["Mask"]["offline_bytes"] == 0 < kinds["Mask"]["count"]
    assert all(each["count"] > 0 for name, each in kinds.items() if name != TRANSFERS)


def rows(*passes: Sequence[Kind]) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Count, bytes and transfers by kind, and all bytes."""
    forecast = Forecast(by_kind=True)
    for kinds in passes:
        forecast.make(kinds)
    found = {each["kind"]: (each["count"], each["offline_bytes"], each["transfers"]) for each in forecast.kinds}
    return found, forecast.made.online_bytes


def upper(first: int) -> list[Kind]:
    return [Mask((1 << 14,), 17), UpperMask(first, (1 << 14,), 7, 10)]


def test_a_kinds_price_is_its_own_whatever_is_made_beside_it() -> None:
    """A million `OrMask` of 10 bits: a transfer each, of a bit and 10 bits. Upper bits of a wire ask for some of the same sort."""
    size = 1 << 19
    ors: list[Kind] = [OrMask((size,), 10)] * 2
    one, _ = rows(ors)
    other, _ = rows(upper(1))
    both, total = rows([*ors, *upper(3)])
    assert one["OrMask"] == (2, 2 * size * 11 // 8, 2 * size)
    assert other["UpperMask"][0] == 1 and other["UpperMask"][2] > 10 << 14
    apart = {**other, **one, TRANSFERS: both[TRANSFERS]}
    assert both == apart
    assert sum(row[1] for row in both.values()) == total
    assert rows(ors, upper(3))[0].keys() == both.keys()
