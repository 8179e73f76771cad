"""What a client gets of a model and keeps between sessions: the public bundle and the masked weights.

Each lies in a file under its own digest, written whole or not at all, so that an interrupted set-up goes on where it stopped. The model's
id is the bundle's digest, and the bundle holds those of the masked weights: what is taken from a server, or read from a file, is what
the id stands for, whoever sent it and whoever else could write there.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path

from privinf.files import refusals, sweep, write_private
from privinf.graph.private import weights_of
from privinf.lowering.lowered import Lowered
from privinf.lowering.setup import MAX_SETUP, SetupItem, packed_bytes
from privinf.session.messages import Needs, Welcome
from privinf.transport.connection import Connection
from privinf.transport.frames import FrameKind
from protocols.errors import ConfigError, HandshakeError
from protocols.linear import Weight

log = logging.getLogger("privinf")


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """`write_private`, ConfigError in one line where the disk refuses."""
    with refusals(path):
        write_private(path, *parts)


def _read(path: Path) -> bytes | None:
    """A kept file, or None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", remedy="look at its permissions, or choose another --cache") from None


class ClientStore:
    """The directory of one client's cache. What is damaged there is reported, removed and fetched anew."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _checked(self, path: Path, digest: str, what: str) -> bytes | None:
        """A kept file, if it still has this digest."""
        data = _read(path)
        if data is None or hashlib.sha256(data).hexdigest() == digest:
            return data
        log.warning("%s was damaged and is fetched anew (%s)", what, path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def bundle(self, model: str) -> bytes | None:
        """The kept bundle of a model."""
        return self._checked(self.root / "bundles" / model, model, "the kept bundle of a model")

    def keep_bundle(self, model: str, data: bytes) -> None:
        """Keeps a bundle, whose digest is the model's id."""
        _write(self.root / "bundles" / model, data)

    def _path(self, model: str, item: SetupItem) -> Path:
        return self.root / "setup" / model / f"{item.sha256}.bin"

    def load(self, model: str, name: str, item: SetupItem) -> bytes | None:
        """What was kept of the set-up."""
        return self._checked(self._path(model, item), item.sha256, f"the kept set-up of {name}")

    def keep(self, model: str, item: SetupItem, data: memoryview) -> None:
        """Keeps a part of the set-up, of which this is the item."""
        _write(self._path(model, item), data)

    def sweep(self, model: str) -> None:
        """Removes what interrupted writes have left."""
        sweep(self.root / "setup" / model)


def receive_bundle(connection: Connection, welcome: Welcome, store: ClientStore, peer: str) -> Lowered:
    """The model without weights whose id the server gave, from the cache or from the server; HandshakeError if it sends another."""
    bundle = store.bundle(welcome.model)
    connection.send_control(Needs(() if bundle is not None else ("bundle",)))
    if bundle is None:
        usual = connection.max_frame
        connection.max_frame = max(welcome.size, usual)
        try:
            bundle = bytes(connection.receive(welcome.size, FrameKind.CONTROL))
        finally:
            connection.max_frame = usual
        if hashlib.sha256(bundle).hexdigest() != welcome.model:
            raise HandshakeError("the public bundle is not that of the model whose id the server gave", party="client", peer=peer)
        store.keep_bundle(welcome.model, bundle)
    return Lowered.from_bundle(bundle)


def parts_of(lowered: Lowered, peer: str) -> dict[str, tuple[Weight, SetupItem]]:
    """What set-up consists of; HandshakeError unless the bundle promises just what its graph needs, and no more than is believed."""
    weights, items = {name: weight for name, (weight, _, _) in weights_of(lowered.graph).items()}, lowered.setup.items
    if {name: packed_bytes(weight) for name, weight in weights.items()} != {name: item.size for name, item in items.items()}:
        raise HandshakeError("the server's bundle promises another set-up than its model needs", party="client", peer=peer)
    if sum(item.size for item in items.values()) > MAX_SETUP:
        raise HandshakeError(f"the server's model asks for a set-up of more than {MAX_SETUP} bytes", party="client", peer=peer)
    return {name: (weight, items[name]) for name, weight in weights.items()}


def receive_part(connection: Connection, name: str, item: SetupItem, peer: str) -> memoryview:
    """A part of the set-up from the server; HandshakeError if it is not what the model's id stands for."""
    data = connection.receive(item.size)
    if SetupItem.of(data) != item:
        what, remedy = f"what the server sent as {name} is not what its model's id stands for", "nothing of it was kept; ask who runs it"
        raise HandshakeError(what, party="client", peer=peer, remedy=remedy)
    return data
