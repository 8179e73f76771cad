"""Replies that are made together over one session: each pass goes on with all of them, so that its rounds and most of its work are one's.

A sequence comes in at the next pass with its prompt, beside the others' tokens, and leaves between two passes; the others go on. What the
peers see of it is what they see of a session of its own: lengths, and how they come together.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from privinf.client.reply import Reply
from privinf.client.session import ClientSession, Timing
from privinf.client.text import Token
from privinf.session.messages import Terms
from protocols.errors import ConfigError


class Made(NamedTuple):
    """What a pass made for one sequence: a token of its reply, if it was not padding, and whether the reply has come to its end.

    Or what is wrong with what was asked for, a form that no token goes on with say: then the reply is over, and the others' are not.
    """

    member: Member
    token: Token | None
    ended: bool
    error: ConfigError | None = None


class Member:
    """One sequence of a batch, and the reply that is made in it, if one is. Its batch alone changes it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.cached = 0  # positions that passes have taken in
        self.reply: Reply | None = None
        self.pending: list[int] = []  # ids that the next pass takes in
        self.left = 0  # tokens of the reply still to come, at most
        self.padding = 0  # passes that pad the reply still to come
        self.room = 0  # for new tokens, from the reply's first on
        self.terms: Terms | None = None
        self.scored = False  # the next pass has logits of each of its new positions
        self.dropped = False

    def __repr__(self) -> str:
        return f"Member({self.number}, {self.cached} positions, hidden)"


class Batch:
    """`join` a sequence, `ask` for a reply in it, then `step` from one thread until the reply has ended; `drop` it from any."""

    def __init__(self, session: ClientSession) -> None:
        self.session = session
        self.steps = 0
        self._members: dict[int, Member] = {}
        self._leaving: list[Member] = []  # what of them is cached, the next pass forgets
        self._numbers = 0
        self._guard = threading.Lock()

    @property
    def size(self) -> int:
        """Sequences that are in it."""
        return len(self._members)

    @property
    def full(self) -> bool:
        """Whether the server takes no further one; where the model takes one sequence alone, there is never a second."""
        return len(self._members) >= self.session.most or (self._numbers > 0 and self.session.lone is not None)

    @property
    def running(self) -> bool:
        """Whether a reply is being made."""
        with self._guard:
            return any(member.reply is not None for member in self._members.values())

    def join(self) -> Member:
        """A sequence of its own, empty."""
        with self._guard:
            member = self._members[self._numbers] = Member(self._numbers)
            self._numbers += 1
        return member

    def ask(self, member: Member, reply: Reply, ids: Sequence[int], after: int = 0) -> None:
        """Begins a reply after what the sequence has and these ids, or goes on with one that broke; see `Reply.generate`."""
        reply.begin(self.session)
        filled, terms, room = reply.placed(self.session, ids, after, member.cached)
        reply.shown = terms.seq, 0
        with self._guard:
            member.pending, member.terms, member.room, member.scored = filled, terms, room, reply.scored
            member.left = min(reply.wanted.max_new_tokens - len(reply.tokens), terms.tokens)
            member.reply = reply

    def drop(self, member: Member) -> None:
        """The sequence leaves at the next pass, whatever it is about; may be called again."""
        with self._guard:
            if not member.dropped:
                member.dropped, member.reply = True, None
                self._members.pop(member.number, None)
                self._leaving.append(member)

    def step(self) -> list[Made]:
        """One pass over all replies that are being made, and before it the pieces of long prompts (`chunk`); what it made.

        Prompts that are scored have a pass of their own, for of each of their positions there are logits. PrivinfError where the session
        has broken, and with it all of them.
        """
        with self._guard:
            going = [(member, member.reply) for member in self._members.values() if member.reply is not None]
            if not going:
                return []
            ended, self._leaving = [member.number for member in self._leaving if member.cached], []
        made: list[Made] = []
        for every in (True, False):
            part = [(member, reply) for member, reply in going if member.scored == every]
            if part:
                made += self._scored(part, ended) if every else self._advanced(part, ended)
                ended = []
        return made

    def _advanced(self, going: Sequence[tuple[Member, Reply]], ended: list[int]) -> list[Made]:
        timing, ended = self._chunks([member for member, _ in going], ended)
        logits = any(reply.wanted.revealed for _, reply in going)
        out = self.session.step([(member.number, member.pending) for member, _ in going], timing, ended=ended, logits=logits)
        assert out is not None
        self.steps += 1
        made = []
        for (member, reply), row in zip(going, out, strict=True):
            member.cached += len(member.pending)
            _add(reply.timing, timing)
            made.append(self._taken(member, reply, row, logits))
        return made

    def _scored(self, going: Sequence[tuple[Member, Reply]], ended: list[int]) -> list[Made]:
        """A pass, or one for each piece, with logits of every position of these prompts."""
        timing, rows = Timing(), dict[Member, list[Tensor]]()
        size = self.session.options.chunk or max(len(member.pending) for member, _ in going)
        taken = {member: list(member.pending) for member, _ in going}
        while left := [member for member in taken if taken[member]]:
            new = [(member.number, taken[member][:size]) for member in left]
            out = self.session.step(new, timing, ended=ended, logits=True, every=True)
            assert out is not None
            self.steps, ended = self.steps + 1, []
            for member, part in zip(left, torch.split(out, [len(ids) for _, ids in new]), strict=True):
                rows.setdefault(member, []).append(part)
                member.cached += len(part)
                taken[member] = taken[member][size:]
            if any(taken.values()):  # no token comes of it
                timing.unshown_s += timing.tokens_s.pop()
        made = []
        for member, reply in going:
            member.scored = False
            _add(reply.timing, timing)
            made.append(self._taken(member, reply, reply.score(member.pending, rows[member]), True))
        return made

    def _chunks(self, going: Sequence[Member], ended: list[int]) -> tuple[Timing, list[int]]:
        """Takes in what is longer than a piece, all but the last piece of it; the time, and what is still to be forgotten."""
        timing, size = Timing(), self.session.options.chunk
        while size and (long := [member for member in going if len(member.pending) > size]):
            self.session.step([(each.number, each.pending[:size]) for each in long], timing, ended=ended, output=False)
            ended = []
            for member in long:
                member.cached += size
                member.pending = member.pending[size:]
        return timing, ended

    def _taken(self, member: Member, reply: Reply, out: Tensor, logits: bool) -> Made:
        """What an output means for its reply."""
        reply.shown = reply.shown[0], reply.shown[1] + 1
        token = None
        if member.left:
            member.left -= 1
            try:
                token = reply.choose(self.session, out, member.left, revealed=logits)
            except ConfigError as error:
                with self._guard:
                    member.reply = None
                return Made(member, None, True, error)
            if reply.whole:
                member.left, member.padding = 0, reply.padding(self.session, member.room)
        else:
            member.padding -= 1
            reply.timing.padding_s += reply.timing.tokens_s.pop()
        member.pending = [reply.tokens[-1]]
        over = not member.left and not member.padding
        if over:
            with self._guard:
                member.reply = None
        return Made(member, token, over)


def _add(to: Timing, found: Timing) -> None:
    """What a pass took, to each of those that it was for."""
    to.setup_s += found.setup_s
    to.offline_s += found.offline_s
    to.tokens_s += found.tokens_s
