"""The conversations of a gateway: those that are kept idle for a next turn, all that are open, and what moved in them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from weakref import WeakSet

from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.client.preprocessing import Shelves
from privinf.client.session import ClientSession
from privinf.client.shared import Shared
from privinf.gateway.held import Held, cells_of, spent_of
from privinf.gateway.limits import Limits
from privinf.gateway.waits import Full, Stopping
from privinf.session.memory import give_back
from privinf.session.messages import Terms
from privinf.transport.meter import PHASES, Cell
from protocols.errors import HandshakeError, PrivinfError


class Conversations:
    """`open` one, `keep` it after a reply, `follow` from one that is kept, `retire` it. Safe in threads."""

    def __init__(self, client: Client, limits: Limits) -> None:
        self._client, self._limits = client, limits
        self._guard = threading.Lock()
        self._idle: list[Held] = []  # the one that was used last at the end
        self._live: set[Held] = set()
        self._totals = {(peer, phase): Cell() for peer in ("server", "dealer") for phase in PHASES}
        self._spent = 0
        self._counted: WeakSet[ClientSession] = WeakSet()  # of those that were shared, the ones that the totals have
        self._shared = Shared(client, limits.batch, self._count)
        self._joins = False
        """Whether conversations may be in one session."""
        self._shelves: Shelves | None = None
        self.closing = False
        """Whether no further one is opened."""

    @property
    def idle(self) -> tuple[Held, ...]:
        """Those that are kept, the one that was used last at the end."""
        return tuple(self._idle)

    @property
    def live(self) -> tuple[Held, ...]:
        """All that are open."""
        return tuple(self._live)

    def open(self, begun: Callable[[Held], None], connect_s: float | None, again_s: int, *, alone: bool) -> Held:
        """A new one; where the server is full, room is made by what we keep ourselves, or else Full says to come again in `again_s`.

        `begun` gets it before it connects, when it can be closed already. Unless `alone` it joins a session of others, if it can.
        """
        while True:
            if self.closing:
                raise Stopping
            begun(held := Held(Conversation(self._client) if alone or not self._joins else self._shared.seat()))
            try:
                held.conversation.open(connect_s)
                self._learn(held.conversation.session)
                break
            except HandshakeError as error:
                again = error.again(again_s)
                if again is None:
                    raise
                with self._guard:
                    oldest = self._idle.pop(0) if self._idle else None
                if oldest is None:
                    raise Full(error.message, again) from error
                self.retire(oldest)
        with self._guard:
            self._live.add(held)
        return held

    def _learn(self, session: ClientSession) -> None:
        """What the next ones may do, by what this one's server has said."""
        self._joins = min(self._limits.batch, session.most) > 1 and session.lone is None
        self._shelves = session.preprocessing.shelves

    def prepared(self, terms: Terms) -> bool:
        """Whether a query was prepared that will do for these terms, which a conversation takes that is alone in its session."""
        return self._limits.prepared and self._shelves is not None and self._shelves.have(terms)

    def follow(
        self, ids: list[int], text: str | None, encode: Callable[[str], list[int] | None], *, begun: bool = True
    ) -> tuple[Held, tuple[int, list[int], bool]] | None:
        """The idle one from which a prompt goes on furthest, which is then no longer kept; unless `begun`, one that is empty.

        The tokenizer may take its time, so nobody waits for it: whoever was used meanwhile is passed over.
        """
        with self._guard:
            idle = [(held, held.conversation.used) for held in self._idle if held.conversation.usable]
        idle = [(held, used) for held, used in idle if begun or not held.conversation.ids]
        matches = [(held, used, found) for held, used in idle if (found := held.follow(ids, text, encode))]
        for held, used, found in sorted(matches, key=lambda match: -match[2][0]):
            with self._guard:
                if held in self._idle and held.conversation.used == used:
                    self._idle.remove(held)
                    return held, found
        return None

    def begin_with(self, held: Held) -> None:
        """The one in which the model was read, which the first query uses, however few are kept."""
        with self._guard:
            self._idle.append(held)

    def keep(self, held: Held) -> None:
        """For a next turn, if it can have one; the one that lay longest goes where there are too many."""
        if not held.conversation.usable or held.conversation.room <= 1 or not self._limits.kept:
            self.retire(held)
            return
        with self._guard:
            self._idle.append(held)
            surplus = self._idle[: max(0, len(self._idle) - self._limits.kept)]
            del self._idle[: len(surplus)]
        for old in surplus:
            self.retire(old)

    def retire(self, held: Held) -> None:
        """Ends a conversation, and keeps its counters; may be called again."""
        with contextlib.suppress(PrivinfError):
            held.conversation.end()
        with self._guard:
            if held in self._live:
                self._live.discard(held)
                self._add(held.cells(), held.spent)
        give_back()

    def _add(self, cells: Mapping[tuple[str, str], Cell], spent: int) -> None:
        for place, cell in cells.items():
            self._totals[place].add(cell)
        self._spent += spent

    def _count(self, session: ClientSession) -> None:
        """A session that conversations have shared is over."""
        with self._guard:
            self._add(cells_of(session), spent_of(session))
            self._counted.add(session)

    @property
    def _sessions(self) -> list[ClientSession]:
        """Those that are shared, but for what the totals have."""
        return [each for each in self._shared.sessions if each not in self._counted]

    def expired(self) -> list[Held]:
        """Those that nobody has used for as long as they are kept; they are no longer."""
        with self._guard:
            old = [held for held in self._idle if time.monotonic() - held.conversation.used > self._limits.keep_s]
            self._idle = [held for held in self._idle if held not in old]
        return old

    def close(self) -> None:
        """Ends those that are kept; no further one is opened."""
        with self._guard:
            self.closing = True
            idle, self._idle = self._idle, []
        for held in idle:
            self.retire(held)

    def cells(self) -> Mapping[tuple[str, str], Cell]:
        """What moved so far, by peer and phase."""
        result = {place: Cell() for place in self._totals}
        with self._guard:
            parts = [self._totals, *(held.cells() for held in self._live), *(cells_of(session) for session in self._sessions)]
        for part in parts:
            for place, cell in part.items():
                result[place].add(cell)
        return result

    def spent(self) -> int:
        """Correlations that were used, each once."""
        with self._guard:
            return self._spent + sum(held.spent for held in self._live) + sum(spent_of(session) for session in self._sessions)
