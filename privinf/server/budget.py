"""What a client may cost a server: a budget of outputs, kept on disk, and the limits of one session. All of it counts what is public.

An output is a token, rounded logits of one position, or the output of a lowered module: what one pass reveals. It is the unit in which
a model can be extracted through its replies, whatever the lengths of prompts. A client is the common name in its certificate, which
`keys renew` keeps.

    CACHE/budget/NAME.json    what a client has spent in the present window; NAME is a digest of its common name
    CACHE/budget/NAME.lock    locked by whoever reads or changes it
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from privinf.files import locked, refusals, write_private
from privinf.session.board import Board, Sent
from privinf.session.messages import Pass, Prepare, Run, Spend, Step, Stock
from privinf.session.service import Service
from privinf.transport.connection import Connection
from protocols.errors import Code, ConfigError, RefusedError
from protocols.party import Trace

log = logging.getLogger("privinf.server")
LESS = "ask for less, or begin another session"
MAX_REQUESTS = 1 << 16  # of one session: passes, and queries that are prepared or asked for


class Ledger(msgspec.Struct, frozen=True):
    """The content of a client's file; `since` is when the window began, seconds since the epoch."""

    client: str
    since: float
    spent: int


class Budget:
    """So many outputs for each client in each window, which begins with the first of them. Server processes may share the directory.

    An output is spent, durably, before it is computed: a crash loses it, and none is given twice.
    """

    def __init__(self, cache: Path, outputs: int, hours: float, wait_s: float, clock: Callable[[], float] = time.time) -> None:
        self.outputs, self.hours = outputs, hours
        self.spent: Counter[str] = Counter()  # by client, since this process began
        self._directory, self._wait_s, self._clock = cache / "budget", wait_s, clock
        self._guard = threading.Lock()  # sessions of this process wait here, which is quicker than for the file's lock

    def check(self, client: str) -> None:
        """RefusedError if nothing is left for a client; ConfigError where that cannot be known."""
        self._present(self._path(client), client)

    def spend(self, client: str, outputs: int = 1) -> None:
        """Spends so many outputs, or raises as `check` does, and then spends none."""
        path = self._path(client)
        with self._guard, locked(path.with_suffix(".lock"), self._wait_s):
            ledger = self._present(path, client, outputs)
            with refusals(path):
                write_private(path, msgspec.json.encode(msgspec.structs.replace(ledger, spent=ledger.spent + outputs)))
        self.spent[client] += outputs

    def _path(self, client: str) -> Path:
        return self._directory / f"{hashlib.sha256(client.encode()).hexdigest()[:32]}.json"

    def _present(self, path: Path, client: str, outputs: int = 1) -> Ledger:
        """What the present window has seen, if it has so many outputs left."""
        now, window = self._clock(), self.hours * 3600
        ledger = self._read(path, client)
        if ledger is None or now >= ledger.since + window:
            ledger = Ledger(client, now, 0)
        if ledger.spent + outputs > self.outputs:
            left = max(1, math.ceil(ledger.since + window - now))
            what = f"the budget of {self.outputs} outputs in {_hours(self.hours)} is used up"
            raise RefusedError.for_now(what, Code.BUDGET, after=left, party="server")
        return ledger

    def _read(self, path: Path, client: str) -> Ledger | None:
        try:
            ledger = msgspec.json.decode(path.read_bytes(), type=Ledger)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged"
            raise ConfigError(f"cannot read {path}: {reason}", party="server", remedy="restore the file, or remove it") from None
        if ledger.client != client:
            raise ConfigError(f"{path} is another client's", party="server", remedy="restore the file, or remove it")
        return ledger


def _hours(count: float) -> str:
    return f"{count:g} hour{'' if count == 1 else 's'}"


class SetUps:
    """So many bytes of set-up for each certificate in each window, which begins with the first of them; in memory. 0: no bound.

    With a board the memory is that of all processes.
    """

    def __init__(self, most: int, what: str, hours: float, clock: Callable[[], float] = time.monotonic, board: Board | None = None) -> None:
        self._board = board
        self._most, self._what, self._window, self._clock = most, what, hours * 3600, clock
        self._sent: Sent = {}
        self._guard = threading.Lock()

    def spend(self, client: str, size: int) -> None:
        """Counts what is about to be sent; RefusedError if it is too much."""
        with self._guard, contextlib.nullcontext(self._sent) if self._board is None else self._board.sent() as sent:
            now = self._clock()
            for each in [each for each, (since, _) in sent.items() if now >= since + self._window]:
                del sent[each]
            since, before = sent.get(client, (now, 0))
            if 0 < self._most < before + size:
                left = max(1, math.ceil(since + self._window - now))
                what = f"this certificate has been sent {self._what} in {_hours(self._window / 3600)}"
                remedy = "keep the client's --cache between sessions"
                raise RefusedError.for_now(what, Code.SET_UPS, after=left, party="server", remedy=remedy)
            sent[client] = since, before + size


class Allowance:
    """What one session may still cost. Everything raises RefusedError, before anything of what was asked for is spent."""

    def __init__(self, service: Service, connection: Connection, budget: Budget | None) -> None:
        self._service, self._connection, self._budget = service, connection, budget
        self._tokens = self._requests = 0

    def check(self, request: Pass | Step | Run | Prepare | Spend | Stock) -> None:
        """Whether a request is within the limits."""
        self._requests += 1
        if self._requests > MAX_REQUESTS:
            what = f"a session here answers at most {MAX_REQUESTS} requests"
            raise self._refusal(RefusedError(what, party="server", remedy="begin another session", code=Code.REQUESTS))
        if isinstance(request, Stock):
            return
        if not isinstance(request, Prepare):  # which reveals nothing
            self._ask(lambda budget: budget.check(self._connection.peer_subject))
        if isinstance(request, Run):
            return
        asked = request.count if isinstance(request, Pass | Step) else request.terms.seq + request.terms.tokens - 1
        limit, total = self._service.options.session_tokens, self._tokens + asked
        if 0 < limit < total:
            what = f"a session here takes at most {limit} tokens of prompt and reply, and this makes {total}"
            raise self._refusal(RefusedError(what, party="server", remedy=LESS, code=Code.TOKENS))
        if not isinstance(request, Spend):  # whose passes are asked for one by one
            self._tokens = total

    def afford(self, traces: Sequence[Trace], made: int) -> None:
        """Whether passes with these costs, and so many bytes to make the last, are within the limit: of elements, without the set-up's."""
        limit, cells = self._service.options.session_bytes, [self._connection.meter.total(phase) for phase in ("offline", "online")]
        total = sum(cell.payload_sent + cell.payload_received for cell in cells)
        total += made + sum(cost.online_bytes + cost.peer_offline_bytes for trace in traces for cost in trace.costs.values())
        if 0 < limit < total:
            what = f"a session here moves at most {limit} bytes, and this makes {total}"
            raise self._refusal(RefusedError(what, party="server", remedy=LESS, code=Code.BYTES))

    def spend(self, outputs: int) -> None:
        """So many outputs, of the client's budget."""
        if outputs:
            self._ask(lambda budget: budget.spend(self._connection.peer_subject, outputs))

    def _ask(self, question: Callable[[Budget], None]) -> None:
        if self._budget is None:
            return
        try:
            question(self._budget)
        except RefusedError as error:
            raise self._refusal(error) from None
        except ConfigError as error:  # the client is told that, and not where on our disk
            log.error("no output for client %s: %s", self._connection.peer_name, error)
            remedy = "look at the server's output"
            refusal = RefusedError("the server cannot keep its budgets", party="server", remedy=remedy, code=Code.DISK)
            raise self._refusal(refusal) from None

    def _refusal(self, error: RefusedError) -> RefusedError:
        self._service.refusal(error)
        return error
