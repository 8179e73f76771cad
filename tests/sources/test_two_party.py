"""The source `two_party`: every kind is made right by both parties alone, for what was predicted, and given once."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from protocols.correlations import Kind, Role
from protocols.linear import Weight
from protocols.ot.transfers import Transfers
from protocols.sources.two_party.making import maker_of
from protocols.truncation import OrMask
from tests.protocols.test_sources import Book, holds
from tests.support.alone import Alone
from tests.support.every_kind import asked, weights
from tests.support.plain_transfers import PlainTransfers
from tests.support.two_party import uniform


def drawn(n: int) -> dict[str, tuple[Weight, Tensor]]:
    return {name: (weight, uniform(*weight.shape, bits=20)) for name, weight in weights(n).items()}


def has_maker(kind: Kind) -> bool:
    try:
        maker_of(kind)
    except LookupError:
        return False
    return True


@pytest.mark.parametrize(("n", "transfers"), [(4, PlainTransfers), (9, PlainTransfers), (4, Transfers)])
def test_every_kind_is_made_by_the_two_alone(n: int, transfers: Any) -> None:
    made = drawn(n)
    kinds = [kind if has_maker(kind) else OrMask((1,), 1) for kind in asked(n)]
    alone, book, seen = Alone(made, transfers=transfers), Book({name: -tensor for name, (_, tensor) in made.items()}), set()
    alone.begin_pass(kinds)
    counted = alone.preprocess()
    assert (counted["payload"], counted["rounds"]) == alone.predicted[0]
    for name, kind in enumerate(kinds, 1):
        taken = {role: alone.ends[role].take(kind) for role in Role}
        assert holds(kind, book, taken, name, near=True), kind
        seen.add(type(kind).__name__)
    for end in alone.ends.values():
        end.end_pass()
    assert seen == {type(kind).__name__ for kind in kinds}
