"""Both ends of a source that is the two parties themselves: they run its protocols on their own connection, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

from torch import Tensor

from privinf.lowering.joint import BEGIN, PREPROCESS, Joint
from privinf.session.devices import walking
from privinf.session.prepared import packed
from privinf.transport.connection import Connection
from protocols.correlations import Correlation, Kind, Role
from protocols.party import Online, Party
from protocols.rounds import Channel, Protocol_
from protocols.sources.base import PartySource
from protocols.sources.two_party.source import TwoPartySource

PATIENCE = 10
"""How many times as long as usual a peer may compute between two messages: making a pass takes minutes where the network is large."""


class Together:
    """One party's end, on a connection that both have established; `channel` is that connection, or stands before it."""

    def __init__(self, role: Role, connection: Connection, channel: Channel, joint: Joint) -> None:
        self._role, self._connection, self._channel, self.joint = role, connection, channel, joint
        self._begun = False

    def make(self, source: PartySource) -> float:
        """The pass that the source has begun, which counts as offline; the seconds of what the session begins with, which is set-up.

        That is made before the first pass, and not at all for a query that was prepared.
        """
        began = perf_counter()
        if not self._begun:
            self._run("setup", BEGIN, self.joint.begin())
            self._begun = True
        middle = perf_counter()
        self._run("offline", PREPROCESS, source.preprocess())
        return middle - began

    def _run(self, phase: str, label: tuple[str, str], protocol: Protocol_[Any]) -> None:
        meter, source = self._connection.meter, self.joint.source
        meter.phase, meter.label = phase, label
        with self._connection.at_work(PATIENCE), walking(source.device):
            Party(self._role, Online(self._role, self._channel, source)).run(protocol)
        meter.label = ("", "")


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

    def begin_pass(self, kinds: Sequence[Kind] = ()) -> None:
        """See `PartySource`."""
        self._source.begin_pass(kinds)
        self._kinds = list(kinds)

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
