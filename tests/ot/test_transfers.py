"""Oblivious transfer against what it should compute, on every element, and its bytes and rounds against the trace's."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nacl import bindings
from torch import Tensor

from protocols.correlations import Role
from protocols.errors import TransportError
from protocols.ot import pool as pool_module
from protocols.ot import spending
from protocols.ot.base import BaseSender, choose
from protocols.ot.transfers import Transfers
from protocols.party import Protocol_, parallel
from protocols.ring import blank, reduce
from protocols.security import LPN, Lpn
from tests.support.both import Both, predicted, run_both
from tests.support.tls_pair import connected, keys_dir, pool
from tests.support.two_party import uniform

__all__ = ["keys_dir", "pool"]  # fixtures

Program = Callable[[Transfers], Protocol_[Any]]
OTHER = {Role.SERVER: Role.CLIENT, Role.CLIENT: Role.SERVER}


class Ends:
    """Both ends of one session; each run is held against its trace."""

    def __init__(self) -> None:
        self.of = {role: Transfers(role) for role in Role}
        self.run(lambda end: end.start())

    def run(self, program: Program) -> Both:
        traces = {role: self.of[role].trace() for role in Role}
        costs = [predicted(role, program(traces[role])) for role in Role]
        both = run_both(lambda role: program(self.of[role]))
        for cost in costs:
            assert (cost.online_bytes, cost.rounds) == (both.bytes, both.rounds)
        return both


@pytest.fixture(scope="module")
def ends() -> Ends:
    return Ends()


def known_to(end: Transfers, role: Role, x: Tensor) -> Tensor:
    return x if end.role is role and not end.traced else blank(*x.shape)


def bits_of(*shape: int, width: int = 1) -> Tensor:
    return reduce(uniform(*shape), width)


SHAPES = [(0,), (3, 0), (1,), (7,), (3, 5, 11), (1000,)]


@pytest.mark.parametrize("sender", Role)
@pytest.mark.parametrize("bits", [1, 2, 7, 24, 41, 63, 64])
@pytest.mark.parametrize("xor", [False, True])
def test_correlated(ends: Ends, sender: Role, bits: int, xor: bool) -> None:
    for shape in SHAPES:
        choice, delta = bits_of(*shape), uniform(*shape)

        def program(end: Transfers, choice: Tensor = choice, delta: Tensor = delta) -> Protocol_[Tensor]:
            mine = known_to(end, OTHER[sender], choice), known_to(end, sender, delta)
            return (yield from end.correlated(sender, *mine, bits, xor=xor))

        both = ends.run(program)
        found = both.server ^ both.client if xor else reduce(both.server + both.client, bits)
        assert torch.equal(found, reduce(choice * delta, bits)) and found.shape == shape
        assert torch.equal(both.server, reduce(both.server, bits)) and torch.equal(both.client, reduce(both.client, bits))


@pytest.mark.parametrize("sender", Role)
@pytest.mark.parametrize(("bits", "y_bits"), [(1, 1), (8, 3), (20, 40), (40, 40), (48, 10), (64, 64), (64, 1)])
def test_product(ends: Ends, sender: Role, bits: int, y_bits: int) -> None:
    for shape in SHAPES[:-1]:
        x, y = uniform(*shape), bits_of(*shape, width=y_bits)

        def program(end: Transfers, x: Tensor = x, y: Tensor = y) -> Protocol_[Tensor]:
            return (yield from end.product(sender, known_to(end, sender, x), known_to(end, OTHER[sender], y), bits, y_bits))

        both = ends.run(program)
        assert torch.equal(reduce(both.server + both.client, bits), reduce(x * y, bits))
        assert both.server.shape == both.client.shape == shape


@pytest.mark.parametrize("sender", Role)
@pytest.mark.parametrize("choice_bits", range(1, 7))
@pytest.mark.parametrize("bits", [1, 2, 7, 33, 64])
def test_chosen(ends: Ends, sender: Role, choice_bits: int, bits: int) -> None:
    for shape in SHAPES[:-1]:
        choice, words = bits_of(*shape, width=choice_bits), uniform(*shape, 1 << choice_bits)

        def program(end: Transfers, choice: Tensor = choice, words: Tensor = words) -> Protocol_[Tensor]:
            mine = known_to(end, OTHER[sender], choice), known_to(end, sender, words)
            return (yield from end.chosen(sender, *mine, choice_bits, bits))

        both = ends.run(program)
        got, zeros = (both.client, both.server) if sender is Role.SERVER else (both.server, both.client)
        assert torch.equal(got, reduce(words.gather(-1, choice[..., None])[..., 0], bits))
        assert zeros.shape == shape and not zeros.any()


@pytest.mark.parametrize("bits", [1, 3, 10, 64])
def test_ands(ends: Ends, bits: int) -> None:
    for shape in SHAPES[:-1]:
        x, y = ({role: uniform(*shape) for role in Role} for _ in range(2))

        def program(end: Transfers, x: dict[Role, Tensor] = x, y: dict[Role, Tensor] = y) -> Protocol_[Tensor]:
            return (yield from end.ands(known_to(end, end.role, x[end.role]), known_to(end, end.role, y[end.role]), bits))

        both = ends.run(program)
        expected = (x[Role.SERVER] ^ x[Role.CLIENT]) & (y[Role.SERVER] ^ y[Role.CLIENT])
        assert torch.equal(both.server ^ both.client, reduce(expected, bits)) and both.server.shape == shape


def test_programs_side_by_side_share_an_extension(ends: Ends) -> None:
    """Each gets transfers of its own, and the rounds are those of one of them."""
    x, y = uniform(500), bits_of(500, width=9)
    choice, words = bits_of(300, width=3), uniform(300, 8)

    def one(end: Transfers, sender: Role) -> Protocol_[Tensor]:
        return (yield from end.product(sender, known_to(end, sender, x), known_to(end, OTHER[sender], y), 30, 9))

    def other(end: Transfers, sender: Role) -> Protocol_[Tensor]:
        return (yield from end.chosen(sender, known_to(end, OTHER[sender], choice), known_to(end, sender, words), 3, 11))

    def program(end: Transfers) -> Protocol_[list[Tensor]]:
        return (yield from parallel(*(p(end, sender) for sender in Role for p in (one, other, one))))

    both, alone = ends.run(program), ends.run(lambda end: one(end, Role.SERVER))
    for i in (0, 2, 3, 5):
        assert torch.equal(reduce(both.server[i] + both.client[i], 30), reduce(x * y, 30))
    assert torch.equal(both.client[1], reduce(words.gather(-1, choice[:, None])[:, 0], 11)) and not both.server[1].any()
    assert torch.equal(both.server[4], both.client[1])
    assert both.rounds <= alone.rounds + 1


def test_silent_extensions_in_between(ends: Ends) -> None:
    """A need beyond one extension, and then one that what is left of the last one meets."""
    x, y = uniform(LPN.net // 16), bits_of(LPN.net // 16, width=40)

    def program(end: Transfers, bits: int) -> Protocol_[Tensor]:
        return (yield from end.product(Role.CLIENT, known_to(end, Role.CLIENT, x), known_to(end, Role.SERVER, y), bits, 40))

    two, rest = ends.run(lambda end: program(end, 20)), ends.run(lambda end: program(end, 10))
    for both, bits in ((two, 20), (rest, 10)):
        assert torch.equal(reduce(both.server + both.client, bits), reduce(x * y, bits))
    assert rest.rounds < two.rounds


def test_programs_of_all_kinds_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extensions so small that they are made, waited for and sent ahead all the time; what each program gets is right, and predicted."""
    for name, value in {"LPN": Lpn(70, 4, 200), "SMALL": 50, "SMALL_IN_ALL": 400, "AHEAD": 3000}.items():
        monkeypatch.setattr(pool_module, name, value)
    ends = Ends()
    sizes = [3, 700, 41, 90, 1500, 5, 200, 1, 64]
    inputs = [(uniform(n), bits_of(n, width=5), uniform(n, 8), {role: uniform(n) for role in Role}) for n in sizes]

    def chain(end: Transfers, at: int) -> Protocol_[list[Tensor]]:
        x, y, words, z = inputs[at]
        sender = list(Role)[at % 2]
        receiver = OTHER[sender]
        found = []
        for step in range(at % 4 + 1):
            if step % 3 == 0:
                found.append((yield from end.product(sender, known_to(end, sender, x), known_to(end, receiver, y), 20, 5)))
            elif step % 3 == 1:
                found.append((yield from end.ands(known_to(end, end.role, z[end.role]), known_to(end, end.role, z[end.role]), 2)))
            else:
                found.append((yield from end.chosen(sender, known_to(end, receiver, y & 7), known_to(end, sender, words), 3, 9)))
        return found

    for _ in range(3):
        both = ends.run(lambda end: parallel(*(chain(end, at) for at in range(len(sizes)))))
        for at, (x, y, words, z) in enumerate(inputs):
            server, client = both.server[at], both.client[at]
            wanted = {
                0: reduce(x * y, 20),
                1: reduce(z[Role.SERVER] ^ z[Role.CLIENT], 2),
                2: reduce(words.gather(-1, y[:, None] & 7)[:, 0], 9),
            }
            for step, (s, c) in enumerate(zip(server, client, strict=True)):
                assert torch.equal(reduce(s + c, 20) if step % 3 == 0 else s ^ c, wanted[step % 3])


@pytest.mark.parametrize("role", Role)
def test_any_bits_are_taken_from_a_peer(role: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of the right size cannot be out of range: whatever is in it, results are in range, and the party goes on."""
    for name, value in {"LPN": Lpn(70, 4, 200), "SMALL": 50, "SMALL_IN_ALL": 400, "AHEAD": 3000}.items():
        monkeypatch.setattr(pool_module, name, value)
    end = Ends().of[role]
    x, table = uniform(100), uniform(100, 16)

    def drive(program: Protocol_[Tensor]) -> Tensor:
        try:
            items = next(program)
            while True:
                items = program.send([reduce(uniform(*item.value.shape), item.bits) for item in items])
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    for sender in Role:
        for _ in range(3):
            assert drive(end.product(sender, x, x, 30, 20)).max() < 2**30
            assert drive(end.correlated(sender, x, x, 9, xor=True)).max() < 2**9
            assert drive(end.chosen(sender, x, table, 4, 7)).max() < 2**7
            assert drive(end.ands(x, x, 5)).max() < 2**5


def test_most_needs_are_met_ahead() -> None:
    """A chain of needs of one size waits for no extension once it runs: two rounds each, one for ANDs, as if transfers were endless."""
    end = Transfers(Role.CLIENT, traced=True)
    x = blank(20000)

    def chain(times: int) -> Protocol_[None]:
        for _ in range(times):
            yield from parallel(*(end.product(sender, x, x, 40, 40) for sender in Role))
            yield from end.ands(x, x, 1)

    predicted(Role.CLIENT, end.start())
    predicted(Role.CLIENT, chain(3))
    assert predicted(Role.CLIENT, chain(10)).rounds == 30


def test_what_is_large_goes_in_parts(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spending, "PART", 1 << 10)
    test_product(ends, Role.SERVER, 40, 33)
    test_correlated(ends, Role.CLIENT, 17, False)
    test_chosen(ends, Role.CLIENT, 5, 11)
    test_ands(ends, 64)
    assert len(list(spending.parts(1000, 33))) == 16


def test_over_sockets(keys_dir: Path, pool: ThreadPoolExecutor) -> None:
    """TLS between two threads: all of a session, its base transfers included."""
    x, y, z = uniform(2000), bits_of(2000, width=12), {role: uniform(300) for role in Role}
    ends = {role: Transfers(role) for role in Role}

    def program(end: Transfers) -> Protocol_[list[Tensor]]:
        yield from end.start()
        product = end.product(Role.SERVER, known_to(end, Role.SERVER, x), known_to(end, Role.CLIENT, y), 36, 12)
        return (yield from parallel(product, end.ands(known_to(end, end.role, z[end.role]), known_to(end, end.role, z[end.role]), 64)))

    cost = predicted(Role.CLIENT, program(Transfers(Role.CLIENT, traced=True)))
    with connected(keys_dir, pool) as link:
        both = run_both(lambda role: program(ends[role]), (link.server, link.client))
    assert (cost.online_bytes, cost.rounds) == (both.bytes, both.rounds)
    assert torch.equal(reduce(both.server[0] + both.client[0], 36), reduce(x * y, 36))
    assert torch.equal(both.server[1] ^ both.client[1], z[Role.SERVER] ^ z[Role.CLIENT])


def test_points_are_checked() -> None:
    base, bits = BaseSender(b"x", "server"), np.array([0, 1], np.uint8)
    points, keys = choose(b"x", "client", base.first(), bits)
    pairs = base.keys(points)
    assert [pair[bit] for pair, bit in zip(pairs, bits, strict=True)] == keys
    assert not {pair[1 - bit] for pair, bit in zip(pairs, bits, strict=True)} & set(keys)
    identity = (1).to_bytes(32, "little")
    low_order = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
    mixed = bindings.crypto_core_ed25519_add(bindings.crypto_scalarmult_ed25519_base_noclamp((5).to_bytes(32, "little")), low_order)
    for bad in (bytes(32), identity, low_order, mixed, b"\xff" * 32, (2**255 - 18).to_bytes(32, "little")):
        words = np.frombuffer(bad, np.uint64)
        with pytest.raises(TransportError, match="point"):
            choose(b"x", "client", words, bits)
        with pytest.raises(TransportError, match="point"):
            base.keys(np.stack([points[0], words]))
    with pytest.raises(TransportError, match="point"):
        base.keys(base.first()[None].copy())  # B = A: that key would be of the identity


def test_shares_are_uniform_and_fresh(ends: Ends) -> None:
    """Of constant inputs, at each party: bits are balanced, and another run gives other shares."""
    n, bits = 5000, 40
    choice, delta = torch.ones(n, dtype=torch.int64), torch.full((n,), 12345)

    def program(end: Transfers) -> Protocol_[Tensor]:
        return (yield from end.correlated(Role.SERVER, known_to(end, Role.CLIENT, choice), known_to(end, Role.SERVER, delta), bits))

    first, second = ends.run(program), ends.run(program)
    for share in (first.server, first.client, first.server ^ second.server, first.client ^ second.client):
        ones = np.unpackbits(share.numpy().view(np.uint8).reshape(-1, 8), axis=1, count=bits, bitorder="little").mean(0)
        assert abs(ones - 0.5).max() < 5 / n**0.5  # ten deviations
        assert len(share.unique()) > n - 3  # of 40 bits: two alike once in 10^5 runs


def test_sessions_and_directions_have_nothing_in_common(ends: Ends) -> None:
    """Deltas differ, the same blocks hash to other pads; both ends of a direction agree on the hash."""
    blocks = np.frombuffer(bits_of(2000, width=64).numpy().tobytes(), np.uint64).reshape(-1, 2)
    deltas, pads = set(), []
    for each in (ends, Ends()):
        for sender in Role:
            sends, receives = (each.of[role]._pools[sender].hash for role in (sender, OTHER[sender]))
            assert sends is not None and receives is not None and sends.delta is not None and receives.delta is None
            assert int(sends.delta[0]) & 1
            deltas.add(sends.delta.tobytes())
            pads.append(sends.pads([blocks], 0)[:, 0, 0])
            assert np.array_equal(pads[-1], receives.pads([blocks], 0)[:, 0, 0])
    assert len(deltas) == 4 and len(np.unique(np.concatenate(pads))) == 4 * len(blocks)


def test_nothing_secret_is_shown(ends: Ends) -> None:
    for end in ends.of.values():
        held = [end, *(part for each in end._pools.values() for part in (each, each.hash, each._iknp, each._extender))]
        for part in held:
            assert re.fullmatch(r"\w+\([a-zA-Z=, ]*(stock=\d+, )?(values|secrets) hidden\)", repr(part)), repr(part)
