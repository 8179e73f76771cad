"""One direction's random correlated transfers: what is left of the last extension, and the next one when it is not enough.

Each direction has its own delta, base transfers and session; nothing of it outlives the object. How many are made, and when, follows from
the counts asked for alone, so that both ends and a trace do the same. Silent extensions travel ahead of their need, with other
messages of their sender (`carrying`), so that few wait for one. Where too few are there, programs that run side by side say what they want
first (a round without a message), and one extension then serves all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
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
from protocols.rounds import Item, Protocol_, Received, parallel
from protocols.security import AHEAD, IKNP_ROWS, LPN, SMALL, SMALL_IN_ALL

TIMES = 2
"""The largest need so far, as often, is kept in stock: several programs ask in one step."""

MESSAGES = 8
"""Of several silent extensions at most: the receiver expands one while the sender makes the next, and none waits for an answer."""

_EMPTY = np.empty((0, 2), np.uint64)


Sink = Callable[[int, int, Words], bool]
"""Is given transfers as they are read: their first one's number less its place, its place among those asked for, their blocks (n, 2).

Others may have some in between, so that the first figure can change. True if the blocks will be given back later: they are not read
after they are given back.
"""


class Message(NamedTuple):
    """One of a silent extension that was not expanded yet, (t, h, 2)."""

    words: Words


@dataclass(frozen=True, eq=False)
class Extending(Item):
    """A message that makes transfers, for whoever uses them."""


@dataclass
class _Counts:
    """What both ends and a trace count.

    Transfers that are there, under way, asked for, spent; made by IKNP for small needs; and asked for at once, at most.
    """

    stock: int = 0
    coming: int = 0
    wanted: int = 0
    spent: int = 0
    small: int = 0
    largest: int = 0


def carrying(items: list[Item], *pools: Pool) -> Protocol_[Received]:
    """One round of these items, with what the pools' senders, who send some of them, send ahead."""
    received, *_ = yield from parallel(_round(items), *(pool.ahead() for pool in pools))
    return received  # type: ignore[no-any-return]


def _round(items: list[Item]) -> Protocol_[Received]:
    return (yield items)


class Pool:
    """One end of the direction in which `sender` holds delta."""

    def __init__(self, role: Role, sender: Role, traced: bool) -> None:
        self.sender, self.sends, self._role, self._traced = sender, role is sender, role, traced
        self.receiver = Role.CLIENT if sender is Role.SERVER else Role.SERVER
        self._iknp: IknpSender | IknpReceiver | None = None
        self.hash: Hash | None = None  # None in a trace
        self._extender: Extender | None = None
        self._chunks: deque[Words | Message] = deque()
        self._counts = _Counts()
        self._busy = False

    def __repr__(self) -> str:
        return f"Pool(sender={self.sender.value}, stock={self._counts.stock}, values hidden)"

    @property
    def spent(self) -> int:
        """Transfers that were used."""
        return self._counts.spent

    def trace(self) -> Pool:
        """The same counts, without values."""
        pool = Pool(self._role, self.sender, True)
        pool._counts = replace(self._counts)
        return pool

    def item(self, by: Role, words: Words | None, *shape: int, sort: type[Item] = Item) -> Item:
        """Words that one party sends."""
        value = blank(*shape) if words is None else tensor_of(words)
        return sort(value, 64, from_server=by is Role.SERVER, from_client=by is Role.CLIENT)

    def start(self) -> Protocol_[None]:
        """Base transfers, two messages; and what seeds the silent extension, one."""
        context, party = self.sender.value.encode(), self._role.value
        base = None if self._traced or self.sends else BaseSender(context, party)
        (first,) = yield [self.item(self.receiver, base.first() if base else None, POINT_WORDS)]
        points, session = None, b""
        if self.sends and not self._traced:
            bits = new_delta()
            points, keys = choose(context, party, words_of(first), bits)
            self._iknp, session = IknpSender(bits, keys), session_of(context, words_of(first), points)
            self.hash = Hash(session, np.packbits(bits, bitorder="little").view(np.uint64))
        (answer,) = yield [self.item(self.sender, points, IKNP_ROWS, POINT_WORDS)]
        if base is not None:
            self._iknp, session = IknpReceiver(base.keys(words_of(answer))), session_of(context, base.first(), words_of(answer))
            self.hash = Hash(session, None)
        seed = yield from self._small(LPN.seed)
        if self.hash is not None:
            self._extender = Extender(LPN, session, seed[: LPN.seed], self.hash.delta)

    def take(self, count: int, sink: Sink) -> Protocol_[None]:
        """The next `count` transfers go to `sink`, and nobody gets them again; messages where there are too few.

        What `sink` holds beyond its return it says by returning True, and gives back by `give_back`.
        """
        counts, done = self._counts, 0
        counts.largest = max(counts.largest, count)
        if counts.stock < counts.wanted + count:
            counts.wanted += count
            yield []  # others that run beside this one say what they want
            while done < count and counts.stock < counts.wanted:
                if self._busy or counts.stock + counts.coming >= counts.wanted:
                    yield []
                    continue
                self._busy = True
                for extension in self._extensions(counts.wanted - counts.stock - counts.coming):
                    made = yield from extension  # by itself: what others spend meanwhile must not be lost
                    counts.stock += made
                    ready = min(counts.stock, count - done)  # used while the sender makes more
                    counts.wanted -= ready
                    self._spend(done, ready, sink)
                    done += ready
                self._busy = False
            counts.wanted -= count - done
        self._spend(done, count - done, sink)

    def _extensions(self, count: int) -> Iterator[Protocol_[int]]:
        """What makes at least so many more, a message each, from one party; how many, and of which sort, follows from the counts so far."""
        counts = self._counts
        if count <= SMALL and counts.small + count <= SMALL_IN_ALL:
            counts.small += count
            yield self._few(count)
            return
        left = -(-count // LPN.net)
        most = -(-left // MESSAGES)
        while left:
            yield self._silent(min(left, most))
            left -= min(left, most)

    def _few(self, count: int) -> Protocol_[int]:
        """By IKNP; gives how many."""
        blocks = yield from self._small(count)
        self._chunks.append(blocks)
        return 64 * -(-count // 64)

    def _small(self, count: int) -> Protocol_[Words]:
        """At least `count` blocks by one message from the receiver, in multiples of 64."""
        words = -(-count // 64)
        message, blocks = None, _EMPTY
        if isinstance(self._iknp, IknpReceiver):
            message, blocks = self._iknp.extend(words)
        (u,) = yield [self.item(self.receiver, message, IKNP_ROWS, words, sort=Extending)]
        if isinstance(self._iknp, IknpSender):
            blocks = self._iknp.extend(words_of(u))
        return blocks

    def _silent(self, times: int) -> Protocol_[int]:
        """Silent extensions by one message from the sender; the receiver expands each when it is read. Gives how many transfers."""
        message, made = None, []
        if self.sends and self._extender is not None:
            message = np.empty((times, LPN.trees, LPN.height, 2), np.uint64)
            for at in range(times):
                message[at], blocks = self._extender.send()
                made.append(blocks)
        (arrived,) = yield [self.item(self.sender, message, times, LPN.trees, LPN.height, 2, sort=Extending)]
        # both ends note them now: of several under way, those begun first come first
        if self.sends:
            self._chunks.extend(made)
        elif self._extender is not None:
            self._chunks.extend(Message(each) for each in words_of(arrived))
        return times * LPN.net

    def ahead(self) -> Protocol_[None]:
        """One round, of this pool's sender alone if anybody's: what keeps in stock a few times the largest need so far, up to `AHEAD`."""
        counts = self._counts
        target = min(counts.spent, TIMES * counts.largest, AHEAD) if counts.spent > SMALL_IN_ALL else 0
        times = max(0, -(-(target - counts.stock - counts.coming) // LPN.net))
        if not times:
            yield []
            return
        counts.coming += times * LPN.net
        made = yield from self._silent(times)
        counts.coming -= made
        counts.stock += made

    def _spend(self, done: int, count: int, sink: Sink) -> None:
        """The next transfers to one who has had `done` before."""
        counts = self._counts
        first = counts.spent - done
        counts.spent += count
        counts.stock -= count
        at, stop = done, 0 if self._traced else done + count
        while at < stop:
            chunk = self._chunks.popleft()
            if isinstance(chunk, Message):
                assert self._extender is not None
                chunk = self._extender.receive(chunk.words)
            if len(chunk) > stop - at:
                self._chunks.appendleft(chunk[stop - at :])
                chunk = chunk[: stop - at]
            if not sink(first, at, chunk):
                self.give_back(chunk)
            at += len(chunk)

    def give_back(self, blocks: Words) -> None:
        """Nobody reads them again."""
        if self._extender is not None:
            self._extender.memory.give_back(blocks)
