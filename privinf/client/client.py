"""The client: owns a prompt, alone learns the answer, and has no model but the public bundle."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self, Unpack, overload

from torch import Tensor

from privinf.client.joining import join
from privinf.client.lines import Lines, Peers, Progress
from privinf.client.listed import several
from privinf.client.replies import Replies
from privinf.client.reply import Attempts, Output, Reply, traffic
from privinf.client.sampling import GREEDY, Sampling
from privinf.client.session import ClientSession
from privinf.client.text import Prompt, Token, check_length
from privinf.client.tokenizer import Own
from privinf.client.wanted import Wanted, Wishes
from privinf.session.blame import sane
from privinf.session.options import MAX_NEW_TOKENS, Options, with_trust
from privinf.session.report import model_of
from privinf.session.waiting import once_for_each_reason
from privinf.transport.keys import load_credentials
from privinf.transport.listener import Waiting, parse_address
from privinf.trust import DEALER, TWO_PARTY
from protocols.errors import ConfigError, ProtocolDesync

log = logging.getLogger("privinf.client")


class Client:
    """`Client("server:7000", dealer="dealer:7001", keys="keys/").generate("def main(")`; also a context manager.

    Connecting happens at the first use: handshake, set-up (kept in the cache), a session token, the dealer if the server has one. Another
    trust model than `trust`, `dealer` or `two-party`, is refused if it is given; no dealer is needed for the second. One session
    is one sequence, and every query has a session of its own, so that several threads may use one client. `progress` is told
    the phase and the share of it that is done, `waiting` why a peer cannot be reached yet and the seconds after which that is given
    up; the default writes it to the log. Raises PrivinfError and nothing else.
    """

    def __init__(
        self,
        server: str,
        *,
        dealer: str | None = None,
        keys: str,
        trust: str | None = None,
        options: Options | None = None,
        progress: Progress | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        options = with_trust(options, trust)
        for address in (server, *(() if dealer is None else (dealer,))):
            parse_address(address)  # a malformed one is noticed now
        if options.trust == DEALER and dealer is None:
            raise ConfigError("no dealer was given", remedy=f"give a dealer's address, or the trust model {TWO_PARTY}")
        credentials = load_credentials(keys, "client")
        tokenizer = None if options.tokenizer is None else Own.read(options.tokenizer, options.expect_tokenizer)
        progress, waiting = progress or (lambda phase, share: None), waiting or once_for_each_reason(log.warning)
        self.peers = Peers(server, dealer, credentials, options, tokenizer, progress, waiting)
        self._guard = threading.Lock()
        self._waiting: ClientSession | None = None  # made by `connect`, for the next query
        self._lines: set[Lines] = set()
        self._queries: set[Attempts] = set()
        self.result: dict[str, Any] | None = None  # of the last query that ended, the contract's fields; of a list, of each (`replies`)
        self.logits: list[Tensor] = []  # of its passes, where they were asked for

    @property
    def options(self) -> Options:
        """Of all its sessions."""
        return self.peers.options

    @property
    def sessions(self) -> int:
        """How many there are, also those that are still being made."""
        return len(self._lines)

    def connect(self) -> ClientSession:
        """The session that the next query will use, made if there is none."""
        with self._guard:
            waiting = self._waiting
        if waiting is None:
            waiting = self.open([])
            with self._guard:
                self._waiting = waiting
        return waiting

    def open(self, made: list[Lines], connect_s: float | None = None) -> ClientSession:
        """The session of `connect`, or a new one, to be ended by `drop`; who waits for it in another thread can end it through `made`."""
        with self._guard:
            waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.lines.lost():
            made.append(waiting.lines)
            return waiting
        if waiting is not None:  # it has lain unused for longer than the server allows, say
            self.drop(waiting.lines)
        lines = Lines(self.peers)
        made.append(lines)
        with self._guard:
            self._lines.add(lines)
        try:
            return ClientSession(lines, join(lines, connect_s))
        except BaseException as error:
            self.drop(lines, error)
            raise

    def drop(self, lines: Lines, error: BaseException | None = None) -> None:
        """Closes a session's connections, from any thread, and tells peers that still listen why."""
        lines.close(error)
        with self._guard:
            self._lines.discard(lines)
            if self._waiting is not None and self._waiting.lines is lines:
                self._waiting = None

    @contextlib.contextmanager
    def _session(self, made: list[Lines], connect_s: float | None = None) -> Iterator[ClientSession]:
        """A session for one query; both peers are told how it ended."""
        session = self.open(made, connect_s)
        try:
            yield session
            session.end()
        except BaseException as error:
            self.drop(session.lines, error)
            raise
        finally:
            session.replays.end()
        self.drop(session.lines)

    def _keep(self, reply: Reply) -> None:
        with self._sane():
            self.result, self.logits = reply.result(), reply.logits

    def _keep_all(self, result: dict[str, Any]) -> None:
        self.result, self.logits = result, []

    def _sane(self) -> contextlib.AbstractContextManager[None]:
        return sane(ProtocolDesync, "the server's public bundle makes no sense", party="client", peer=self.peers.named)

    def prepare(
        self, seq: int | Sequence[int], *, max_new_tokens: int = MAX_NEW_TOKENS, logits: bool = False, count: int = 1, stock: int = 0
    ) -> dict[str, Any]:
        """Prepares `count` queries for each number of prompt tokens in `seq`, so that such a query later pays its online part only.

        A query uses one if its prompt has exactly that many tokens, it asks for at most `max_new_tokens`, and for logits or not as
        here, and if this client's options cut and pad it alike; each is used once. They are kept here and at the server. Returns
        {`prepared`: a list of {`seq`, `max_new_tokens`, `chunk`, `logits`, `index`, `bytes`}, `stock`: None, or {`rows`, `index`, `maps`,
        `bytes`}, `seconds`, `traffic`, `model`}. Where the two are alone, `stock` asks for rows of the linear maps for so many positions,
        made first: any later pass takes its rows from there for as long as there are enough. `seq` may be empty then.
        ConfigError for lengths that do not fit the model; HandshakeError where the server keeps no more.
        """
        wanted = [seq] if isinstance(seq, int) else list(seq)
        check_length(max_new_tokens)
        if count < 1 or stock < 0 or not (wanted or stock):
            raise ConfigError("nothing to prepare", remedy="give at least one prompt length, and a count of 1, or a stock of rows")
        began = time.perf_counter()
        with self._session([]) as session, self._sane():
            stocked = session.stock(stock) if stock else None
            made = [session.prepare(length, max_new_tokens, logits) for length in wanted for _ in range(count)]
            found = {"traffic": traffic(session), "model": model_of(session.lowered)}
        return {"prepared": made, "stock": stocked, "seconds": time.perf_counter() - began, **found}

    @overload
    def generate(
        self, prompt: str | None = None, *, ids: Sequence[int] | None = None, retry: int = 0, **wishes: Unpack[Wishes]
    ) -> Iterator[Token]: ...

    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], *, ids: None = None, retry: int = 0, **wishes: Unpack[Wishes]) -> Replies: ...

    @overload
    def generate(self, prompt: None = None, *, ids: Sequence[Sequence[int]], retry: int = 0, **wishes: Unpack[Wishes]) -> Replies: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...] | None = None,
        *,
        ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        ignore_eos: bool = False,
        logits: bool = False,
        sampling: Sampling = GREEDY,
        logprobs: int | None = None,
        score_prompt: bool = False,
        retry: int = 0,
    ) -> Iterator[Token] | Replies:
        """New tokens as they come, the end token included. The prompt is a text, or ids where there is no tokenizer.

        Greedy unless `sampling` says otherwise. With `logits`, and for any choice but the greedy one, the server reveals rounded
        logits, if it allows it, and the client chooses. ConfigError for an empty or too long prompt. The numbers of prompt
        tokens and of new tokens are public, or what the options `pad_prompt` and `pad_reply` make of them: passes that pad a reply
        come after its last token, so let the iterator end by itself.

        With `logprobs=k` a token has its log-probability, and those of the k most probable (`Token.score`), of the logits that the server
        must grant. With `score_prompt` too the prompt's tokens have theirs, as `prompt_logprobs` of the result: the server reveals logits
        of every position of the prompt, each an output of its budget.

        Where a connection breaks, `retry` times at most a fresh session goes on with the reply, if it can be had within the timeout after
        the break. Its prompt is the old one and the tokens so far, so that the server learns how far the reply had come.

        A list of prompts, or of their ids, is answered together, for about the rounds and not much more than the time of one: pairs of an
        index and a token come, see `Replies`. No prepared query is used, and nothing begun anew after a break (`retry` must be 0).
        """
        wanted = Wanted(max_new_tokens, ignore_eos, logits, sampling, logprobs, score_prompt)
        if several(prompt, ids):
            if retry:
                raise ConfigError("a list of prompts is not begun anew", remedy="leave retry out, or ask for one after the other")
            return Replies(self._session([]), prompt, ids, wanted, self._keep_all)  # type: ignore[arg-type]
        return self._generate(Attempts(retry, self.options.timeout), prompt, ids, wanted)  # type: ignore[arg-type]

    def _generate(self, query: Attempts, prompt: str | None, ids: Sequence[int] | None, wanted: Wanted) -> Iterator[Token]:
        def attempt(connect_s: float | None) -> Iterator[Token]:
            with self._session(query.made, connect_s) as session:
                query.check()
                start, first = Prompt.read(session.lowered, prompt, ids), query.reply is None
                reply = query.reply = query.reply or Reply(len(start.ids), start.tokenizer, wanted)
                yield from reply.generate(session, start.ids, prepared=first)
                self._keep(reply)

        with self._guard:
            self._queries.add(query)
        try:
            if not (yield from query.carry_on(attempt)) and query.reply is not None:
                self._keep(query.reply)
        finally:
            with self._guard:
                self._queries.discard(query)

    async def generate_async(
        self, prompt: str | None = None, *, ids: Sequence[int] | None = None, retry: int = 0, **wishes: Unpack[Wishes]
    ) -> AsyncGenerator[Token, None]:
        """`generate` for services, with the same arguments: in a worker thread. Cancelling or closing it ends the session."""
        import asyncio

        query, done = Attempts(retry, self.options.timeout), object()
        tokens = self._generate(query, prompt, ids, Wanted(**wishes))
        try:
            while (token := await asyncio.to_thread(next, tokens, done)) is not done:
                assert isinstance(token, Token)
                yield token
        finally:
            query.over.set()
            for lines in query.made:  # a worker thread that still waits for a peer wakes
                await _aside(partial(self.drop, lines))

    def run(self, *inputs: Tensor) -> Tensor:
        """A private pass: a lowered module's output, or for a language model ids (1, T) to rounded logits (1, V)."""
        with self._session([]) as session:
            output = Output()
            found = output.run(session, inputs)
            self._keep(output)
        return found

    def close(self) -> None:
        """Ends every session, also one that another thread waits in; may be called again."""
        with self._guard:
            sessions = list(self._lines)
            for query in self._queries:
                query.over.set()
        for lines in sessions:
            self.drop(lines)

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
