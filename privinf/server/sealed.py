"""S's end of the part of set-up that is encrypted: made once, kept, and sent to each client that has none of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from privinf.files import locked
from privinf.lowering.encrypted import Sealing
from privinf.server.models import ServedModel
from privinf.session.messages import MAX_KINDS, Key, Needs
from privinf.session.sealed import SealedStore
from privinf.session.service import Service
from privinf.transport.connection import Connection
from protocols.errors import Code, ConfigError, RefusedError

log = logging.getLogger("privinf.server")
MAKING_S = 3600.0
"""How long another process may take to encrypt a weight."""


class SealedSetUp:
    """Of one server: the same for all its clients, for the key is the model's own."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._making = threading.Lock()

    def send(self, model: ServedModel, sealing: Sealing, connection: Connection, wanted: Callable[[tuple[str, ...]], None]) -> None:
        """What the client has not kept of these, in messages of a bounded size; `wanted` checks and counts what it asks for."""
        turns, client = self._service.turns, connection.peer_fingerprint
        kept = SealedStore(self._service.options.cache, "sealed", model.lowered.id, sealing.key_id(model.mask_seed))
        with turns.turn(client), self._refusing():
            digests = tuple(self._made(model, sealing, kept, name) for name in sealing.parts)
        connection.send_control(Key(sealing.key_id(model.mask_seed), digests), MAX_KINDS)
        names = connection.receive_control(Needs, MAX_KINDS).names
        wanted(names)
        with turns.turn(client), self._refusing():
            for name in names:
                part = sealing.parts[name]
                connection.meter.label = part.label
                data = kept.read(name, part.size)
                if data is None:  # it was damaged, and is gone now
                    self._made(model, sealing, kept, name)
                    data = kept.read(name, part.size)
                if data is None:
                    raise ConfigError(f"the disk does not give back the encrypted {name}", party="server")
                for message in part.cut(data):
                    with turns.between(client):
                        connection.send(message)
        connection.meter.label = ("", "")

    def _made(self, model: ServedModel, sealing: Sealing, kept: SealedStore, name: str) -> bytes:
        """The digest of an encrypted weight, which is made if it is not kept; by one session at a time, for all."""
        with self._making:
            digest = kept.digest(name, sealing.parts[name].size)
            if digest is None:
                digest = self._sealed(model, sealing, kept, name)
        if digest is None:
            raise ConfigError(f"the disk does not give back the encrypted {name}", party="server")
        return digest

    @staticmethod
    def _sealed(model: ServedModel, sealing: Sealing, kept: SealedStore, name: str) -> bytes | None:
        """Made, unless another process of this server has made it meanwhile: each making has another digest."""
        with locked(kept.lock, MAKING_S):
            digest = kept.digest(name, sealing.parts[name].size)
            if digest is None:
                kept.sweep()
                with kept.writing(name) as write:
                    for piece in sealing.seal(model.mask_seed, name, model.encoded):
                        write(memoryview(piece))
                digest = kept.digest(name, sealing.parts[name].size)
        return digest

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """A client is told that the disk refuses, and not where on it."""
        try:
            yield
        except ConfigError as error:
            log.error("the encrypted weights cannot be kept: %s", error)
            what, remedy = "the server cannot keep its encrypted weights", "look at the server's output"
            raise RefusedError(what, party="server", remedy=remedy, code=Code.DISK) from None
