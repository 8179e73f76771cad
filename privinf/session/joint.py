"""Both ends of a source that is the two parties themselves: they run its protocols on their own connection, and nothing else does."""

from __future__ import annotations

from typing import Any

from privinf.lowering.joint import BEGIN, PREPROCESS, Joint
from privinf.session.devices import walking
from privinf.transport.connection import Connection
from protocols.correlations import Role
from protocols.party import Online, Party
from protocols.rounds import Channel, Protocol_

PATIENCE = 10
"""How many times as long as usual a peer may compute between two messages: making a pass takes minutes where the network is large."""


class Together:
    """One party's end, on a connection that both have established; `channel` is that connection, or stands before it."""

    def __init__(self, role: Role, connection: Connection, channel: Channel, joint: Joint) -> None:
        self._role, self._connection, self._channel, self.joint = role, connection, channel, joint

    def begin(self) -> None:
        """What the session begins with; it counts as set-up."""
        self._run("setup", BEGIN, self.joint.begin())

    def make(self) -> None:
        """The pass that the source has begun; it counts as offline."""
        self._run("offline", PREPROCESS, self.joint.source.preprocess())

    def _run(self, phase: str, label: tuple[str, str], protocol: Protocol_[Any]) -> None:
        meter, source = self._connection.meter, self.joint.source
        meter.phase, meter.label = phase, label
        with self._connection.at_work(PATIENCE), walking(source.device):
            Party(self._role, Online(self._role, self._channel, source)).run(protocol)
        meter.label = ("", "")
