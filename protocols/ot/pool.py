"""One direction's random correlated transfers: what is left of the last extension, and the next one when it is not enough.

Each direction has its own delta, base transfers and session; nothing of it outlives the object. How many are made, and when, follows from
the counts asked for alone, so that both ends and a trace do the same: programs that run side by side and find too few say what
they want first (a round without a message), and one extension then serves all of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from protocols.correlations import Role
from protocols.ot.base import POINT_WORDS, BaseSender, choose, session_of
from protocols.ot.iknp import IknpReceiver, IknpSender, new_delta
from protocols.ot.pads import Hash
from protocols.ot.silent import Extender
from protocols.ot.words import Words, tensor_of, words_of
from protocols.ring import blank
from protocols.rounds import Item, Protocol_
from protocols.security import IKNP_ROWS, LPN, SMALL, SMALL_IN_ALL

_EMPTY = np.empty((0, 2), np.uint64)


class Taken(NamedTuple):
    """Transfers that are spent with this: their blocks (n, 2), none in a trace, and the number of the first."""

    blocks: Words
    first: int


class Message(NamedTuple):
    """One of a silent extension that was not expanded yet, (t, h, 2)."""

    words: Words


@dataclass
class _Counts:
    """What both ends and a trace count: transfers that are there, asked for, spent, and made by IKNP for small needs."""

    stock: int = 0
    wanted: int = 0
    spent: int = 0
    small: int = 0


class _Keys(NamedTuple):
    """What makes transfers, and pads of them; delta is None at the receiver."""

    iknp: IknpSender | IknpReceiver
    delta: Words | None
    session: bytes


class Pool:
    """One end of the direction in which `sender` holds delta."""

    def __init__(self, role: Role, sender: Role, traced: bool) -> None:
        self.sender, self.sends, self._role, self._traced = sender, role is sender, role, traced
        self.receiver = Role.CLIENT if sender is Role.SERVER else Role.SERVER
        self._keys: _Keys | None = None
        self._extender: Extender | None = None
        self._chunks: deque[Words | Message] = deque()
        self._counts = _Counts()
        self._busy = False

    def __repr__(self) -> str:
        return f"Pool(sender={self.sender.value}, stock={self._counts.stock}, values hidden)"

    def trace(self) -> Pool:
        """The same counts, without values."""
        pool = Pool(self._role, self.sender, True)
        pool._counts = replace(self._counts)
        return pool

    def item(self, by: Role, words: Words | None, *shape: int) -> Item:
        """Words that one party sends."""
        value = blank(*shape) if words is None else tensor_of(words)
        return Item(value, 64, from_server=by is Role.SERVER, from_client=by is Role.CLIENT)

    def start(self) -> Protocol_[None]:
        """Base transfers, two messages; and what seeds the silent extension, one."""
        context, party = self.sender.value.encode(), self._role.value
        base = None if self._traced or self.sends else BaseSender(context, party)
        (first,) = yield [self.item(self.receiver, base.first() if base else None, POINT_WORDS)]
        points = None
        if self.sends and not self._traced:
            bits = new_delta()
            points, keys = choose(context, party, words_of(first), bits)
            delta = np.packbits(bits, bitorder="little").view(np.uint64)
            self._keys = _Keys(IknpSender(bits, keys), delta, session_of(context, words_of(first), points))
        (answer,) = yield [self.item(self.sender, points, IKNP_ROWS, POINT_WORDS)]
        if base is not None:
            self._keys = _Keys(IknpReceiver(base.keys(words_of(answer))), None, session_of(context, base.first(), words_of(answer)))
        seed = yield from self._iknp(LPN.seed)
        if self._keys is not None:
            self._extender = Extender(LPN, self._keys.session, seed[: LPN.seed], self._keys.delta)

    def take(self, count: int) -> Protocol_[Taken]:
        """The next `count` transfers, which nobody gets again; a message where there are too few."""
        counts = self._counts
        if counts.stock < counts.wanted + count:
            counts.wanted += count
            yield []  # others that run beside this one say what they want
            while counts.stock < counts.wanted:
                if self._busy:
                    yield []
                    continue
                self._busy = True
                yield from self._extend(counts.wanted - counts.stock)
                self._busy = False
            counts.wanted -= count
        first = counts.spent
        counts.spent += count
        counts.stock -= count
        return Taken(self._read(count), first)

    def _iknp(self, count: int) -> Protocol_[Words]:
        """At least `count` blocks by one message from the receiver, in multiples of 64."""
        words = -(-count // 64)
        message, blocks = None, _EMPTY
        if self._keys is not None and isinstance(self._keys.iknp, IknpReceiver):
            message, blocks = self._keys.iknp.extend(words)
        (u,) = yield [self.item(self.receiver, message, IKNP_ROWS, words)]
        if self._keys is not None and isinstance(self._keys.iknp, IknpSender):
            blocks = self._keys.iknp.extend(words_of(u))
        return blocks

    def _extend(self, count: int) -> Protocol_[None]:
        """By one message; which, and how many transfers it makes, follows from the counts so far."""
        counts = self._counts
        if count <= SMALL and counts.small + count <= SMALL_IN_ALL:
            blocks = yield from self._iknp(count)
            self._chunks.append(blocks)
            made = 64 * -(-count // 64)
            counts.small += made
        else:
            times = -(-count // LPN.net)
            yield from self._silent(times)
            made = times * LPN.net
        counts.stock += made

    def _silent(self, times: int) -> Protocol_[None]:
        """Several silent extensions by one message from the sender; the receiver expands each when it is read."""
        message = None
        if self.sends and self._extender is not None:
            message = np.empty((times, LPN.trees, LPN.height, 2), np.uint64)
            for at in range(times):
                message[at], blocks = self._extender.send()
                self._chunks.append(blocks)
        (arrived,) = yield [self.item(self.sender, message, times, LPN.trees, LPN.height, 2)]
        if not self.sends and self._extender is not None:
            self._chunks.extend(Message(each) for each in words_of(arrived))

    def _read(self, count: int) -> Words:
        if self._traced or not count:
            return _EMPTY
        parts: list[Words] = []
        while count:
            chunk = self._chunks.popleft()
            if isinstance(chunk, Message):
                assert self._extender is not None
                chunk = self._extender.receive(chunk.words)
            if len(chunk) > count:
                self._chunks.appendleft(chunk[count:])
            parts.append(chunk[:count])
            count -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def pads(self, taken: Taken, words: int = 1) -> Words:
        """(2, n, words) at the sender, (1, n, words) at the receiver; without the last axis for one word."""
        assert self._keys is not None
        sides = [taken.blocks] if self._keys.delta is None else [taken.blocks, taken.blocks ^ self._keys.delta]
        hashed = Hash(self._keys.session)
        found = np.stack([hashed.pads(side, taken.first, words) for side in sides])
        return found[..., 0] if words == 1 else found
