"""The ends of a session with a source of correlations, whichever it is: what server and client ask of theirs.

Each party's end has the party's own `PartySource` (`protocols.sources`), from which it takes. For a pass S, which knows the
shapes, says what is needed (`ask`), both ends begin the pass, both do their part of making it, and both take. Where the source can make
a pass while another is computed, S says what is likely to come (`prefetch`). A query that is prepared has correlations of its own
(`reseed`), and what is spent of such queries is marked wherever a party could be put back to an earlier state (`mark`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from privinf.session.messages import Marked, Pass, Step, Stock, Terms
from privinf.session.prepared import Writer
from privinf.transport.connection import Connection
from protocols.correlations import Kind
from protocols.errors import HandshakeError
from protocols.party import Tables
from protocols.sources.base import PartySource


class ServerSource(ABC):
    """S's end."""

    party: PartySource
    tables: Tables | None = None  # see `Party`
    fills = False  # whether a further token's rows are filled up, so that its pass repeats: see `Runtime`

    @abstractmethod
    def ask(self, kinds: Sequence[Kind]) -> None:
        """Has a pass made, from the name on that is next."""

    def cost(self, kinds: Sequence[Kind]) -> int:
        """Bytes that S and C move to make a pass that is asked for next, beside what C sends ahead of it."""
        return 0

    @abstractmethod
    def make(self, kinds: Sequence[Kind]) -> None:
        """`party` begins the pass that was asked for, and S does its own part of making it."""

    def taken(self) -> None:  # noqa: B027  (a source may have nothing to do)
        """A pass was taken to its end."""

    def record(self, kinds: Sequence[Kind]) -> Iterable[bytes]:
        """The same for a pass of a prepared query; what S keeps of it, beside the seed and what C sends ahead."""
        return ()

    @abstractmethod
    def follows(self, request: Pass | Step) -> Pass | Step | None:
        """The pass that most likely comes after this one, where the source makes it meanwhile."""

    @abstractmethod
    def prefetch(self, kinds: Sequence[Kind], *, further: bool = False) -> None:
        """Says what that pass will need; `further`: the kinds are those of the pass that was asked for last, `moved_on`."""

    @abstractmethod
    def flush(self) -> None:
        """C has sent what it sends ahead of the pass: what was held back for that leaves now."""

    @abstractmethod
    def ask_prefetched(self) -> None:
        """Has the pass made that was foretold last."""

    def drop_prefetched(self) -> None:  # noqa: B027  (a source may do so by itself)
        """Another one follows."""

    meanwhile: Callable[[], None] | None = None
    """See `Online`: while a pass is computed, of a source that makes the next one in its rounds."""

    def computing(self) -> AbstractContextManager[None]:
        """Around the pass that is computed."""
        return nullcontext()

    def settle(self) -> None:  # noqa: B027  (a source may make nothing meanwhile)
        """The pass is computed; what of the next one's making is on its way arrives now."""

    @abstractmethod
    def reseed(self) -> bytes:
        """What follows is a prepared query's: S's seed of it."""

    @abstractmethod
    def mark(self, model: str, terms: Terms, spent: int, index: int = 0) -> Marked:
        """Takes note of the highest index that is spent, and spends one more if it is given; what is spent in sum."""

    def stock(self, request: Stock, afford: Callable[[int], None]) -> None:
        """Makes a stock of rows that passes will take from; `afford` checks the bytes first. HandshakeError for a source that has none."""
        raise HandshakeError("a dealer's correlations come from no stock of rows", party="server", remedy="prepare queries instead")

    @abstractmethod
    def end(self) -> None:
        """No pass follows."""


class ClientSource(ABC):
    """C's end."""

    party: PartySource
    link: Connection  # to a third party, of a source that has one
    tables: Tables | None = None  # see `Party`
    fills = False  # as at the server
    set_up_s = 0.0  # seconds of set-up that came with a pass, until somebody takes them
    foresees = False
    """Whether the next pass can be made while one is computed, by `foresee`."""
    foreseen: Pass | None = None
    """That one, until it is made or dropped."""
    meanwhile: Callable[[], None] | None = None
    """See `Online`: while there is one."""

    @abstractmethod
    def making(
        self, party: PartySource, kinds: Callable[[], Sequence[Kind]], progress: Callable[[float], None]
    ) -> AbstractContextManager[None]:
        """Around the walk before a pass: what it takes arrives in this, which is `self.party` or a prepared query's.

        `kinds` walks the pass on shapes, for a source that wants to know what it will take. `progress` is told the share done.
        ProtocolDesync if the two parties asked for different correlations.
        """

    def settle(self) -> None:  # noqa: B027  (as at the server)
        """The pass is computed; what of the next one's making is on its way arrives now."""

    def foresee(self, request: Pass, kinds: Callable[[int], Sequence[Kind]]) -> None:
        """This most likely follows, and is made while the present pass is computed; `kinds` walks it on shapes, from that name on."""
        raise NotImplementedError

    def drop_foreseen(self) -> None:  # noqa: B027  (a source may foresee nothing)
        """Another one follows, if one was foreseen."""

    def computing(self) -> AbstractContextManager[None]:
        """Around the pass that is computed."""
        return nullcontext()

    def stock(self, positions: int, progress: Callable[[float], None]) -> dict[str, Any]:
        """Makes a stock of rows for so many positions that passes will take from. HandshakeError for a source that has none."""
        raise HandshakeError("this server has a dealer, and makes no stock of rows", party="client", remedy="prepare queries instead")

    @abstractmethod
    def reseed(self) -> bytes:
        """What follows is a prepared query's: C's seed of it."""

    @abstractmethod
    def recorder(self, writer: Writer) -> PartySource:
        """In the place of `party` while a query is prepared: what a pass would take goes to the file when the pass ends."""
