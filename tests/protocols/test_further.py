"""Passes that move on by a position: their kinds from those of the pass before, and what a dealer deals of them, with tapes and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from protocols import kernels
from protocols.correlations import Kind, Mask
from protocols.errors import CorrelationError
from protocols.kind_hash import KindHash, hangs_on_position, moved_on, relative
from protocols.linear import LinearMask, Weight, weight_mask
from protocols.product import MatmulMask, ProductMask
from protocols.sequences import PutRowsMask
from protocols.sources.dealer import Dealer
from protocols.sources.dealing import DealtTape
from protocols.sources.taping import DealtTapes

PROMPT, REACH = 4, 16


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def compiled(request: pytest.FixtureRequest) -> Iterator[bool]:
    kernels.load(None)
    if not request.param:
        with kernels.plain():
            yield False
    elif kernels.fast is None:
        pytest.skip(kernels.status())
    else:
        yield True


def dealer_of(positions: int) -> Dealer:
    table = Weight("table", (1, positions), 32, 14)
    return Dealer(bytes(16), bytes(range(16)), {"table": weight_mask(bytes(32), table)}, tapes=DealtTapes())


def prompt() -> list[Kind]:
    return [Mask((2, PROMPT, 3), 40, 1)]


def token(first: int, before: tuple[int, ...], at: int, other: int | None = None) -> list[Kind]:
    """A row more of a cache, a product with all of its rows, and two windows of a weight, which need not be at one position."""
    windows = [(place, place + 1) for place in (at, at if other is None else other)]
    scaled = [LinearMask("table", (1, 1, 1), 1, 32, 1, 0, window) for window in windows]
    return [Mask((2, 1, 3), 40, 1), Mask((2, 1, REACH), 40), MatmulMask(first + 1, (*before, first), (2, 1, 3), 40, REACH), *scaled]


def digest_of(kinds: Sequence[Kind], first: int) -> bytes:
    digest = KindHash(first)
    for kind in kinds:
        digest.update(kind)
    return digest.digest()


def dealt(dealer: Dealer, kinds: Sequence[Kind]) -> bytes:
    return b"".join(dealer.deal_pass(kinds, digest_of(kinds, dealer.next_name)))


@pytest.mark.parametrize("positions", [64, 9], ids=["row", "window"])
def test_a_dealer_deals_what_moves_on_as_if_it_was_asked_for_it(compiled: bool, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the row is full, or the weight at its end: then it refuses, and makes nothing."""
    replayed = []
    monkeypatch.setattr(DealtTape, "deal", lambda *args, deal=DealtTape.deal: (replayed.append(1), deal(*args))[1])
    one, other = dealer_of(positions), dealer_of(positions)
    assert dealt(one, prompt()) == dealt(other, prompt())
    first, before, passes = 2, (1,), min(REACH, positions) - PROMPT
    for number in range(passes):
        kinds = token(first, before, PROMPT + number)
        want = dealt(one, kinds)
        if number == 0:
            assert dealt(other, kinds) == want
        else:
            count, payload = other.deal_further()
            assert count == len(kinds) and b"".join(payload) == want
        assert one.next_name == other.next_name == first + len(kinds)
        before, first = (*before, first), first + len(kinds)
    assert len(replayed) == (2 * (passes - 3) if compiled else 0), "the first is dealt without a tape, two are written"
    for _ in range(2):
        with pytest.raises(CorrelationError):
            other.deal_further()
        assert other.next_name == first


def test_what_no_pass_came_before_is_refused(compiled: bool) -> None:
    dealer = dealer_of(64)
    with pytest.raises(CorrelationError, match="nothing tells which"):
        dealer.deal_further()
    dealt(dealer, prompt())
    kinds = token(2, (1,), PROMPT)
    dealer.deal_pass(kinds, digest_of(kinds, 2))  # none of it is read
    with pytest.raises(CorrelationError, match="nothing tells which"):
        dealer.deal_further()
    dealt(dealer, kinds)
    dealer.rewind(2)
    with pytest.raises(CorrelationError, match="nothing tells which"):
        dealer.deal_further()


def test_a_tape_is_not_used_where_positions_move_on_unlike(compiled: bool) -> None:
    """Of two passes with one digest: what each kind reads of a weight is further by its own steps."""
    one, other = dealer_of(64), dealer_of(64)
    other._taping = None
    first, before = 2, (1,)
    assert dealt(one, prompt()) == dealt(other, prompt())
    for at, beside in ((4, 4), (5, 5), (6, 6), (7, 30), (8, 9), (9, 9), (10, 10)):
        kinds = token(first, before, at, beside)
        assert digest_of(kinds, first) == digest_of(token(first, before, at), first)
        assert dealt(one, kinds) == dealt(other, kinds)
        before, first = (*before, first), first + len(kinds)


def test_kinds_move_on_by_rules_or_not_at_all() -> None:
    kinds = [*token(7, (1, 2), 5), PutRowsMask(3, 7, (8, 20), 32), ProductMask(8, 12, (2, 1, 16), 40)]
    found = moved_on(kinds, 7)
    assert found == [*token(14, (1, 2, 7), 6), PutRowsMask(12, 14, (9, 21), 32), ProductMask(15, 19, (2, 1, 16), 40)]
    assert [relative(kind, 14) for kind in found] == [relative(kind, 7) for kind in kinds]
    assert [hangs_on_position(kind, 7) for kind in kinds] == [False, False, True, True, True, True, False]
    for kind in (
        ProductMask(2, 7, (2, 1, 3), 40),  # an earlier pass's, which nothing says the next one to
        MatmulMask(7, (7, 2), (2, 1, 3), 40, REACH),  # rows out of order
        MatmulMask(7, (1, 2), (2, 1, 3), 40, REACH),  # nothing is added
    ):
        assert moved_on([Mask((2, 1, 3), 40, 1), kind], 7) is None
