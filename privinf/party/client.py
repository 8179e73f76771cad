"""The client: owns a prompt, alone learns the answer, and has no model but the public bundle."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Self

from torch import Tensor

from privinf.party.blame import sane
from privinf.party.options import MAX_NEW_TOKENS, Options
from privinf.party.report import result_of
from privinf.party.sampling import GREEDY, Sampling
from privinf.party.session import ClientSession, Progress
from privinf.party.text import Prompt, Token
from privinf.transport.keys import load_credentials
from privinf.transport.listener import parse_address
from protocols.errors import ConfigError, ProtocolDesync
from protocols.party import Party


class Client:
    """`Client("server:7000", dealer="dealer:7001", keys="keys/").generate("def main(")`; also a context manager.

    Connecting happens at the first use: handshake, set-up (kept in the cache), a session token, the dealer. One session
    is one sequence, and every query has a session of its own, so that several threads may use one client. Raises
    PrivinfError and nothing else.
    """

    def __init__(self, server: str, *, dealer: str, keys: str, options: Options | None = None, progress: Progress | None = None) -> None:
        self.options = options or Options()
        self.server, self.dealer = server, dealer
        for address in (server, dealer):
            parse_address(address)  # a malformed one is noticed now
        self.credentials = load_credentials(keys, "client")
        self._progress = progress or (lambda phase, share: None)
        self._guard = threading.Lock()
        self._waiting: ClientSession | None = None  # made by `connect`, for the next query
        self._sessions: set[ClientSession] = set()
        self.probe: Callable[[Party], Any] | None = None  # `privinf.party.probe` or `clock`, in local sessions alone
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

    def _open(self, made: list[ClientSession]) -> ClientSession:
        """A new session; who waits for it in another thread can end it through `made`."""
        session = ClientSession(self, self._progress)
        made.append(session)
        with self._guard:
            self._sessions.add(session)
        try:
            session.open()
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
    def _session(self, made: list[ClientSession], *, query: bool = True) -> Iterator[ClientSession]:
        """A session for one query; its result is kept, and both peers are told how it ended."""
        with self._guard:
            session, self._waiting = self._waiting, None
        if session is not None and session.connection.lost():  # it has lain unused for longer than the server allows, say
            self._drop(session)
            session = None
        if session is not None:
            made.append(session)
        else:
            session = self._open(made)
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
        if min(max_new_tokens, count, len(wanted)) < 1:
            raise ConfigError("nothing to prepare", remedy="give at least one prompt length, one new token, and a count of 1")
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
    ) -> Iterator[Token]:
        """New tokens as they come, the end token included. The prompt is a text, or ids where there is no tokenizer.

        Greedy unless `sampling` says otherwise. With `logits`, and for any choice but the greedy one, the server reveals rounded
        logits, if it allows it, and the client chooses. ConfigError for an empty or too long prompt. The numbers of prompt
        tokens and of new tokens are public, or what the options `pad_prompt` and `pad_reply` make of them: passes that pad a reply
        come after its last token, so let the iterator end by itself.
        """
        return self._generate([], prompt, ids, max_new_tokens, ignore_eos, logits, sampling)

    def _generate(
        self,
        made: list[ClientSession],
        prompt: str | None,
        ids: Sequence[int] | None,
        max_new_tokens: int,
        ignore_eos: bool,
        logits: bool,
        sampling: Sampling,
    ) -> Iterator[Token]:
        if max_new_tokens < 1:
            raise ConfigError("at least one new token must be asked for", remedy="give 1 or more")
        with self._session(made) as session:
            start = Prompt.read(session.lowered, prompt, ids)
            yield from session.generate(start, max_new_tokens, ignore_eos, logits, sampling, prepared=True)

    async def generate_async(
        self,
        prompt: str | None = None,
        *,
        ids: Sequence[int] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        ignore_eos: bool = False,
        logits: bool = False,
        sampling: Sampling = GREEDY,
    ) -> AsyncIterator[Token]:
        """`generate` for services: the protocol runs in a worker thread. Cancelling it ends the session."""
        import asyncio

        made: list[ClientSession] = []
        tokens, done = self._generate(made, prompt, ids, max_new_tokens, ignore_eos, logits, sampling), object()
        try:
            while (token := await asyncio.to_thread(next, tokens, done)) is not done:
                assert isinstance(token, Token)
                yield token
        finally:
            for session in made:  # a worker thread that still waits for a peer wakes
                await asyncio.to_thread(self._drop, session)

    def run(self, *inputs: Tensor) -> Tensor:
        """A private pass: a lowered module's output, or for a language model ids (1, T) to rounded logits (1, V)."""
        with self._session([]) as session:
            return session.run(inputs)

    def close(self) -> None:
        """Ends every session, also one that another thread waits in; may be called again."""
        with self._guard:
            sessions = list(self._sessions)
        for session in sessions:
            self._drop(session)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


__all__ = ["Client", "ClientSession", "Token"]
