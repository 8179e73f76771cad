"""The client: owns a prompt, alone learns the answer, and has no model but the public bundle."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

from torch import Tensor

from privinf.client.result import result_of
from privinf.client.sampling import GREEDY, Sampling
from privinf.client.session import ClientSession, Progress
from privinf.client.text import Prompt, Token, check_length
from privinf.client.tokenizer import Own
from privinf.session.blame import sane
from privinf.session.options import MAX_NEW_TOKENS, Options
from privinf.session.waiting import once_for_each_reason
from privinf.transport.keys import load_credentials
from privinf.transport.listener import Waiting, parse_address
from protocols.errors import ConfigError, ProtocolDesync, TransportError
from protocols.party import Party

log = logging.getLogger("privinf.client")
PAUSE_S = 0.1
"""Before the first attempt after a break; then longer."""


class _Query:
    """One query, the sessions that it takes, and whether it may take another."""

    def __init__(self, retry: int, timeout_s: float) -> None:
        if isinstance(retry, bool) or not isinstance(retry, int) or retry < 0:
            raise ConfigError("a reply is begun anew a whole number of times", remedy="give a retry of 0 or more")
        self.made: list[ClientSession] = []
        self.over = threading.Event()  # its caller has turned away
        self._left, self._timeout_s, self._pause_s = retry, timeout_s, PAUSE_S
        self._tokens = -1  # at the last break
        self._broke: float | None = None  # when, time.monotonic()

    @property
    def left_s(self) -> float | None:
        """Seconds within which a broken connection must be replaced; None if none is broken."""
        return None if self._broke is None else max(PAUSE_S, self._broke + self._timeout_s - time.monotonic())

    def again(self, tokens: int) -> bool:
        """A connection broke after so many tokens: whether another one is to be tried, after a pause."""
        now = time.monotonic()
        if tokens > self._tokens:  # the last one got on
            self._tokens, self._broke, self._pause_s = tokens, now, PAUSE_S
        if self._left == 0 or self._broke is None or now > self._broke + self._timeout_s:
            return False
        self._left -= 1
        self._pause_s = min(2 * self._pause_s, 1.0)
        return not self.over.wait(self._pause_s)

    def check(self) -> None:
        """TransportError if the caller has turned away while a session was made."""
        if self.over.is_set():
            raise TransportError("this query was ended by its caller", party="client")


class Client:
    """`Client("server:7000", dealer="dealer:7001", keys="keys/").generate("def main(")`; also a context manager.

    Connecting happens at the first use: handshake, set-up (kept in the cache), a session token, the dealer. One session
    is one sequence, and every query has a session of its own, so that several threads may use one client. `progress` is told
    the phase and the share of it that is done, `waiting` why a peer cannot be reached yet and the seconds after which that is given
    up; the default writes it to the log. Raises PrivinfError and nothing else.
    """

    def __init__(
        self,
        server: str,
        *,
        dealer: str,
        keys: str,
        options: Options | None = None,
        progress: Progress | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        self.options = options or Options()
        self.server, self.dealer = server, dealer
        for address in (server, dealer):
            parse_address(address)  # a malformed one is noticed now
        self.credentials = load_credentials(keys, "client")
        pinned = self.options.expect_tokenizer
        self.tokenizer = None if self.options.tokenizer is None else Own.read(self.options.tokenizer, pinned)
        self._progress = progress or (lambda phase, share: None)
        self.waiting = waiting or once_for_each_reason(log.warning)
        self._guard = threading.Lock()
        self._waiting: ClientSession | None = None  # made by `connect`, for the next query
        self._sessions: set[ClientSession] = set()
        self._queries: set[_Query] = set()
        self.probe: Callable[[Party], Any] | None = None  # `privinf.local.probe` or `clock`, in local sessions alone
        self.result: dict[str, Any] | None = None  # of the last query that ended, the contract's fields
        self.logits: list[Tensor] = []  # of its passes, where they were asked for

    def connect(self) -> ClientSession:
        """The session that the next query will use, made if there is none."""
        with self._guard:
            waiting = self._waiting
        if waiting is None:
            waiting = self._open([])
            with self._guard:
                self._waiting = waiting
        return waiting

    def _open(self, made: list[ClientSession], connect_s: float | None = None) -> ClientSession:
        """A new session; who waits for it in another thread can end it through `made`."""
        session = ClientSession(self, self._progress)
        made.append(session)
        with self._guard:
            self._sessions.add(session)
        try:
            session.open(connect_s)
        except BaseException as error:
            self._drop(session, error)
            raise
        return session

    def _drop(self, session: ClientSession, error: BaseException | None = None) -> None:
        session.close(error)
        with self._guard:
            self._sessions.discard(session)
            if self._waiting is session:
                self._waiting = None

    @contextlib.contextmanager
    def _session(self, made: list[ClientSession], *, query: bool = True, connect_s: float | None = None) -> Iterator[ClientSession]:
        """A session for one query; its result is kept, and both peers are told how it ended."""
        with self._guard:
            session, self._waiting = self._waiting, None
        if session is not None and session.connection.lost():  # it has lain unused for longer than the server allows, say
            self._drop(session)
            session = None
        if session is not None:
            made.append(session)
        else:
            session = self._open(made, connect_s)
        try:
            yield session
            if query:
                with self._sane():
                    self.result, self.logits = result_of(session), session.logits
            session.end()
        except BaseException as error:
            self._drop(session, error)
            raise
        self._drop(session)

    def _sane(self) -> contextlib.AbstractContextManager[None]:
        return sane(ProtocolDesync, "the server's public bundle makes no sense", party="client", peer=f"server {self.server}")

    def prepare(
        self, seq: int | Sequence[int], *, max_new_tokens: int = MAX_NEW_TOKENS, logits: bool = False, count: int = 1
    ) -> dict[str, Any]:
        """Prepares `count` queries for each number of prompt tokens in `seq`, so that such a query later pays its online part only.

        A query uses one if its prompt has exactly that many tokens, it asks for at most `max_new_tokens`, and for logits or not as
        here, and if this client's options cut and pad it alike; each is used once. They are kept here and at the server. Returns
        {`prepared`: a list of {`seq`, `max_new_tokens`, `chunk`, `logits`, `index`, `bytes`}, `seconds`, `traffic`, `model`}.
        ConfigError for lengths that do not fit the model; HandshakeError where the server keeps no more.
        """
        wanted = [seq] if isinstance(seq, int) else list(seq)
        check_length(max_new_tokens)
        if min(count, len(wanted)) < 1:
            raise ConfigError("nothing to prepare", remedy="give at least one prompt length, and a count of 1")
        began = time.perf_counter()
        with self._session([], query=False) as session, self._sane():
            made = [session.prepare(length, max_new_tokens, logits) for length in wanted for _ in range(count)]
            found = result_of(session)
        return {"prepared": made, "seconds": time.perf_counter() - began, **{name: found[name] for name in ("traffic", "model")}}

    def generate(
        self,
        prompt: str | None = None,
        *,
        ids: Sequence[int] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        ignore_eos: bool = False,
        logits: bool = False,
        sampling: Sampling = GREEDY,
        retry: int = 0,
    ) -> Iterator[Token]:
        """New tokens as they come, the end token included. The prompt is a text, or ids where there is no tokenizer.

        Greedy unless `sampling` says otherwise. With `logits`, and for any choice but the greedy one, the server reveals rounded
        logits, if it allows it, and the client chooses. ConfigError for an empty or too long prompt. The numbers of prompt
        tokens and of new tokens are public, or what the options `pad_prompt` and `pad_reply` make of them: passes that pad a reply
        come after its last token, so let the iterator end by itself.

        Where a connection breaks, `retry` times at most a fresh session goes on with the reply, if it can be had within the timeout after
        the break. Its prompt is the old one and the tokens so far, so that the server learns how far the reply had come.
        """
        return self._generate(_Query(retry, self.options.timeout), prompt, ids, max_new_tokens, ignore_eos, logits, sampling)

    def _generate(
        self,
        query: _Query,
        prompt: str | None,
        ids: Sequence[int] | None,
        max_new_tokens: int,
        ignore_eos: bool,
        logits: bool,
        sampling: Sampling,
    ) -> Iterator[Token]:
        check_length(max_new_tokens)
        with self._guard:
            self._queries.add(query)
        begun: ClientSession | None = None
        try:
            while True:
                try:
                    with self._session(query.made, connect_s=query.left_s) as session:
                        query.check()
                        start, first = Prompt.read(session.lowered, prompt, ids), begun is None
                        yield from session.generate(start, max_new_tokens, ignore_eos, logits, sampling, prepared=first, begun=begun)
                    return
                except TransportError:
                    last = query.made[-1]
                    begun = begun if last.prompt is None else last
                    if not query.again(0 if begun is None else len(begun.tokens)):
                        raise
                    if last.whole:
                        self.result, self.logits = result_of(last), last.logits
                        return
        finally:
            with self._guard:
                self._queries.discard(query)

    async def generate_async(
        self,
        prompt: str | None = None,
        *,
        ids: Sequence[int] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        ignore_eos: bool = False,
        logits: bool = False,
        sampling: Sampling = GREEDY,
        retry: int = 0,
    ) -> AsyncGenerator[Token, None]:
        """`generate` for services: the protocol runs in a worker thread. Cancelling or closing it ends the session."""
        import asyncio

        query = _Query(retry, self.options.timeout)
        tokens, done = self._generate(query, prompt, ids, max_new_tokens, ignore_eos, logits, sampling), object()
        try:
            while (token := await asyncio.to_thread(next, tokens, done)) is not done:
                assert isinstance(token, Token)
                yield token
        finally:
            query.over.set()
            for session in query.made:  # a worker thread that still waits for a peer wakes
                await _aside(partial(self._drop, session))

    def run(self, *inputs: Tensor) -> Tensor:
        """A private pass: a lowered module's output, or for a language model ids (1, T) to rounded logits (1, V)."""
        with self._session([]) as session:
            return session.run(inputs)

    def close(self) -> None:
        """Ends every session, also one that another thread waits in; may be called again."""
        with self._guard:
            sessions = list(self._sessions)
            for query in self._queries:
                query.over.set()
        for session in sessions:
            self._drop(session)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await _aside(self.close)


async def _aside(work: Callable[[], None]) -> None:
    """Does it in a thread of its own: those of the event loop's executor may all be waiting for the peers that it is to end."""
    import asyncio

    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            work()
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, name="privinf-aside", daemon=True).start()
    await ended.wait()


__all__ = ["Client", "ClientSession", "Token"]
