"""One direction's random correlated transfers: what is left of the last extension, and the next one when it is not enough.

Each direction has its own delta, base transfers and session; nothing of it outlives the object. How many are made, and when, follows from
the counts asked for alone, so that both ends and a trace do the same: programs that run side by side and find too few say what
they want first (a round without a message), and one extension then serves all of them.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from protocols.correlations import Role
from protocols.ot.base import POINT_WORDS, BaseSender, choose, session_of
from protocols.ot.iknp import IknpReceiver, IknpSender, new_delta
from protocols.ot.pads import Hash
from protocols.ot.words import Words, tensor_of, words_of
from protocols.ring import blank
from protocols.rounds import Item, Protocol_
from protocols.security import IKNP_ROWS

_EMPTY = np.empty((0, 2), np.uint64)


class Taken(NamedTuple):
    """Transfers that are spent with this: their blocks (n, 2), none in a trace, and the number of the first."""

    blocks: Words
    first: int


class _Keys(NamedTuple):
    """What makes pads of transfers; delta is zero at the receiver."""

    delta: Words
    hash: Hash


class Pool:
    """One end of the direction in which `sender` holds delta."""

    def __init__(self, role: Role, sender: Role, traced: bool) -> None:
        self.sender, self.sends, self._role, self._traced = sender, role is sender, role, traced
        self.receiver = Role.CLIENT if sender is Role.SERVER else Role.SERVER
        self._keys = _Keys(np.zeros(2, np.uint64), Hash(b""))
        self._iknp: IknpSender | IknpReceiver | None = None
        self._chunks: deque[Words] = deque()
        self._stock = self._wanted = self._spent = 0
        self._busy = False

    def __repr__(self) -> str:
        return f"Pool(sender={self.sender.value}, stock={self._stock}, values hidden)"

    def trace(self) -> Pool:
        """The same counts, without values."""
        pool = Pool(self._role, self.sender, True)
        pool._stock, pool._spent = self._stock, self._spent
        return pool

    def item(self, by: Role, words: Words | None, *shape: int) -> Item:
        """Words that one party sends."""
        value = blank(*shape) if words is None else tensor_of(words)
        return Item(value, 64, from_server=by is Role.SERVER, from_client=by is Role.CLIENT)

    def start(self) -> Protocol_[None]:
        """Base transfers: two messages."""
        context, party = self.sender.value.encode(), self._role.value
        base = None if self._traced or self.sends else BaseSender(context, party)
        (first,) = yield [self.item(self.receiver, base.first() if base else None, POINT_WORDS)]
        points, bits = None, new_delta()
        if self.sends and not self._traced:
            points, keys = choose(context, party, words_of(first), bits)
            self._iknp = IknpSender(bits, keys)
            self._keys = _Keys(np.packbits(bits, bitorder="little").view(np.uint64), Hash(session_of(context, words_of(first), points)))
        (answer,) = yield [self.item(self.sender, points, IKNP_ROWS, POINT_WORDS)]
        if base is not None:
            self._iknp = IknpReceiver(base.keys(words_of(answer)))
            self._keys = self._keys._replace(hash=Hash(session_of(context, base.first(), words_of(answer))))

    def take(self, count: int) -> Protocol_[Taken]:
        """The next `count` transfers, which nobody gets again; a message where there are too few."""
        if self._stock < self._wanted + count:
            self._wanted += count
            yield []  # others that run beside this one say what they want
            while self._stock < self._wanted:
                if self._busy:
                    yield []
                    continue
                self._busy = True
                yield from self._extend(self._wanted - self._stock)
                self._busy = False
            self._wanted -= count
        first = self._spent
        self._spent += count
        self._stock -= count
        return Taken(self._read(count), first)

    def _extend(self, count: int) -> Protocol_[None]:
        words = -(-count // 64)
        message = None
        if isinstance(self._iknp, IknpReceiver):
            message, blocks = self._iknp.extend(words)
            self._chunks.append(blocks)
        (u,) = yield [self.item(self.receiver, message, IKNP_ROWS, words)]
        if isinstance(self._iknp, IknpSender):
            self._chunks.append(self._iknp.extend(words_of(u)))
        self._stock += 64 * words

    def _read(self, count: int) -> Words:
        if self._traced or not count:
            return _EMPTY
        parts: list[Words] = []
        while count:
            chunk = self._chunks.popleft()
            if len(chunk) > count:
                self._chunks.appendleft(chunk[count:])
            parts.append(chunk[:count])
            count -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def pads(self, taken: Taken, words: int = 1) -> Words:
        """(2, n, words) at the sender, (1, n, words) at the receiver; without the last axis for one word."""
        sides = [taken.blocks, taken.blocks ^ self._keys.delta] if self.sends else [taken.blocks]
        found = np.stack([self._keys.hash.pads(side, taken.first, words) for side in sides])
        return found[..., 0] if words == 1 else found
