"""Conversations of many callers over one session: whoever asks joins the others' next pass, and leaves between two passes.

The callers are one client to the server: what it sees is that client's session, with as many sequences as there are conversations. A thread
makes the passes, as long as somebody waits for a reply.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from privinf.client.batch import Batch, Member
from privinf.client.client import Client
from privinf.client.conversation import Conversation
from privinf.client.lines import Lines
from privinf.client.reply import Reply
from privinf.client.session import ClientSession
from privinf.client.text import Token
from privinf.transport.failure import Failure
from protocols.errors import PrivinfError, TransportError

Told = tuple[Token | None, bool] | BaseException
"""A token if there is one, and whether the reply has come to its end; or why it has not."""
WORN = 1 << 15
"""Passes after which a session takes nobody new: a server bounds the requests of one."""
SETTLE_S = 5.0


class _Room:
    """One session, the sequences in it, and the thread that makes their passes until nobody is left."""

    def __init__(self, session: ClientSession, ended: Callable[[_Room, BaseException | None], None]) -> None:
        self.session, self.batch = session, Batch(session)
        self._ended = ended
        self._seats: dict[Member, Seat] = {}
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="privinf-batch", daemon=True)

    def start(self) -> None:
        """Once somebody is in it."""
        self._thread.start()

    def settle(self, seconds: float) -> None:
        """Waits so long for its end, if nobody is in it."""
        with self._change:
            over = not self._seats
        if over and self._thread.is_alive():
            self._thread.join(seconds)

    def takes(self, most: int) -> bool:
        """Whether one more may come in, where `most` may be here at a time."""
        with self._change:
            if self._closed or self.batch.full or len(self._seats) >= most or self.batch.steps >= WORN:
                return False
            return self.batch.running or not self.session.lines.lost()

    def enter(self, seat: Seat) -> Member:
        """A sequence for a conversation; TransportError where the session has ended meanwhile."""
        with self._change:
            if self._closed:
                raise TransportError("the session has ended", party="client")
            member = self.batch.join()
            self._seats[member] = seat
        return member

    def ask(self, member: Member, reply: Reply, ids: Sequence[int], after: int) -> None:
        """See `Batch.ask`."""
        self.batch.ask(member, reply, ids, after)
        with self._change:
            if self._closed:
                raise TransportError("the session has ended", party="client")
            self._change.notify()

    def leave(self, member: Member) -> None:
        """Its conversation is over; the session with the last."""
        self.batch.drop(member)
        with self._change:
            self._seats.pop(member, None)
            self._change.notify()

    def _run(self) -> None:
        broken: BaseException | None = None
        try:
            while self._wait():
                for member, token, over, error in self.batch.step():
                    with self._change:
                        seat = self._seats.get(member)
                    if seat is not None:
                        seat.tell(error or (token, over))
        except Exception as found:
            broken = found
        with self._change:
            self._closed = True
            seats = list(self._seats.values())
        for seat in seats:
            seat.lose(_each(broken))
        self._ended(self, broken)

    def _wait(self) -> bool:
        """Until there is something to do; false once nobody is here."""
        with self._change:
            self._change.wait_for(lambda: not self._seats or self.batch.running)
            self._closed = not self._seats
            return not self._closed


def _each(error: BaseException | None) -> BaseException:
    """An error for one of several callers, who raise it in threads of their own."""
    if error is None:
        return TransportError("the session was ended", party="client")
    return Failure.of(error).error() if isinstance(error, PrivinfError) else RuntimeError(f"a pass failed: {type(error).__name__}")


class _Opening:
    """A session that is being made, and the conversations that wait for it. Changed under the guard of its `Shared`."""

    def __init__(self) -> None:
        self.made: list[Lines] = []
        self.seats: set[Seat] = set()
        self.done = False
        self.error: BaseException | None = None


class Shared:
    """`seat()` for each conversation, used as a `Conversation`; at most `most` in a session. Safe in threads.

    `ended` is told of each session that is over.
    """

    def __init__(self, client: Client, most: int, ended: Callable[[ClientSession], None] = lambda session: None) -> None:
        self._client, self._most, self._told = client, most, ended
        self._change = threading.Condition()
        self._rooms: list[_Room] = []
        self._opening: _Opening | None = None

    def seat(self) -> Seat:
        """A conversation, not open yet."""
        return Seat(self._client, self)

    @property
    def sessions(self) -> list[ClientSession]:
        """Those that are open, or have just ended."""
        return [room.session for room in list(self._rooms)]

    def find(self, seat: Seat, connect_s: float | None) -> tuple[_Room, Member, bool]:
        """Room for a conversation, and whether its session is a new one; PrivinfError.

        Whoever comes while a session is made waits, and then finds room in it, or hears why it could not be made.
        """
        while True:
            with self._change:
                if seat.over:
                    raise TransportError("this conversation was closed", party="client")
                for room in self._rooms:
                    if room.takes(self._most):
                        with contextlib.suppress(TransportError):
                            return room, room.enter(seat), False
                opening, first = self._opening, self._opening is None
                if opening is None:
                    opening = self._opening = _Opening()
                opening.seats.add(seat)
                while not (first or opening.done) and seat in opening.seats:
                    self._change.wait()
            if first:
                return self._open(opening, seat, connect_s)
            if opening.error is not None and not seat.over:
                raise _each(opening.error)

    def _open(self, opening: _Opening, seat: Seat, connect_s: float | None) -> tuple[_Room, Member, bool]:
        room = None
        try:
            room = _Room(self._client.open(opening.made, connect_s), self._end)
            member = room.enter(seat)
        except BaseException as error:
            opening.error = error
            raise
        finally:
            with self._change:
                self._opening, opening.done = None, True
                self._rooms += [] if room is None else [room]
                self._change.notify_all()
        room.start()
        return room, member, True

    def leave(self, seat: Seat) -> None:
        """It waits no longer for a session; if nobody does, none is made."""
        with self._change:
            opening = self._opening
            if opening is None or seat not in opening.seats:
                return
            opening.seats.discard(seat)
            self._change.notify_all()
            made = [] if opening.seats else list(opening.made)
        for lines in made:
            self._client.drop(lines)

    def settle(self) -> None:
        """Waits until sessions in which nobody is any more have told their peers so, a moment at most."""
        for room in list(self._rooms):  # without the guard, which whoever connects holds
            room.settle(SETTLE_S)

    def _end(self, room: _Room, error: BaseException | None) -> None:
        with contextlib.suppress(PrivinfError):
            if error is None:
                room.session.end()
        self._client.drop(room.session.lines, error)
        self._told(room.session)
        with self._change:
            self._rooms.remove(room)


class Seat(Conversation):
    """A conversation in a session that others use too. It uses no prepared queries."""

    def __init__(self, client: Client, shared: Shared) -> None:
        super().__init__(client)
        self._shared = shared
        self._place: tuple[_Room, Member, bool] | None = None  # the last: whether the session is new
        self._made_for: queue.SimpleQueue[Told] = queue.SimpleQueue()  # of the reply that is being made
        self._lost = False

    def _opened(self, connect_s: float | None) -> ClientSession:
        """In a session that is there, if one has room."""
        self._place = self._shared.find(self, connect_s)
        return self._place[0].session

    @property
    def cached(self) -> int:
        """See `Conversation`."""
        return 0 if self._place is None else self._place[1].cached

    @property
    def setup_s(self) -> float:
        """See `Conversation`: nothing, where the session was there."""
        return self.session.setup_s if self._place is not None and self._place[2] else 0.0

    @property
    def own(self) -> ClientSession | None:
        """See `Conversation`."""
        return None

    @property
    def lost(self) -> bool:
        """See `Conversation`."""
        return self._lost

    @property
    def over(self) -> bool:
        """Whether it was closed."""
        return self._over

    def _made_of(self, reply: Reply, ids: Sequence[int], *, prepared: bool, after: int) -> Iterator[Token]:
        assert self._place is not None
        room, member, _ = self._place
        made = self._made_for = queue.SimpleQueue[Told]()
        try:
            room.ask(member, reply, ids, after)
        except TransportError:
            self._lost = True
            raise
        over = False
        while not over:
            told = made.get()
            if isinstance(told, BaseException):
                raise told
            token, over = told
            if token is not None:
                yield token

    def tell(self, told: Told) -> None:
        """What a pass has made for its reply, or why none is made; from the session's thread."""
        if isinstance(told, BaseException):
            self._over = True
        self._made_for.put(told)

    def lose(self, error: BaseException) -> None:
        """Its session is over, from that one's thread."""
        self._lost = True
        self.tell(error)

    def end(self) -> None:
        """See `Conversation`: the session goes on for the others."""
        self.close()

    def close(self, error: BaseException | None = None) -> None:
        """See `Conversation`: leaves between two passes."""
        with self._guard:
            self._over = True
            place = self._place
        if place is not None:
            place[0].leave(place[1])
        else:
            self._shared.leave(self)
        self._made_for.put(TransportError("this conversation was closed", party="client"))
