"""Runs a program of both ends of a lattice in one process, with products in the clear or by real transfers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protocols import security
from protocols.correlations import Part, Role, pack_parts, size_of, unpack_parts
from protocols.lattice import gauss
from protocols.lattice.hiding import Hiding
from protocols.ring import blank
from protocols.rounds import Item, Protocol_

ROLES = (Role.SERVER, Role.CLIENT)
AMOUNTS = pytest.mark.parametrize(
    ("times", "least"), [pytest.param(1, 10**6, id="a-million"), pytest.param(96, 10**8, id="a-hundred-million", marks=pytest.mark.slow)]
)
"""How often a test's products are made, and how many outputs that is at least."""


class Clear:
    """Transfers that send values in the clear; both ends have one."""

    def __init__(self, role: Role) -> None:
        self.role = role

    def trace(self) -> Clear:
        return Clear(self.role)

    def correlated(self, sender: Role, choice: Tensor, delta: Tensor, bits: int, *, xor: bool = False) -> Protocol_[Tensor]:
        return (yield from self.product(sender, delta, choice, bits, 1))

    def product(self, sender: Role, x: Tensor, y: Tensor, bits: int, y_bits: int) -> Protocol_[Tensor]:
        assert x.shape == y.shape
        server = sender is Role.SERVER
        mine = x if self.role is sender else y
        (there,) = yield [Item(x if self.role is sender else blank(*x.shape), bits, from_server=server, from_client=not server)]
        if mine.is_meta:
            return blank(*x.shape)
        if self.role is sender:
            return torch.full(x.shape, 7)
        return there * y - 7 if bits == 64 else (there * y - 7) & ((1 << bits) - 1)


@dataclass
class Run:
    """What both ends returned, and bytes and rounds by sender."""

    results: dict[Role, Any]
    sent: dict[Role, int]
    rounds: int


def make_noise_largest(monkeypatch: pytest.MonkeyPatch, hiding: Hiding, sign: int, times: int = 1) -> None:
    """What is added to outputs becomes, with this sign, so many times all noise that a budget allows for."""

    def largest(stream: Any, count: int, deviation: float) -> Any:
        units = deviation / hiding.deviation
        value = gauss.offset_of(deviation) + sign * times * int(security.TAIL * hiding.noise * units)
        return np.stack([np.full(count, value >> gauss.LIMB * i & ((1 << gauss.LIMB) - 1)) for i in range(gauss.limbs_of(deviation))])

    monkeypatch.setattr(gauss, "wide", largest)


def bits_of(items: list[Item], role: Role) -> int:
    return size_of(i.part for i in items if i.sent_by(role))


def run(make: Callable[[Role], Protocol_[Any]], tamper: Callable[[int, Role, list[Tensor]], None] | None = None) -> Run:
    """Drives both ends; every item is packed and unpacked. `tamper` may change what a role receives in a round."""
    ends = {role: make(role) for role in ROLES}
    results: dict[Role, Any] = {}
    sent, rounds = dict.fromkeys(ROLES, 0), 0
    items: dict[Role, list[Item]] = {}
    arrived: dict[Role, list[Tensor] | None] = dict.fromkeys(ROLES, None)
    while True:
        for role in ROLES:
            try:
                items[role] = next(ends[role]) if arrived[role] is None else ends[role].send(arrived[role])
            except StopIteration as stop:
                results[role] = stop.value
        if results:
            assert len(results) == 2, "one end is done, the other is not"
            return Run(results, sent, rounds)
        rounds += 1
        first, second = (items[role] for role in ROLES)
        assert [(i.part, i.from_server, i.from_client) for i in first] == [(i.part, i.from_server, i.from_client) for i in second]
        for role, peer in (ROLES, ROLES[::-1]):
            parts: list[tuple[int, Part, Tensor]] = [(k, i.part, i.value) for k, i in enumerate(items[peer]) if i.sent_by(peer)]
            body = pack_parts([v for _, _, v in parts], [p for _, p, _ in parts])
            sent[peer] += len(body)
            got = [blank(*i.value.shape) for i in items[role]]
            for (k, _, _), value in zip(parts, unpack_parts(memoryview(body), [p for _, p, _ in parts]), strict=True):
                got[k] = value
            if tamper is not None:
                tamper(rounds, role, got)
            arrived[role] = got


def trace(protocol: Protocol_[Any]) -> tuple[dict[Role, int], int, Any]:
    """Bytes by sender, rounds and the result on blanks."""
    sent, rounds = dict.fromkeys(ROLES, 0), 0
    try:
        items = next(protocol)
        while True:
            rounds += 1
            for role in ROLES:
                sent[role] += bits_of(items, role)
            items = protocol.send([blank(*i.value.shape) for i in items])
    except StopIteration as stop:
        return sent, rounds, stop.value


def drawn(generator: np.random.Generator, shape: tuple[int, ...], bits: int) -> Tensor:
    return torch.from_numpy(generator.integers(0, 1 << bits, shape, dtype=np.uint64).view(np.int64))
