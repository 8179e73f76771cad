"""Queries prepared by several workers on a Ray cluster, for one store.

Each worker has a session of its own, and writes the client's file of a query beside its cache, without a name. The process that asked
copies it into its own store, and only then the worker tells the server, whose file gets its name last, as ever. So indices are the server's
to hand out, what is spent is marked in one place, and a worker that is lost leaves nothing that anybody would use: its query is prepared
anew, with other seeds, under another index.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from privinf.client.client import Client
from privinf.client.preprocessing import Shelf, told
from privinf.client.session import ClientSession
from privinf.client.text import check_length
from privinf.files import finish, part_file, refusals, sweep
from privinf.jobs.whom import Whom
from privinf.session.blame import sane
from privinf.session.cluster import Fleet, Remote, Work, connect
from privinf.session.marks import Lane
from privinf.session.options import MAX_NEW_TOKENS, Options
from privinf.session.pool import Pool, PoolLane
from privinf.session.prepared import Writer
from privinf.session.report import model_of
from protocols.correlations import Role
from protocols.errors import ConfigError, PrivinfError, ProtocolDesync, broke_off

SCRATCH = "farm"
"""Beside a worker's cache: files that are on their way."""
PIECE = 8 * 2**20
PATIENCE_S = 600.0


@dataclass(frozen=True, repr=False, kw_only=True)
class Asked(Whom):
    """What workers prepare, and with whom."""

    max_new_tokens: int = MAX_NEW_TOKENS
    logits: bool = False


class Preparer(Work):
    """A worker: one query at a time, `make`, then `read` to its end, then `keep`."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.client = asked.client()
        self._session: ClientSession | None = None
        self._query: contextlib.AbstractContextManager[Writer] | None = None
        self._part: Path | None = None

    def make(self, seq: int, shelf: Shelf) -> int:
        """Prepares a query of so many prompt tokens; the bytes of its file. A connection that breaks is tried anew, `tries` times."""
        for left in reversed(range(self.asked.tries)):
            try:
                return self._make(seq, shelf)
            except PrivinfError as error:
                if not left or not broke_off(error):
                    raise
        raise AssertionError("a worker tries at least once")

    def _make(self, seq: int, shelf: Shelf) -> int:
        assert self._query is None, "the query before was kept"
        scratch = self.asked.options.cache / SCRATCH
        for lane in (scratch / "prepared").glob("*"):
            sweep(lane)
        with self._or_drop():
            session = self._session = self._session or self.client.open([])
            made = session.prepare_for_another(seq, self.asked.max_new_tokens, self.asked.logits, shelf, scratch)
            writer = made.__enter__()
        self._query, self._part = made, writer.part
        return writer.size

    @contextlib.contextmanager
    def _or_drop(self) -> Iterator[None]:
        """A session in which something fails is not used again."""
        try:
            with sane(ProtocolDesync, "the server's public bundle makes no sense", party="client", peer=self.client.peers.named):
                yield
        except BaseException as error:
            if self._session is not None:
                self.client.drop(self._session.lines, error)
            self._session = None
            raise

    def read(self, at: int) -> bytes:
        """A piece of the file."""
        assert self._part is not None, "there is a query"
        with refusals(self._part), self._part.open("rb") as file:
            file.seek(at)
            return file.read(PIECE)

    def keep(self) -> None:
        """The file is where it belongs: the server is told, and this copy is removed."""
        assert self._query is not None, "there is a query"
        query, self._query, self._part = self._query, None, None
        with self._or_drop():
            query.__exit__(None, None, None)

    def close(self) -> None:
        """Ends its session; what was not kept is gone."""
        session, self._session = self._session, None
        if session is not None and self._query is None:
            with contextlib.suppress(PrivinfError):  # the server may be gone
                session.end()
        self.client.close()


class _Store:
    """The client's store, where the queries come to."""

    def __init__(self, options: Options, lanes: dict[int, Lane], until: float) -> None:
        self._pool, self._lanes, self._wait, self._until = Pool(options.cache, Role.CLIENT), lanes, options.timeout, until

    def _open(self, seq: int) -> contextlib.AbstractContextManager[PoolLane]:
        return self._pool.open(self._lanes[seq], self._wait, self._until)

    def begin(self, worker: Remote, seq: int) -> Any:
        """Has a query made, whose index is above all that is known of here."""
        with self._open(seq) as shelf:
            known = Shelf(shelf.spent, tuple(shelf.held().items()))
        return worker.begin("make", seq, known)

    def take(self, worker: Remote, seq: int, size: int) -> dict[str, Any]:
        """Copies it and gives it its name; then the server may."""
        directory = self._pool.cache / "prepared" / self._lanes[seq].name(Role.CLIENT)
        with contextlib.ExitStack() as stack:
            with refusals(directory):
                file, part = stack.enter_context(part_file(directory))
            for at in range(0, size, PIECE):
                piece = worker.ask("read", at)
                with refusals(directory):
                    file.write(piece)
            with refusals(directory):
                finish(file)
            with self._open(seq) as shelf:
                index = shelf.adopt(part)
            try:
                worker.ask("keep")
            except BaseException:
                with self._open(seq) as shelf:
                    shelf.discard(index)  # the server may have none
                raise
        return told(self._lanes[seq], index, size)


def prepare(
    server: str,
    *,
    dealer: str | None = None,
    keys: str,
    seq: Sequence[int],
    max_new_tokens: int = MAX_NEW_TOKENS,
    logits: bool = False,
    count: int = 1,
    sessions: int = 2,
    ray_address: str = "auto",
    patience: float = PATIENCE_S,
    options: Options | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """`Client.prepare` by `sessions` actors on a Ray cluster, into this process's cache; the same, but that `traffic` is None.

    What is prepared stays, also where this ends by force or raises: ConfigError for a cluster that is not there, has no room or another
    version, and whatever PrivinfError keeps a worker from preparing.
    """
    check_length(max_new_tokens)
    if not seq or count < 1 or sessions < 1:
        raise ConfigError("nothing to prepare", remedy="give at least one prompt length, a count of 1 and a session")
    whom: dict[str, Any] = {"server": server, "dealer": dealer, "keys": keys, "options": options or Options()}
    asked, tell = Asked(**whom, max_new_tokens=max_new_tokens, logits=logits), progress or (lambda phase, share: None)
    began = time.perf_counter()
    ray = connect(ray_address, asked.options.connect_s)
    with Client(server, dealer=dealer, keys=keys, options=asked.options, progress=tell) as client:
        session = client.connect()  # and the set-up, before several ask for it
        with sane(ProtocolDesync, "the server's public bundle makes no sense", party="client", peer=client.peers.named):
            lanes = {length: session.preprocessing.lane(session.preparing(length, max_new_tokens, logits)) for length in seq}
        store, model = _Store(asked.options, lanes, session.connection.peer_until), model_of(session.lowered)
    tasks = [length for length in seq for _ in range(count)]
    fleet = Fleet[int, dict[str, Any]](ray, partial(Remote, ray, Preparer, (asked,)), min(sessions, len(tasks)), patience)
    made = []
    with contextlib.closing(fleet.do(iter(tasks), store.begin, store.take)) as found:
        for one in found:
            made.append(one)
            tell("prepare", len(made) / len(tasks))
    return {"prepared": made, "stock": None, "seconds": time.perf_counter() - began, "traffic": None, "model": model}
