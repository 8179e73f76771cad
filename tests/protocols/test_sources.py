"""A second source of correlations, written here: whatever runs with a dealer runs with it, by the same walks and with the same costs.

A trusted one in this process draws every party's values and shares from a generator of its own and hands them in at both ends. It
knows S's weights, so that C holds nothing of them. And parts modulo a prime: drawn, packed, sent, shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protocols.correlations import Correlation, Fit, Kind, Mask, Part, Role, pack_parts, size_of, unpack_parts
from protocols.errors import CorrelationError
from protocols.linear import linear
from protocols.party import Item, Party, Protocol_, Tables
from protocols.prg import Prg, derive
from protocols.sources.base import PartySource
from protocols.sources.dealer import Dealer, Store
from protocols.truncation import OrMask
from tests.support.every_kind import asked, masks, weights
from tests.support.ladder import IDS, LADDER, LOGIT_ERROR, float_logits, make, walker
from tests.support.two_party import Dealt, Session, Weights, input_of, uniform

PRIME = (1 << 41) - 21
WHAT = ("payload", "rounds")


class Book:
    """What the trusted one knows of a session: see `Known`."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights, self._masks, self._server = weights, dict[int, Tensor](), dict[int, Tensor]()

    def mask(self, name: int) -> Tensor:
        return self._masks[name]

    def server_mask(self, name: int) -> Tensor:
        return self._server[name]

    def weight_mask(self, name: str) -> Tensor:
        return self._weights[name]

    def note(self, kind: Kind, name: int, left: Tensor | None, server: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
        if left is not None:
            self._masks[name] = left
        if kind.leaves_share():
            self._server[name] = kind.share_left(server, shares)


def holds(kind: Kind, book: Book, ends: Mapping[Role, Correlation], name: int, *, near: bool = False) -> bool:
    """Whether what the parties hold is what the kind says, to within its tolerance where that is enough; its mask is noted."""
    server, client = ends[Role.SERVER], ends[Role.CLIENT]
    values, left = kind.relation(book, server.own, client.own, server.shares)
    book.note(kind, name, left, server.own, server.shares)
    found = [part.join(a, b) for part, a, b in zip(kind.shared_parts(), server.shares, client.shares, strict=True)]
    parts = kind.shared_parts()
    slack = (near and kind.tolerance()) or (0,) * len(parts)
    return all(_within(part, value - own, most) for part, value, own, most in zip(parts, values, found, slack, strict=True))


def _within(part: Part, difference: Tensor, most: int) -> bool:
    """Whether these are differences of at most so many units of two values of the part."""
    near = difference + most
    return bool(torch.equal(part.reduce(difference), difference * 0) if not most else (part.reduce(near) <= 2 * most).all())


class End(PartySource):
    """Of a party: nothing but what is handed in. Before the query both ends agree on a number modulo a prime."""

    agreed: Tensor | None = None

    def make(self, kind: Kind, name: int) -> Correlation:
        raise CorrelationError(f"correlation {name} ({type(kind).__name__}) was never made", party=self.role.value)

    def preprocess(self) -> Protocol_[None]:
        own = torch.tensor([PRIME - 1 if self.role is Role.SERVER else 5])
        (theirs,) = yield [Item(own, 41, modulus=PRIME)]
        self.agreed = (own + theirs) % PRIME


class Trusted:
    """See `Source`."""

    def __init__(self, weights: Weights, device: str) -> None:
        self.client_weights: dict[str, Tensor] = {}
        self.ends: dict[Role, PartySource] = {role: End(role, device) for role in Role}
        self.tables: dict[Role, Tables] = {}
        self._book = Book({name: -tensor for name, (_, tensor) in weights.items()})
        self._drawn = torch.Generator().manual_seed(7)

    def _draw(self, parts: Sequence[Part]) -> tuple[Tensor, ...]:
        return tuple(part.reduce(torch.randint(-(2**63), 2**63 - 1, part.shape, generator=self._drawn)) for part in parts)

    def begin_pass(self, kinds: list[Kind]) -> bytes:
        for name, kind in enumerate(kinds, self.ends[Role.SERVER].next_name):
            own = {role: self._draw(kind.own_parts(role)) for role in Role}
            parts = kind.shared_parts()
            shares = self._draw(parts)
            values, left = kind.relation(self._book, own[Role.SERVER], own[Role.CLIENT], shares)
            self._book.note(kind, name, left, own[Role.SERVER], shares)
            rest = tuple(part.reduce(part.split(value, share)) for part, value, share in zip(parts, values, shares, strict=True))
            self.ends[Role.SERVER].hold(Correlation(kind, name, Role.SERVER, own[Role.SERVER], shares))
            self.ends[Role.CLIENT].hold(Correlation(kind, name, Role.CLIENT, own[Role.CLIENT], rest))
        for end in self.ends.values():
            end.begin_pass(kinds)
        return b""

    def end_pass(self, kinds: list[Kind]) -> None:
        assert all(end.agreed == 4 for end in self.ends.values() if isinstance(end, End) and end.role is Role.CLIENT)


# ---- every kind


def dealt() -> dict[Role, Store]:
    """Every kind, by a dealer."""
    seeds = {Role.SERVER: bytes(16), Role.CLIENT: bytes(range(16))}
    stores = {role: Store(role, seed) for role, seed in seeds.items()}
    dealer = Dealer(seeds[Role.SERVER], seeds[Role.CLIENT], masks(4))
    for name, (kind, payload) in enumerate(zip(asked(4), dealer.deal_pass(asked(4)), strict=True), 1):
        if kind.shared_parts():
            stores[Role.CLIENT].put(name, memoryview(payload))
    return stores


def trusted() -> Mapping[Role, PartySource]:
    """And by the other."""
    source = Trusted({}, "cpu")
    source._book = Book(masks(4))
    source.begin_pass(list(asked(4)))
    return source.ends


@pytest.mark.parametrize("source", [dealt, trusted])
def test_the_relation_of_every_kind_holds_and_of_no_share_that_is_off_by_one(source: Callable[[], Mapping[Role, PartySource]]) -> None:
    ends, book, seen = source(), Book(masks(4)), set()
    for name, kind in enumerate(asked(4), 1):
        taken = {role: ends[role].take(kind) for role in Role}
        assert holds(kind, book, taken, name), kind
        for place, part in enumerate(kind.shared_parts()):
            shares = taken[Role.CLIENT].shares
            wrong = shares[place].clone(memory_format=torch.contiguous_format)
            wrong.view(-1)[-1] += 1
            taken[Role.CLIENT].shares = (*shares[:place], wrong, *shares[place + 1 :])
            assert not holds(kind, book, taken, name), (kind, part)
            taken[Role.CLIENT].shares = shares
        seen.add(type(kind).__name__)
    assert seen == set(Kind.registry)


def test_what_is_handed_in_is_given_once() -> None:
    for role in Role:
        end, kind = End(role), OrMask((2,), 7)
        own, shares = (torch.tensor([0, 1]),), (torch.tensor([3, 4]),)
        end.hold(Correlation(kind, 1, role, own, shares))
        with pytest.raises(CorrelationError, match="dealt twice"):
            end.hold(Correlation(kind, 1, role, own, shares))
        found = end.take(kind)
        assert (found.own, found.shares) == (own, shares) and "3" not in repr(found)
        with pytest.raises(CorrelationError, match="never made"):
            end.take(kind)
        with pytest.raises(CorrelationError, match="dealt twice"):
            end.hold(Correlation(kind, 1, role, own, shares))
        end.hold(Correlation(kind, 3, role, own, shares))
        with pytest.raises(CorrelationError, match="not dealt as such"):
            end.take(Mask((2,), 7))


# ---- the same walks


@pytest.mark.parametrize("variant", LADDER)
def test_the_ladder_runs_by_another_source(tmp_path: Path, variant: str) -> None:
    """Right, for the same bytes and rounds, and by the same kinds as with a dealer; the second of two passes too."""
    lowered, model = make(tmp_path, variant)
    by_dealer, by_another = walker(lowered), walker(lowered, source=Trusted)
    for ids in (IDS, IDS[:1]):
        dealers, found, exact = by_dealer(ids), by_another(ids), float_logits(model, ids)
        assert float((found.client.reshape(-1) - exact).abs().max()) < LOGIT_ERROR
        assert found.kinds == dealers.kinds and found.predicted == dealers.predicted and found.dealt == b""
        assert [found.counted["online"][what] for what in WHAT] == [dealers.counted["online"][what] for what in WHAT]
        own = 2 * Part.modulo((1,), PRIME).size  # of this source's preprocessing, both ways
        assert found.counted["offline"]["payload"] == dealers.counted["offline"]["payload"] + own


def test_a_linear_map_needs_nothing_of_the_weights_at_the_client() -> None:
    """Shares of x W are the same by both sources, up to the sharing: it is exact."""
    record, w, x = weights(4)["w"], uniform(8, 12, bits=20), uniform(3, 8, bits=16)

    def program(party: Party) -> Any:
        return party.run(linear(party, input_of(party, x, 44, 0), record, bits=40))

    for source in (Dealt, Trusted):
        session = Session({"w": (record, w)}, source=source)
        assert torch.equal(session.run(program).element(), x @ w)


# ---- modulo a prime


@pytest.mark.parametrize("modulus", [2, 3, 5, 251, 257, 65537, PRIME, (1 << 61) - 1])
def test_parts_modulo_a_prime(modulus: int) -> None:
    part = Part.modulo((3, 1000), modulus)
    assert part.bits == math.ceil(math.log2(modulus)) and part.size == size_of([part]) <= 3000 * part.bits // 8 + part.bits
    prg = Prg(derive(bytes(16), "prime"))
    value, share = part.draw(prg.stream(1)), part.draw(prg.stream(2))
    assert torch.equal(value, part.draw(prg.stream(1)))
    rest = part.split(value, share)
    for x in (value, share, rest):
        assert int(x.min()) >= 0 and int(x.max()) < modulus
        assert torch.equal(unpack_parts(memoryview(pack_parts([x], [part])), [part])[0], x)
    assert torch.equal(part.join(share, rest), value)
    (reduced,) = unpack_parts(memoryview(pack_parts([value - modulus], [part])), [part])
    assert torch.equal(reduced, value)  # any representative may be sent
    top = torch.full(part.shape, (1 << part.bits) - 1)
    assert torch.equal(unpack_parts(memoryview(pack_parts([top], [Part(part.shape, part.bits)])), [part])[0], top % modulus)


@pytest.mark.parametrize("modulus", [-1, 0, 1, 1 << 62])
def test_no_other_modulus(modulus: int) -> None:
    with pytest.raises(ValueError, match="modulus"):
        Part.modulo((1,), modulus)


@pytest.mark.parametrize("modulus", [3, 5, 11, 17, 97, 129])
def test_elements_modulo_a_prime_are_uniform(modulus: int) -> None:
    """Chi-squared within ten standard deviations of its mean; words that are reduced instead of left out would be hundreds away."""
    count = 1 << 20
    drawn = Prg(derive(bytes(16), "uniform")).stream(modulus).below((count,), modulus)
    cells = torch.bincount(drawn, minlength=modulus).double()
    mean = count / modulus
    assert len(cells) == modulus
    assert abs(float(((cells - mean) ** 2 / mean).sum()) - (modulus - 1)) < 10 * math.sqrt(2 * (modulus - 1)) + 10


def test_a_dealer_deals_a_kind_modulo_a_prime() -> None:
    """With no code of its own for it."""

    class PrimeProduct(Kind, frozen=True):
        shape: tuple[int, ...]

        def server_parts(self) -> tuple[Part, ...]:
            return (Part.modulo(self.shape, 65537),)

        client_parts = shared_parts = server_parts

        def fit(self, shapes: Any) -> Any:
            return Fit((self.shape,))

        def relation(self, known: Any, server: Any, client: Any, shares: Any) -> Any:
            return (server[0] * client[0],), None

    try:
        kind, seeds = PrimeProduct((50,)), (bytes(16), bytes(range(16)))
        dealer, ends = Dealer(*seeds, {}), {role: Store(role, seed) for role, seed in zip(Role, seeds, strict=True)}
        ends[Role.CLIENT].put(1, memoryview(dealer.deal(kind)))
        assert holds(kind, Book({}), {role: ends[role].take(kind) for role in Role}, 1)
    finally:
        Kind.registry.pop("PrimeProduct")
