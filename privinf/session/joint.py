"""Both ends of a source that is the two parties themselves: they run its protocols on their own connection, and nothing else does.

A pass is made before it is computed, or while the one before it is: then each round of that one carries a round of the making too, in a
message of its own, and what is left is made when the pass is asked for. Either way both parties do the same at the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any

from torch import Tensor

from privinf.lowering.joint import BEGIN, PREPROCESS, Joint
from privinf.session.devices import walking
from privinf.session.prepared import packed
from privinf.transport.connection import Connection
from protocols.correlations import Correlation, Kind, Role, Tensors
from protocols.party import Online, Party
from protocols.rounds import Channel, Protocol_, Stepwise
from protocols.sources.base import PartySource
from protocols.sources.two_party.source import TwoPartySource

PATIENCE = 10
"""How many times as long as usual a peer may compute between two messages: making a pass takes minutes where the network is large."""


class Together:
    """One party's end, on a connection that both have established; `channel` is that connection, or stands before it."""

    def __init__(self, role: Role, connection: Connection, channel: Channel, joint: Joint) -> None:
        self._role, self._connection, self._channel, self.joint = role, connection, channel, joint
        self._begun = False
        self._ahead: Stepwise | None = None  # the making of the pass after the one that is computed

    def foresee(self, source: PartySource) -> None:
        """The pass that the source has begun is made while the one before it is computed, a round of it at each `step`."""
        self._ahead = Stepwise(source.preprocess(), self._role, self._channel, source.device)

    @property
    def foresees(self) -> bool:
        """Whether a pass is under way that way."""
        return self._ahead is not None

    def computing(self) -> AbstractContextManager[None]:
        """Around the pass that is computed: where the next one is made meanwhile, both compute for longer between their messages."""
        return nullcontext() if self._ahead is None else self._connection.at_work(PATIENCE)

    @property
    def meanwhile(self) -> Callable[[], None] | None:
        """See `Online`: a round of the next pass's making, which counts as offline."""
        return None if self._ahead is None else self._step

    def _step(self) -> None:
        if self._ahead is not None and not self._ahead.done:
            with self._as("offline", PREPROCESS):
                self._ahead.step()

    def settle(self) -> None:
        """The pass is computed: what is on its way of the next one's making is taken in, so that the next message is a request."""
        if self._ahead is not None:
            with self._as("offline", PREPROCESS):
                self._ahead.settle()

    def finish(self) -> None:
        """What is left of the pass that was foreseen."""
        ahead, self._ahead = self._ahead, None
        assert ahead is not None, "no pass was foreseen"
        with self._as("offline", PREPROCESS), self._connection.at_work(PATIENCE), walking(self.joint.source.device):
            ahead.finish()

    def make(self, source: PartySource) -> float:
        """The pass that the source has begun, which counts as offline; the seconds of what the session begins with, which is set-up.

        That is made before the first pass, and not at all for a query that was prepared.
        """
        began = perf_counter()
        if not self._begun:
            self._run("setup", BEGIN, self.joint.begin())
            self._begun = True
        middle = perf_counter()
        self.run(source.preprocess())
        return middle - began

    def supply(self, source: PartySource, draw: Callable[[list[Kind]], Mapping[int, tuple[Tensors, Tensors]]]) -> None:
        """Before `make`: what of the pass was made before, `draw` finds, see `TwoPartySource.supply`."""
        assert isinstance(source, TwoPartySource | Recorder)
        source.supply(draw(source.asked))

    def run(self, protocol: Protocol_[Any]) -> None:
        """Something that is made ahead of a query, on what needs no beginning."""
        self._run("offline", PREPROCESS, protocol)

    def _run(self, phase: str, label: tuple[str, str], protocol: Protocol_[Any]) -> None:
        source = self.joint.source
        with self._as(phase, label), self._connection.at_work(PATIENCE), walking(source.device):
            Party(self._role, Online(self._role, self._channel, source)).run(protocol)

    @contextmanager
    def _as(self, phase: str, label: tuple[str, str]) -> Iterator[None]:
        """What moves within counts so."""
        meter = self._connection.meter
        before = meter.phase, meter.label
        meter.phase, meter.label = phase, label
        try:
            yield
        finally:
            meter.phase, meter.label = before


class Recorder(PartySource):
    """A party's source while a query is prepared: what a pass would take is written when the pass ends, and is gone from here.

    `ended` is told the kinds of a pass once it is.
    """

    def __init__(self, source: TwoPartySource, write: Callable[[bytes], None], ended: Callable[[list[Kind]], None]) -> None:
        super().__init__(source.role, source.device)
        self._source, self._write, self._ended = source, write, ended
        self._kinds: list[Kind] = []

    def make(self, kind: Kind, name: int) -> Correlation:
        """See `PartySource`."""
        return self._source.make(kind, name)

    def room(self, kinds: Sequence[Kind]) -> int:
        """See `TwoPartySource`."""
        return self._source.room(kinds)

    def begin_pass(self, kinds: Sequence[Kind] = ()) -> None:
        """See `PartySource`."""
        self._source.begin_pass(kinds)
        self._kinds = list(kinds)

    @property
    def asked(self) -> list[Kind]:
        """See `TwoPartySource`."""
        return self._source.asked

    def supply(self, made: Mapping[int, tuple[Tensors, Tensors]]) -> None:
        """See `TwoPartySource`."""
        self._source.supply(made)

    def preprocess(self) -> Protocol_[None]:
        """See `PartySource`."""
        return self._source.preprocess()

    def ahead(self, kind: Kind, weights: Mapping[str, Tensor]) -> Correlation:
        """See `PartySource`."""
        return self._source.ahead(kind, weights)

    def end_pass(self) -> None:
        """See `PartySource`."""
        for piece in packed(self._source.hand_over()):
            self._write(piece)
        self._ended(self._kinds)
        self.next_name = self._source.next_name
