"""Who answers a job's requests: a client with one query at a time, which tries again where that may help.

Workers of one process may share a session (`Shared`): then their replies are made in the same passes. A session that breaks ends all
replies in it, and none of them is to be held to what another's request did: whatever is tried again is tried in a session of its own.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

from privinf.client.shared import Shared
from privinf.client.text import Prompt, Token
from privinf.gateway.wire import ApiError, as_api_error
from privinf.gateway.writer import Said, Writer
from privinf.jobs.request import Defaults, Request
from privinf.jobs.whom import Whom
from privinf.lowering.program import unbatched
from privinf.session.cluster import Work
from privinf.session.pool import Pool
from privinf.session.waiting import once_for_each_reason
from privinf.trust import DEALER
from protocols.errors import Code, ConfigError, PrivinfError, RefusedError, TransportError, broke_off

log = logging.getLogger("privinf.jobs")
PAUSE_S = 0.5
MOST_PAUSE_S = 30.0
ALONE = 4
"""Requests of one process that are tried alone at a time, where a session that they shared broke: or they would open one each at once."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Terms(Whom):
    """What a worker is made of, wherever it runs."""

    defaults: Defaults
    patience: float = 600.0
    text: bool = False


@dataclass(frozen=True)
class Reply:
    """A request's end: 200 and a completion, or another status and an error."""

    custom_id: str
    status: int
    body: dict[str, Any]


@dataclass
class _Counts:
    """Of one reply, as `gateway.wire` writes them."""

    prompt_tokens: int
    tokens: int
    finish_reason: str
    cached_tokens: int = 0


class Worker(Work):
    """Answers one request after the other; `close` from any thread ends the one that is being answered."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.dialling = once_for_each_reason(log.warning)
        self.waiting = once_for_each_reason(log.warning)
        """Told why a peer cannot be reached yet, and why nothing is answered for the moment; workers of one process have them in common."""
        self.client = terms.client(lambda reason, left: self.dialling(reason, left))
        self.shared: Shared | None = None
        """Where a request is tried first, if not in a session of its own."""
        self.alone = threading.Semaphore()
        """Held while it is answered in a session of its own."""
        self.shareable = False
        """Whether requests may be answered in a session with others', once `model` was asked for."""
        self._over = threading.Event()

    def model(self) -> tuple[str, str]:
        """The model's id and the trust model, by a handshake, and the set-up if it is not there; tries for as long as patience lasts."""
        until = time.monotonic() + self.terms.patience
        pause = PAUSE_S
        while True:
            try:
                session = self.client.connect()
                together = session.most > 1 and unbatched(session.lowered.graph) is None
                self.shareable = together and session.trust == DEALER and not self._prepared()
                return session.lowered.id, session.trust
            except PrivinfError as error:
                pause = self._wait(error, pause, until)

    def _prepared(self) -> bool:
        """Whether queries are prepared, which are for sessions of one query each."""
        return bool(Pool(self.terms.options.cache, "client").kept(self.client.peers.credentials.fingerprint)[0])

    def answer(self, number: int, line: str) -> Reply:
        """One request's reply. What another try may mend is tried again, `tries` times in all.

        A server or dealer that is away, full or has no budget left for this client says nothing of the request: for that it waits,
        and raises what they said when `patience` is over.
        """
        request = Request.read(number, line, text=self.terms.text)
        until, pause, left = time.monotonic() + self.terms.patience, PAUSE_S, self.terms.tries
        shared = self.shared
        while True:
            try:
                return Reply(request.custom_id, 200, self._completion(request, shared))
            except ApiError as error:
                return Reply(request.custom_id, error.status, error.body)
            except PrivinfError as error:
                if shared is not None and not isinstance(error, ConfigError):
                    shared = None
                    continue
                told = self._told(request, error)
                if told.status == 400:
                    return Reply(request.custom_id, told.status, told.body)
                if error.exit_code != 3:
                    left -= 1
                    if left <= 0:
                        return Reply(request.custom_id, told.status, told.body)
                pause = self._wait(error, pause, until)

    def _told(self, request: Request, error: PrivinfError) -> ApiError:
        """A failure as it is written; where the server gives no logits, with the field that takes them."""
        if error.code is Code.NO_LOGITS:
            try:
                request.wanted(self.terms.defaults, logits=False)
            except ApiError as named:
                return named
        return as_api_error(error)

    def _wait(self, error: PrivinfError, pause: float, until: float) -> float:
        """A pause before the next try, and how long the one after it is; raises the error where there is no time or no use."""
        if isinstance(error, ConfigError):
            raise error
        refused = isinstance(error, RefusedError)
        again = error.again(round(pause)) if refused else pause
        if again is None or (error.exit_code == 3 and not (refused or broke_off(error))):
            raise error
        wait = max(pause, float(again))
        if time.monotonic() + wait > until:
            raise error
        if error.exit_code == 3 and not self._over.is_set():
            self.waiting(f"{error.message}, trying again", until - time.monotonic())
        if self._over.wait(wait):
            raise TransportError("this job was ended", party="client")
        return min(2 * pause, MOST_PAUSE_S)

    def _completion(self, request: Request, shared: Shared | None) -> dict[str, Any]:
        prompt, most, sampling, ignore_eos = request.wanted(self.terms.defaults)
        text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        wishes: dict[str, Any] = {"max_new_tokens": most, "sampling": sampling, "ignore_eos": ignore_eos}
        tokens: list[Token]
        if shared is None:
            with self.alone:
                if self._over.is_set():
                    raise TransportError("this job was ended", party="client")
                tokens = list(self.client.generate(text, ids=ids, **wishes, retry=1))
                result = self.client.result
        else:
            with shared.seat() as seat:
                tokens = list(seat.generate(Prompt.read(seat.lowered, text, ids).ids, **wishes))
                assert seat.reply is not None, "it has ended"
                result = seat.reply.result()
        assert result is not None
        counts = _Counts(result["prompt_tokens"], len(tokens), result["finish_reason"])
        found = Writer(result["model"]["id"], chat=False).whole([Said(result["text"] or "")], [counts])
        if result["text"] is None:  # the model has no tokenizer
            found["choices"][0]["token_ids"] = result["tokens"]
        return found

    def close(self) -> None:
        """Ends it, and what it is doing."""
        self._over.set()
        self.client.close()


class Crew(Work):
    """Workers of one process: as many requests at a time as it has, each of a thread of its caller's, in one session where `together`."""

    def __init__(self, terms: Terms, count: int, together: bool, first: Worker | None = None) -> None:
        self.workers = [first or Worker(terms), *(Worker(terms) for _ in range(count - 1))]
        for worker in self.workers:
            worker.dialling, worker.waiting = self.workers[0].dialling, self.workers[0].waiting
        if count > 1 and together:
            shared = Shared(self.workers[0].client, count)
            alone = threading.Semaphore(ALONE)
            for worker in self.workers:
                worker.shared, worker.alone = shared, alone
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._free.put(worker)

    def answer(self, number: int, line: str) -> Reply:
        """As a worker's, of whichever is free; waits for one."""
        worker = self._free.get()
        try:
            return worker.answer(number, line)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """Ends all of them, and what they are doing."""
        if (shared := self.workers[0].shared) is not None:
            shared.settle()
        for worker in self.workers:
            worker.close()
