"""Oblivious transfer by itself: both extensions, and what stands on them, in transfers a second and bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.threads import at_both
from privinf.transport.memory import memory_pair
from protocols.correlations import Correlation, Kind, Role
from protocols.ot.iknp import IknpReceiver, IknpSender, new_delta
from protocols.ot.silent import Extender
from protocols.ot.transfers import Transfers
from protocols.ot.words import Words
from protocols.party import Online, Party, Protocol_
from protocols.ring import blank, reduce
from protocols.security import IKNP_ROWS, LPN
from protocols.sources.base import PartySource

IKNP_WORDS = 1 << 12
MOST = 4 * LPN.net


@dataclass
class Speed:
    """Of one thing: how many transfers, the seconds of each party's processor, and bytes, both directions."""

    name: str
    transfers: int
    sender_s: float
    receiver_s: float
    bytes: int
    elements: int = 0


class _Nothing(PartySource):
    """A source for what asks for no correlation."""

    def make(self, kind: Kind, name: int) -> Correlation:
        raise NotImplementedError


def _blocks(count: int) -> Words:
    return np.frombuffer(os.urandom(16 * count), np.uint64).reshape(-1, 2).copy()


def iknp() -> Speed:
    """One extension by IKNP, its base transfers left out."""
    delta, pairs = new_delta(), [(os.urandom(16), os.urandom(16)) for _ in range(IKNP_ROWS)]
    sender, receiver = IknpSender(delta, [pair[bit] for pair, bit in zip(pairs, delta.tolist(), strict=True)]), IknpReceiver(pairs)
    began = time.thread_time()
    message, _ = receiver.extend(IKNP_WORDS)
    middle = time.thread_time()
    sender.extend(message)
    return Speed("IKNP", 64 * IKNP_WORDS, time.thread_time() - middle, middle - began, message.nbytes)


def silent() -> Speed:
    """One silent extension, from a seed that is made up."""
    one, even = np.uint64(1), np.uint64(2**64 - 2)
    delta, q = _blocks(1)[0] | np.array([1, 0], np.uint64), _blocks(LPN.seed) & np.array([even, ~np.uint64(0)])
    t = q ^ (_blocks(LPN.seed)[:, :1] & one) * delta
    sender, receiver = Extender(LPN, b"", q, delta), Extender(LPN, b"", t, None)
    message, _ = sender.send()  # the first compiles
    receiver.receive(message)
    began = time.thread_time()
    message, _ = sender.send()
    middle = time.thread_time()
    receiver.receive(message)
    return Speed("silent", LPN.net, middle - began, time.thread_time() - middle, message.nbytes)


Method = Callable[[Transfers], Protocol_[Tensor]]


def _cases(n: int) -> Iterator[tuple[str, int, Method]]:
    """Name, transfers an element, and what is done with n elements; S sends."""
    words = torch.from_numpy(_blocks(-(-n // 2)).reshape(-1)[:n].view(np.int64))

    def at(end: Transfers, role: Role, x: Tensor) -> Tensor:
        return x if end.role is role else blank(*x.shape)

    def product(end: Transfers) -> Protocol_[Tensor]:
        return end.product(Role.SERVER, at(end, Role.SERVER, words), at(end, Role.CLIENT, reduce(words, 20)), 60, 20)

    def correlated(end: Transfers) -> Protocol_[Tensor]:
        return end.correlated(Role.SERVER, at(end, Role.CLIENT, words & 1), at(end, Role.SERVER, words), 24)

    def chosen(end: Transfers) -> Protocol_[Tensor]:
        table = words[:, None].expand(n, 32)
        return end.chosen(Role.SERVER, at(end, Role.CLIENT, words & 31), at(end, Role.SERVER, table), 5, 2)

    yield "product of 40 by 20 bits, modulo 2^60", 20, product
    yield "bit times 24 bits", 1, correlated
    yield "1 of 32 words of 2 bits", 5, chosen
    yield "AND of 10 bits", 20, lambda end: end.ands(words, words, 10)


def _run(programs: Mapping[Role, Protocol_[Any]]) -> tuple[dict[Role, float], int]:
    """Both in threads over the in-memory twin: the seconds of each one's processor, and bytes."""
    ends = dict(zip((Role.SERVER, Role.CLIENT), memory_pair(), strict=True))

    def walk(role: Role) -> float:
        began = time.thread_time()
        Party(role, Online(role, ends[role], _Nothing(role))).run(programs[role])
        return time.thread_time() - began

    seconds = at_both(walk, ends)
    meter = ends[Role.CLIENT].meter
    return seconds, int(meter.snapshot()[meter.phase]["payload"])


def _repeated(end: Transfers, method: Method, times: int) -> Protocol_[None]:
    for _ in range(times):
        yield from method(end)


def speeds(n: int, most: int = MOST) -> Iterator[Speed]:
    """The extensions, and each method of `Transfers` on n elements, as often as `most` transfers allow, extensions included.

    What a session keeps in stock is made before: each use then makes as many transfers as it spends, on average.
    """
    yield iknp()
    yield silent()
    for name, each, method in _cases(n):
        parties = {role: Transfers(role) for role in Role}
        _run({role: end.start() for role, end in parties.items()})
        times = max(1, most // (n * each))
        _run({role: _repeated(end, method, -(-times // 2)) for role, end in parties.items()})
        seconds, size = _run({role: _repeated(end, method, times) for role, end in parties.items()})
        yield Speed(name, times * n * each, seconds[Role.SERVER], seconds[Role.CLIENT], size, times * n)
