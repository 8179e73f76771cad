"""A stock of rows: the server's end of the two exchanges, which `privinf.client.stock` describes."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from privinf.lowering.stocking import cost, maps, stocked
from privinf.server.models import ServedModel
from privinf.session.marks import Lane
from privinf.session.messages import Draw, Drawn, Kept, Reserved, Stock, Terms
from privinf.session.options import Options
from privinf.session.pool import Pool
from privinf.session.stock import TRIES, Header, StockLane, opened, writing
from privinf.transport.connection import Connection
from privinf.trust import TWO_PARTY
from protocols.correlations import Kind, Role, Tensors
from protocols.errors import Code, ConfigError, ProtocolDesync, RefusedError
from protocols.lattice.rows import dealt, positions_of
from protocols.rounds import Protocol_

log = logging.getLogger("privinf")


class ServerStock:
    """Of one session. `draw` waits for the client, in no turn."""

    def __init__(self, options: Options, model: ServedModel, fingerprint: str, connection: Connection) -> None:
        self._options, self._model, self._connection = options, model, connection
        self._pool = Pool(options.cache, Role.SERVER)
        self._lane = Lane(model.lowered.id, connection.peer_fingerprint, fingerprint, Terms(1, 1), TWO_PARTY, stock=True)

    def _open(self) -> AbstractContextManager[StockLane]:
        return opened(self._pool, self._lane, self._options.timeout, self._connection.peer_until)

    def make(self, request: Stock, afford: Callable[[int], None], run: Callable[[Protocol_[Any]], None]) -> None:
        """Makes one; `afford` checks the bytes, `run` runs a protocol.

        RefusedError where this server keeps no more, or its disk refuses.
        """
        try:
            self._make(request, afford, run)
        except ConfigError as error:  # the client is told that, and not where on our disk
            log.warning("a stock of rows cannot be made for client %s: %s", self._connection.peer_name, error)
            what, remedy = "the server cannot keep a stock of rows", "look at the server's output"
            raise RefusedError(what, party="server", remedy=remedy, code=Code.DISK) from error

    def _make(self, request: Stock, afford: Callable[[int], None], run: Callable[[Protocol_[Any]], None]) -> None:
        connection = self._connection
        connection.meter.phase = "offline"
        found = maps(self._model.lowered, request.positions)
        afford(cost(found, request.positions).bytes)
        name, serial = self._lane.name(Role.SERVER), secrets.token_bytes(16)
        header = Header(Role.SERVER, name, 0, serial, request.positions, found)
        self._check_room(header.size)
        with self._open() as shelf:
            spent = shelf.raise_to(request.spent)
            index = shelf.reserve(max(spent, request.held), request.positions)
        connection.send_control(Reserved(index, serial))
        header = Header(Role.SERVER, name, index, serial, request.positions, found)
        with writing(self._pool, self._lane, header) as writer:
            run(stocked(Role.SERVER, found, request.positions, self._model.encoded, writer.put))
            writer.seal()
            connection.receive_control(Kept)
            with self._open() as shelf:
                shelf.add(writer.part, writer.header.index)
        connection.send_control(Kept())

    def _check_room(self, new: int) -> None:
        options = self._options
        count, size = self._pool.kept(self._connection.peer_fingerprint)
        if count >= options.keep_queries or size + new > options.keep_bytes:
            most = f"{options.keep_bytes} bytes in {options.keep_queries} stocks and prepared queries"
            what = f"this server keeps at most {most} for a client, and this stock takes {new} beside {size} in {count}"
            raise RefusedError(what, party="server", remedy="make a smaller one, or use first what is kept")

    def draw(self, kinds: Sequence[Kind]) -> dict[int, tuple[Tensors, Tensors]]:
        """See `ClientStock.draw`."""
        self._connection.meter.phase = "offline"
        for _ in range(TRIES):
            request = self._connection.receive_control(Draw)
            if not request.index:
                return {}
            answer, found = Drawn(False, 0, False), None
            try:
                if self._pool.holds(self._lane):
                    with self._open() as shelf:
                        answer, found = self._taken(shelf, request, kinds)
            except ConfigError as error:
                log.warning("rows of client %s cannot be used: %s", self._connection.peer_name, error)
                answer = Drawn(False, 0)
            self._connection.send_control(answer)
            if found is not None:
                return found
        if self._connection.receive_control(Draw).index:
            what = f"the client asks for rows more than {TRIES} times in a pass"
            raise ProtocolDesync(what, party="server", peer=self._connection.peer_name)
        return {}

    def _taken(self, shelf: StockLane, request: Draw, kinds: Sequence[Kind]) -> tuple[Drawn, dict[int, tuple[Tensors, Tensors]] | None]:
        spent = shelf.spent
        for path, header in shelf.stocks():
            if header.serial != request.serial:
                continue
            if not request.count or request.count != positions_of(header.maps, kinds):
                raise ProtocolDesync("the client asks for other rows than the pass takes", party="server", peer=self._connection.peer_name)
            inside = header.index <= request.index <= request.index + request.count - 1 <= header.last
            rows = shelf.take(path, header, request.index, request.count) if inside and request.index > spent else None
            return Drawn(rows is not None, shelf.spent), None if rows is None else dealt(header.maps, kinds, rows)
        return Drawn(False, spent, request.index <= spent), None
