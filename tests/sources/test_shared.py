"""The toolbox over shared secrets against plain integers, at both parties and for what a trace says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from protocols.correlations import Correlation, Kind, Role
from protocols.party import Online, Party, Trace
from protocols.ring import reduce
from protocols.rounds import Protocol_
from protocols.sources.base import PartySource
from protocols.sources.two_party import shared
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.schedule import BatchedLattice
from protocols.sources.two_party.sketch import sketch
from tests.support.alone import both
from tests.support.plain_lattice import PlainLattice
from tests.support.plain_transfers import PlainTransfers
from tests.support.two_party import uniform

COUNT = 200


def pair_of(role: Role, traced: bool = False) -> Pair:
    return Pair(role, PlainTransfers(role, traced), BatchedLattice(PlainLattice(role, traced=traced)), {}, traced=traced)


def split(x: Tensor, bits: int, xor: bool = False) -> dict[Role, Secret]:
    """Shares of ring elements; one party's are uniform."""
    share = reduce(uniform(*x.shape), bits)
    rest = x ^ share if xor else reduce(x - share, bits)
    return {Role.SERVER: Secret(share, bits, xor), Role.CLIENT: Secret(rest, bits, xor)}


class Empty(PartySource):
    """Of nothing: no correlation is asked for."""

    def make(self, kind: Kind, name: int) -> Correlation:
        raise AssertionError(kind)


def opened(tool: Callable[..., Protocol_[Secret]], *secrets: dict[Role, Secret]) -> Tensor:
    """What both parties' results come to; as many bytes and rounds as on shapes."""

    def program(role: Role, channel: Any) -> Secret:
        return Party(role, Online(role, channel, Empty(role))).run(tool(pair_of(role), *(secret[role] for secret in secrets)))

    found, counted = both(program)
    trace = Trace(Role.CLIENT)
    blanks = [Secret(sketch(secret[Role.SERVER].shape), secret[Role.SERVER].bits, secret[Role.SERVER].xor) for secret in secrets]
    Party(Role.CLIENT, trace).run(tool(pair_of(Role.CLIENT, True), *blanks))
    assert (counted["payload"], counted["rounds"]) == (trace.cost.online_bytes, trace.cost.rounds)
    one, other = found[Role.SERVER], found[Role.CLIENT]
    assert (one.bits, one.xor) == (other.bits, other.xor)
    value = reduce(one.value, one.bits), reduce(other.value, one.bits)
    return value[0] ^ value[1] if one.xor else reduce(value[0] + value[1], one.bits)


def numbers(bits: int, *shape: int) -> Tensor:
    """Uniform, with the ends and long carries among them."""
    x = reduce(uniform(*(shape or (COUNT,))), bits)
    x.view(-1)[:3] = torch.tensor([0, -1, 1])
    return reduce(x, bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 10, 13, 14, 20, 33, 43, 62])
def test_bits_of_a_sum(bits: int) -> None:
    x = numbers(bits)
    shares = split(x, bits)
    shares[Role.SERVER].value[3:6], shares[Role.CLIENT].value[3:6] = 1, -1 % (1 << bits)  # a carry through all bits
    x[3:6] = 0
    assert torch.equal(opened(lambda pair, s: shared.bits_of_sum(pair, s, bits), shares), x)


@pytest.mark.parametrize("bits", [1, 2, 11, 12, 13, 16, 31, 62])
def test_a_carry(bits: int) -> None:
    parts = {role: Secret(numbers(bits), 63) for role in Role}
    expected = (parts[Role.SERVER].value + parts[Role.CLIENT].value) >> bits
    assert torch.equal(opened(lambda pair, s: shared.carry(pair, s.value, bits), parts), expected)


@pytest.mark.parametrize("width", [1, 2, 5, 6, 7, 9])
@pytest.mark.parametrize("at", [0, 3])
def test_a_one_hot(width: int, at: int) -> None:
    index = numbers(width + at, 70)
    found = opened(lambda pair, s: shared.one_hot(pair, s, width, at), split(index, width + at, xor=True))
    place = index >> at
    if width <= 6:
        assert torch.equal(found, reduce(torch.ones_like(place) << place, 1 << width))
    else:
        words = torch.arange(1 << width - 6)
        assert torch.equal(found, (words == (place >> 6)[:, None]) * (torch.ones_like(place) << (place & 63))[:, None])


@pytest.mark.parametrize("bits", [1, 2, 33, 64])
def test_bits_and_values(bits: int) -> None:
    b, x, y = numbers(1), numbers(bits), numbers(bits)
    bit = split(b, 1, xor=True)
    assert torch.equal(opened(lambda pair, s: shared.bit_to_arithmetic(pair, s, bits), bit), b)
    assert torch.equal(opened(lambda pair, s, v: shared.select(pair, s, v, bits), bit, split(x, bits)), b * x)
    assert torch.equal(opened(lambda pair, u, v: shared.product(pair, u, v, bits), split(x, bits), split(y, bits)), reduce(x * y, bits))
    assert torch.equal(opened(shared.select_words, bit, split(x, bits, xor=True)), b * x)
    assert torch.equal(opened(shared.and_, split(x, bits, xor=True), split(y, bits, xor=True)), x & y)


@pytest.mark.parametrize(("bits", "shift", "to"), [(21, 11, 10), (21, 0, 21), (40, 17, 8), (64, 20, 30)])
def test_upper_bits(bits: int, shift: int, to: int) -> None:
    x = numbers(min(bits, 63))
    assert torch.equal(opened(lambda pair, s: shared.upper(pair, s, shift, to), split(x, bits)), reduce(x >> shift, to))
