"""C's end of a source that is the two parties themselves: what it keeps of the encrypted weights, and its part of making a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from privinf.client.supply import Supply
from privinf.lowering.encrypted import Sealing
from privinf.lowering.joint import Joint
from privinf.session.joint import PATIENCE, Recorder, Together
from privinf.session.messages import MAX_KINDS, Key, Needs
from privinf.session.prepared import Writer
from privinf.session.sealed import SealedStore
from privinf.session.source import ClientSource
from privinf.transport.connection import Connection
from privinf.trust import TWO_PARTY
from protocols.correlations import Kind, Role
from protocols.errors import ConfigError, HandshakeError
from protocols.prg import new_seed
from protocols.sources.base import PartySource

MAX_SETUP = 1 << 36  # bytes; a model that asks for more is not believed


class TwoPartySupply(Supply):
    """Set-up brings the weights, encrypted under a key of the server's; kept for as long as the server has this key."""

    trust = TWO_PARTY

    def set_up(self) -> None:
        """See `Supply`."""
        peers, connection = self.lines.peers, self.connection
        sealing = Sealing.of(self.lowered)
        if sum(part.size for part in sealing.parts.values()) > MAX_SETUP:
            what = f"the server's model asks for a set-up of more than {MAX_SETUP} bytes"
            raise HandshakeError(what, party="client", peer=peers.named)
        with connection.at_work(PATIENCE):  # to the first of its clients the server makes them now
            key = connection.receive_control(Key, MAX_KINDS)
        if len(key.digests) != len(sealing.parts):
            raise HandshakeError("the server promises another set-up than its model needs", party="client", peer=peers.named)
        digests = dict(zip(sealing.parts, key.digests, strict=True))
        store = SealedStore(peers.options.cache, "setup", self.lowered.id, key.id)
        store.sweep()
        missing = [name for name in digests if not self._take(store, sealing, name, digests[name])]
        connection.send_control(Needs(tuple(missing)), MAX_KINDS)
        size, done = sum(sealing.parts[name].size for name in missing), 0
        for name in missing:
            part = sealing.parts[name]
            connection.meter.label = part.label
            with store.writing(name, digests[name]) as write:
                for length in part.pieces:
                    write(connection.receive(length))
                    done += length
                    peers.progress("set-up", done / size)
            if not self._take(store, sealing, name, digests[name]):
                raise ConfigError(f"the disk does not give back what was kept of {name}", remedy="choose another --cache")
        connection.meter.label = ("", "")

    def _take(self, store: SealedStore, sealing: Sealing, name: str, digest: bytes) -> bool:
        """Takes an encrypted weight that another session holds, or that is kept, whole and what the server sends, if there is one."""
        place, held, part = f"{store.named} {name} {digest.hex()}", self.lines.peers.encrypted, sealing.parts[name]
        weight = held.get(place)
        if weight is None and store.digest(name, part.size) == digest and (data := store.read(name, part.size)) is not None:
            weight = held[place] = sealing.read(name, data)
        if weight is None:
            return False
        self.lines.masked.setdefault(part.form.name, {})[part.form] = weight
        return True

    def source(self, token: bytes) -> ClientSource:
        """See `Supply`."""
        return TwoPartySource(self.connection, self.lines.masked, self.lines.peers.options.device)


class TwoPartySource(ClientSource):
    """See `ClientSource`."""

    def __init__(self, connection: Connection, held: Mapping[str, Any], device: str) -> None:
        joint = Joint(Role.CLIENT, held, device)
        self.party: PartySource = joint.source
        self.tables = joint.tables
        self._together = Together(Role.CLIENT, connection, connection, joint)

    @contextmanager
    def making(self, party: PartySource, kinds: Callable[[], Sequence[Kind]], progress: Callable[[float], None]) -> Iterator[None]:
        """See `ClientSource`."""
        party.begin_pass(kinds())
        progress(0.0)
        self.set_up_s += self._together.make(party)
        progress(1.0)
        yield

    def reseed(self) -> bytes:
        """See `ClientSource`; nothing is expanded from it."""
        return new_seed()

    def recorder(self, writer: Writer) -> PartySource:
        """See `ClientSource`."""
        return Recorder(self._together.joint.apart(), writer.write, lambda kinds: writer.end_pass(kinds, []))
