"""C's end of the part of set-up that is encrypted: kept for as long as the server has this key."""

from __future__ import annotations

from typing import Any

from privinf.client.lines import Lines
from privinf.client.taken import Taken
from privinf.files import check_room
from privinf.lowering.encrypted import Sealing
from privinf.lowering.lowered import Lowered
from privinf.lowering.setup import MAX_SETUP
from privinf.session.joint import PATIENCE
from privinf.session.messages import MAX_KINDS, Key, Needs
from privinf.session.sealed import SealedStore
from privinf.transport.connection import Connection
from protocols.errors import ConfigError, HandshakeError


def receive_sealed(lines: Lines, connection: Connection, lowered: Lowered, sealing: Sealing) -> dict[str, Any]:
    """What C has of these encrypted weights, by name and then by form: what is kept, and from the server what is not."""
    peers, found = lines.peers, dict[str, Any]()
    if sealing.size > MAX_SETUP:
        what = f"the server's model asks for a set-up of more than {MAX_SETUP} bytes"
        raise HandshakeError(what, party="client", peer=peers.named)
    with connection.at_work(PATIENCE):  # to the first of its clients the server makes them now
        key = connection.receive_control(Key, MAX_KINDS)
    if len(key.digests) != len(sealing.parts):
        raise HandshakeError("the server promises another set-up than its model needs", party="client", peer=peers.named)
    digests = dict(zip(sealing.parts, key.digests, strict=True))
    store = SealedStore(peers.options.cache, "setup", lowered.id, key.id)
    store.sweep()
    lines.spend = Taken(store.taken, peers.options.timeout).spend

    def take(name: str) -> bool:
        """Takes an encrypted weight that another session holds, or that is kept, whole and what the server sends, if there is one."""
        digest, held, part = digests[name], peers.encrypted, sealing.parts[name]
        place = f"{store.named} {name} {digest.hex()}"
        weight = held.get(place)
        if weight is None and store.digest(name, part.size) == digest and (data := store.read(name, part.size)) is not None:
            weight = held[place] = sealing.read(name, data)
        if weight is None:
            return False
        found.setdefault(part.form.name, {})[part.form] = weight
        return True

    missing = [name for name in digests if not take(name)]
    size, done = sum(sealing.parts[name].size for name in missing), 0
    check_room(peers.options.cache, size)
    connection.send_control(Needs(tuple(missing)), MAX_KINDS)
    for name in missing:
        part = sealing.parts[name]
        connection.meter.label = part.label
        with store.writing(name, digests[name]) as write:
            for length in part.pieces:
                write(connection.receive(length))
                done += length
                peers.progress("set-up", done / size)
        if not take(name):
            raise ConfigError(f"the disk does not give back what was kept of {name}", remedy="choose another --cache")
    connection.meter.label = ("", "")
    return found
