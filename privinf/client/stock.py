"""A stock of rows: the client's end of making one, and of taking a pass's rows from it.

*Make*: C says what it holds, S hands out indices, both make the rows, map after map, and write them as they come. C's file gets its name
first, then S's.

*Draw*: before a pass is made, C reads the rows, marks them as spent, durably, and names the first; S does the same, and says whether. Where
S knows more to be spent, C takes note and tries again further on. Whoever is cut off in between has lost those rows and no others, and no
state that one party is put back to makes the other use a row again. C holds its lane's lock meanwhile, as for prepared queries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from privinf.lowering.lowered import Lowered
from privinf.lowering.stocking import maps, stocked
from privinf.session.joint import Together
from privinf.session.marks import Lane
from privinf.session.messages import Draw, Drawn, Kept, Reserved, Stock, Terms
from privinf.session.options import Options
from privinf.session.pool import Pool
from privinf.session.stock import TRIES, Header, StockLane, Writer, opened, writing
from privinf.transport.connection import Connection
from privinf.trust import TWO_PARTY
from protocols.correlations import Kind, Role, Tensors
from protocols.errors import ConfigError, ProtocolDesync
from protocols.lattice.rows import dealt, positions_of

log = logging.getLogger("privinf")


class ClientStock:
    """Of one session."""

    def __init__(self, options: Options, lowered: Lowered, fingerprint: str, connection: Connection) -> None:
        self._options, self._lowered, self._connection = options, lowered, connection
        self._pool = Pool(options.cache, Role.CLIENT)
        self._lane = Lane(lowered.id, fingerprint, connection.peer_fingerprint, Terms(1, 1), TWO_PARTY, stock=True)
        self._refused = False

    def _open(self) -> AbstractContextManager[StockLane]:
        return opened(self._pool, self._lane, self._options.timeout, self._connection.peer_until)

    def make(self, positions: int, together: Together, progress: Callable[[float], None]) -> dict[str, Any]:
        """{`rows`, `index`, `maps`, `bytes` on this party's disk}."""
        found, connection = maps(self._lowered, positions), self._connection
        connection.meter.phase = "offline"
        with self._open() as shelf:
            spent, held = shelf.spent, max((header.last for _, header in shelf.stocks()), default=0)
            connection.send_control(Stock(positions, spent, held))
            reserved = connection.receive_control(Reserved)
            if reserved.index <= max(spent, held):
                raise ProtocolDesync("the server hands out an index that is in use", party="client", peer=connection.peer_name)
        header = Header(Role.CLIENT, self._lane.name(Role.CLIENT), reserved.index, reserved.serial, positions, found)
        with writing(self._pool, self._lane, header) as writer:

            def put(number: int, start: int, masks: Tensor, shares: Tensor) -> None:
                writer.put(number, start, masks, shares)
                progress((start + (number + 1) / len(found) * (len(shares) // found[number].each)) / positions)

            together.run(stocked(Role.CLIENT, found, positions, {}, put))
            self._keep(writer)
        return {"rows": positions, "index": reserved.index, "maps": len(found), "bytes": writer.size}

    def _keep(self, writer: Writer) -> None:
        writer.seal()
        with self._open() as shelf:
            shelf.add(writer.part, writer.header.index)
            try:
                self._connection.send_control(Kept())
                self._connection.receive_control(Kept)
            except BaseException:
                shelf.discard(writer.header.index)  # the server has none
                raise

    def draw(self, kinds: Sequence[Kind]) -> dict[int, tuple[Tensors, Tensors]]:
        """What of a pass comes from a stock, by place; nothing where there are not enough rows, and then all of it is made."""
        self._connection.meter.phase = "offline"
        found: dict[int, tuple[Tensors, Tensors]] = {}
        if not self._refused and self._pool.holds(self._lane):
            try:
                with self._open() as shelf:
                    found = self._draw(shelf, kinds)
            except ConfigError as error:
                log.warning("going on without a stock of rows: %s", error)
                self._refused = True
        if not found:
            self._connection.send_control(Draw())
        return found

    def _draw(self, shelf: StockLane, kinds: Sequence[Kind]) -> dict[int, tuple[Tensors, Tensors]]:
        for _ in range(TRIES):
            for path, header in shelf.stocks():
                count = positions_of(header.maps, kinds)
                first = max(header.index, shelf.spent + 1)
                if not count or first + count - 1 > header.last:
                    continue
                rows = shelf.take(path, header, first, count)
                if rows is None:
                    continue
                self._connection.send_control(Draw(first, count, header.serial))
                answer = self._connection.receive_control(Drawn)
                if answer.ok:
                    return dealt(header.maps, kinds, rows)
                if not answer.known:
                    log.warning("a stock of rows was removed: the server has lost its part")
                    shelf.discard(header.index)
                elif answer.spent < first:
                    raise ConfigError("the server cannot take its rows", remedy="look at the server's output")
                shelf.raise_to(answer.spent)
                break
            else:
                break
        return {}
