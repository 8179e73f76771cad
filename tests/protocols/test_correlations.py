"""Correlations are spent once and checked; kinds from a peer are checked; secrets stay hidden from Python."""

from __future__ import annotations

import contextlib
import copy
import json
import typing
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols import correlations as c
from protocols import kinds
from protocols.comparison import CompareMask
from protocols.correlations import FIELDS, MAX_ELEMENTS, Kind, Mask, Role, from_wire, on_wire
from protocols.errors import CorrelationError
from protocols.kind_hash import KindHash
from protocols.linear import LinearMask, Weight, linear, masked_weight, weight_mask
from protocols.opening import open_masked
from protocols.party import Item, Offline, Online, Party, Protocol_, Trace
from protocols.prg import Prg, new_seed
from protocols.product import Cached, ProductMask
from protocols.rows import Rows
from protocols.shares import Shares, Wire
from protocols.softmax import softmax
from protocols.sources.dealer import Dealer, Store
from protocols.truncation import OrMask
from tests.support.two_party import Session, execute, input_of, mask_weight, run, uniform

OR = OrMask((5,), 7)


def trio() -> tuple[Store, Store, Dealer]:
    seeds = new_seed(), new_seed()
    return Store(Role.SERVER, seeds[0]), Store(Role.CLIENT, seeds[1]), Dealer(*seeds, {})


# ---- spent once


def test_a_correlation_is_what_was_dealt() -> None:
    server, client, dealer = trio()
    client.put(1, memoryview(dealer.deal(OR)))
    a, b = server.take(OR), client.take(OR)
    assert a.name == b.name == 1
    assert torch.equal((a.shares[0] + b.shares[0]) & 127, a.own[0] & b.own[0])


def test_a_correlation_cannot_be_taken_twice() -> None:
    _, client, dealer = trio()
    client.put(1, memoryview(dealer.deal(OR)))
    client.take(OR)
    with pytest.raises(CorrelationError, match="missing or already spent"):
        client.take(OR)
    with pytest.raises(CorrelationError, match="missing or already spent"):
        client.peek(OR, 1)


def test_a_correlation_cannot_be_put_twice_nor_after_its_use() -> None:
    _, client, dealer = trio()
    payload = memoryview(dealer.deal(OR))
    client.put(1, payload)
    with pytest.raises(CorrelationError, match="dealt twice"):
        client.put(1, payload)
    client.take(OR)
    with pytest.raises(CorrelationError, match="dealt twice"):
        client.put(1, payload)
    with pytest.raises(CorrelationError, match="asked for twice"):
        client.expect(1, OR)
    client.expect(2, OR)
    with pytest.raises(CorrelationError, match="asked for twice"):
        client.expect(2, OR)


def test_what_was_computed_ahead_cannot_be_replaced() -> None:
    _, client, dealer = trio()
    payload = memoryview(dealer.deal(OR))
    client.put(1, payload)
    client.completed(OR, 1, (torch.zeros(5, dtype=torch.int64),))
    with pytest.raises(CorrelationError, match="dealt twice"):
        client.put(1, payload)
    for found in (client.peek(OR, 1), client.take(OR)):
        assert torch.equal(found.shares[0], torch.zeros(5, dtype=torch.int64))
    with pytest.raises(CorrelationError, match="missing or already spent"):
        client.take(OR)


@pytest.mark.parametrize("size", [0, 1, OR.shared_bytes - 1, OR.shared_bytes + 1, 1000])
def test_a_payload_of_another_size_is_refused(size: int) -> None:
    _, client, _ = trio()
    client.put(1, memoryview(bytes(size)))
    with pytest.raises(CorrelationError, match="missing or already spent"):
        client.take(OR)


def test_another_kind_of_the_same_size_is_refused() -> None:
    for role in Role:
        store, other = Store(role, new_seed()), ProductMask(1, 2, (5,), 7)
        assert other.shared_bytes == OR.shared_bytes
        store.expect(1, OR)
        if role is Role.CLIENT:
            store.put(1, memoryview(bytes(OR.shared_bytes)))
        with pytest.raises(CorrelationError, match="not dealt as such"):
            store.take(other)
        assert store.next_name == 2  # the name is gone, and with it what was under it


def test_a_program_that_asks_for_something_else_online_fails() -> None:
    """The walk before the query fixes what is asked for: a program that depends on a secret is caught."""

    def program(party: Party) -> Any:
        wide = isinstance(party.engine, Online) and not party.is_server
        return party.run(open_masked(party, [input_of(party, uniform(4), 13 if wide else 12, 0)]))

    with pytest.raises(CorrelationError, match="not dealt as such"):
        execute(program)


def test_a_mask_lives_for_one_pass_unless_it_is_kept() -> None:
    _, _, dealer = trio()
    dealer.deal(Mask((2,), 20))
    dealer.deal(Mask((2,), 20, keep=1))
    assert len(dealer.deal(ProductMask(1, 2, (2,), 20))) == 8
    dealer.end_pass()
    dealer.deal(ProductMask(2, 2, (2,), 20))
    for refused in (ProductMask(1, 2, (2,), 20), ProductMask(9, 2, (2,), 20), LinearMask("w", (1, 2), 2, 20)):
        with pytest.raises(CorrelationError, match="does not exist"):
            dealer.deal(refused)
    dealer.forget()
    with pytest.raises(CorrelationError, match="does not exist"):
        dealer.deal(ProductMask(2, 2, (2,), 20))


def test_what_nobody_has_seen_is_taken_back() -> None:
    _, _, dealer = trio()
    dealer.deal(Mask((2,), 20, keep=1))
    dealer.end_pass()
    kept = dealer.deal(ProductMask(1, 1, (2,), 20)), dealer.deal(Mask((2,), 20, keep=1)), dealer.deal(ProductMask(3, 3, (2,), 20))
    dealer.end_pass()
    dealer.rewind(2)
    assert dealer.next_name == 2 and dealer.deal(ProductMask(1, 1, (2,), 20)) == kept[0]  # the same names, the same streams
    with pytest.raises(CorrelationError, match="does not exist"):
        dealer.deal(ProductMask(3, 3, (2,), 20))


def test_what_outlives_its_pass_is_bounded_in_sum() -> None:
    """Masks that are kept count for every later pass, and so does each of them, however small it is."""
    dealer = Dealer(bytes(16), bytes(range(16)), {}, memory=2**20)
    for kind, most in ((Mask((2**12,), 20, keep=1), 2**5), (Mask((0,), 20, keep=1), 2**12)):
        with pytest.raises(CorrelationError, match="than the 1048576 bytes that a session may hold"):
            for _ in range(most):
                list(dealer.deal_pass([kind]))
        assert dealer.held <= 2**17
        dealer.forget()
    assert dealer.held == 0


def test_masks_go_after_the_last_kind_that_names_them() -> None:
    """So a pass may be larger than what is held of it at a time."""
    kinds = [kind for k in range(20) for kind in (Mask((2**12,), 20), ProductMask(2 * k + 1, 2 * k + 1, (2**12,), 20))]
    dealer = Dealer(bytes(16), bytes(range(16)), {}, memory=2**19)
    assert sum(len(payload) for payload in dealer.deal_pass(kinds)) == sum(kind.shared_bytes for kind in kinds) and dealer.held == 0
    dealer = Dealer(bytes(16), bytes(range(16)), {}, memory=2**19)
    with pytest.raises(CorrelationError, match="than the 524288 bytes"):
        dealer.deal_pass([*kinds, *(ProductMask(1, 1 + 2 * k, (2**12,), 20) for k in range(20))])


# ---- kinds from a peer


def test_kinds_survive_the_wire() -> None:
    """All kinds of a program, encoded and read."""
    rows = Rows(1, 9, 1)
    weight = Weight("w", (4, rows.count), 40, 8)

    def program(party: Party) -> Protocol_[Any]:
        x = yield from linear(party, input_of(party, uniform(2, 4, bits=20), 40, 12), weight, bits=40)
        yield from softmax(party, x, rows, bits=30, frac=20)

    found = run(program, {"w": (weight, torch.zeros(weight.shape, dtype=torch.int64))}).kinds
    assert len({type(kind) for kind in found}) > 8
    digests = KindHash(), KindHash()
    for kind in found:
        (raw,) = on_wire([kind])
        again = from_wire(raw)
        assert again == kind and type(again) is type(kind)
        digests[0].update(kind)
        digests[1].update(again)
    assert digests[0].digest() == digests[1].digest()
    digests[1].update(found[0])
    assert digests[0].digest() != digests[1].digest()


numbers = st.one_of(st.integers(), st.integers(-3, 70), st.sampled_from([2**31 - 1, 2**31, 2**63, -(2**63), 2**64]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8), st.binary(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=12,
)
known_names = st.sampled_from(sorted(Kind.registry))


def accepted_or_refused(fields: Any) -> Kind | None:
    """The kind, or None where a CorrelationError refused it; whatever is accepted is bounded."""
    try:
        kind = from_wire(msgspec.msgpack.encode(fields))
    except (CorrelationError, OverflowError):  # of integers that have no place in an encoding
        return None
    for part in (*kind.server_parts(), *kind.client_parts(), *kind.shared_parts()):
        assert 1 <= part.bits <= 64 and part.count <= MAX_ELEMENTS and len(part.shape) <= 10
    assert kind.shared_bytes <= MAX_ELEMENTS * 8 * len(kind.shared_parts())
    return kind


@given(values)
def test_from_wire_refuses_any_value(value: Any) -> None:
    accepted_or_refused(value)


@given(known_names, st.lists(values, max_size=9))
def test_from_wire_refuses_any_fields_of_a_known_name(name: str, fields: list[Any]) -> None:
    accepted_or_refused([name, *fields])


def hints(name: str) -> list[Any]:
    """The types of a kind's fields, in order."""
    found = typing.get_type_hints(Kind.registry[name], include_extras=True)
    return [found[field] for field in Kind.registry[name].__struct_fields__]


@st.composite
def typed_kinds(draw: st.DrawFn, number: st.SearchStrategy[int]) -> list[Any]:
    """Fields of the right types, so that only the checks of their values are left."""
    name = draw(known_names)
    lists = st.lists(number, max_size=4)
    by_type = {hint: lists if hint in (c.Shape, c.Layout, c.Names) else number for hint in FIELDS} | {c.Text: st.sampled_from(["w", ""])}
    return [name, *(draw(by_type[hint]) for hint in hints(name))]


@settings(max_examples=500)
@given(typed_kinds(st.one_of(st.integers(-2, 70), st.sampled_from([2**20, 2**31 - 1, -(2**31) + 1]))))
def test_from_wire_bounds_fields_of_the_right_types(fields: list[Any]) -> None:
    kind = accepted_or_refused(fields)
    assert kind is None or json.loads(msgspec.json.encode(kind)) == fields


@settings(max_examples=500, suppress_health_check=[HealthCheck.filter_too_much])
@given(typed_kinds(st.integers(-1, 4)))
def test_a_dealer_refuses_fields_that_do_not_fit(fields: list[Any]) -> None:
    """Small kinds that are accepted: the dealer sends exactly what the kind says, or refuses it."""
    kind = accepted_or_refused(fields)
    if kind is None:
        return
    dealer = Dealer(bytes(16), bytes(range(16)), {"w": torch.arange(6).reshape(2, 3)})
    for before in (Mask((2, 3), 20), Mask((4,), 20), CompareMask(2, (4,), (4,), 9)):
        dealer.deal(before)
    with contextlib.suppress(CorrelationError):
        assert len(dealer.deal(kind)) == kind.shared_bytes


@pytest.mark.parametrize(
    "fields",
    [
        ["CompareMask", 1, [4], [4], 2**31 - 1],
        ["CompareMask", 1, [4], [4], 0],
        ["CompareMask", 1, [4], [4], 44],
        ["Mask", [2**16, 2**16], 40, 0],
        ["Mask", [-1], 40, 0],
        ["Mask", [2] * 9, 40, 0],
        ["Mask", [4], 65, 0],
        ["Mask", [4], True, 0],
        ["Mask", [4]],
        ["Mask", [4], 40, 0, 0],
        ["Mask", 4, 40, 0],
        ["Mask", [4.0], 40, 0],
        ["ExpMask", 1, 2, [4], 64, [1, 1, 1]],
        ["ExpMask", 1, 2, [4], 11, [1, -1, 1]],
        ["Kind"],
        ["Part", [4], 3],
        [],
        None,
        "Mask",
        {"Mask": 1},
    ],
)
def test_from_wire_refuses(fields: Any) -> None:
    with pytest.raises(CorrelationError):
        from_wire(msgspec.msgpack.encode(fields))


def test_what_from_wire_says_is_short() -> None:
    with pytest.raises(CorrelationError) as refused:
        from_wire(msgspec.msgpack.encode(["A" * 10**6]))
    assert len(str(refused.value)) < 400


def test_kinds_hold_plain_values_alone() -> None:
    assert kinds.__all__
    for name, kind in Kind.registry.items():
        assert issubclass(kind, msgspec.Struct) and kind.__name__ == name
        assert all(hint in FIELDS for hint in hints(name))


# ---- hidden


SECRET = torch.tensor([[123456789, 987654321]])
HIDDEN: dict[str, Any] = {
    "shares": Shares(SECRET, 40, 12),
    "wire": Wire(SECRET, SECRET, 1, 40, 12),
    "cache": Cached(SECRET, SECRET, (1,), 40, 12),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_secrets_take_part_in_nothing(name: str) -> None:
    x = HIDDEN[name]
    refused = [
        lambda: bool(x),
        lambda: int(x),
        lambda: float(x),
        lambda: complex(x),
        lambda: list(x),
        lambda: len(x),
        lambda: x == x,
        lambda: x != x,
        lambda: x < x,
        lambda: x >= 0,
        lambda: x == 0,
        lambda: 0 in [x],
        lambda: hash(x),
        lambda: {x},
        lambda: [1][x],
        lambda: torch.tensor(x),
        lambda: torch.zeros(2) + x,
        lambda: x and 1,
        lambda: not x,
        lambda: f"{x:d}",
        lambda: format(x, ".3f"),
        lambda: max(x, x),
        lambda: json.dumps(x),
        lambda: setattr(x, "bits", 3),
        lambda: vars(x),
    ]
    for attempt in refused:
        with pytest.raises((TypeError, AttributeError, ValueError, RuntimeError)):
            attempt()


def test_nothing_that_holds_a_secret_prints_it() -> None:
    server, client, dealer = trio()
    client.put(1, memoryview(dealer.deal(OR)))
    correlation = client.take(OR)
    party = Party(Role.SERVER, Trace(Role.SERVER), {"w": SECRET})
    held = [
        *HIDDEN.values(),
        Item(SECRET, 40),
        correlation,
        server,
        client,
        dealer,
        Prg(bytes(range(1, 17))),
        Prg(bytes(range(1, 17))).stream(3),
        party,
        Offline(party.weights, None, client),  # type: ignore[arg-type]
        copy.copy(HIDDEN["shares"]),
    ]
    values = [*correlation.own, *correlation.shares]
    leaks = ["123456789", "987654321", "tensor", bytes(range(1, 17)).hex(), *(str(v.tolist()) for v in values)]
    for x in held:
        for text in (repr(x), str(x), f"{x}", f"{[x]}", f"{ {1: x} }"):
            assert not any(leak in text for leak in leaks), type(x).__name__


def test_errors_tell_no_secret() -> None:
    session = Session()

    def program(party: Party) -> Any:
        (wire,) = party.run(open_masked(party, [input_of(party, SECRET, 40, 0)]))
        return Shares(SECRET, 40, 0) + Shares(SECRET, 40, 1) if isinstance(party.engine, Online) else wire

    with pytest.raises(AssertionError) as caught:
        session.run(program)
    assert "123456789" not in str(caught.value)


def test_a_weight_is_masked_whole() -> None:
    record, seed = Weight("w", (2, 3), 40, 8), new_seed()
    assert torch.equal((mask_weight(SECRET.new_zeros(2, 3), seed, record) - weight_mask(seed, record)) % 2**40, SECRET.new_zeros(2, 3))
    for shape in ((3,), (1, 3), (3, 2)):
        with pytest.raises(AssertionError, match="cover its tensor"):
            masked_weight(SECRET.new_zeros(shape), seed, record)
