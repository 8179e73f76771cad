"""The client: owns a prompt, alone learns the answer, and has no model but the public bundle."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from privinf.lowering.lowered import Lowered
from privinf.lowering.plan import weights_of
from privinf.lowering.private_tensor import Runtime
from privinf.lowering.program import module_output, next_token
from privinf.party.messages import Dealt, End, Join, Needs, Pass, Run, Session, SessionSeed, Welcome, greet
from privinf.party.options import MAX_NEW_TOKENS, Options
from privinf.party.report import result_of
from privinf.party.setup import ClientStore, packed_bytes
from privinf.party.text import Prompt, Streamer, Token
from privinf.transport.connection import Connection
from privinf.transport.frames import Kind
from privinf.transport.keys import load_credentials
from privinf.transport.listener import dial
from protocols.correlations import Role, Store
from protocols.errors import ConfigError, HandshakeError, PrivinfError, ProtocolDesync
from protocols.party import Offline, Online, Party

Progress = Callable[[str, float], None]  # (phase, share done)


@dataclass
class Timing:
    """Seconds: set-up, the offline steps in sum, and the online part of each new token."""

    setup_s: float
    offline_s: float
    tokens_s: list[float]


class Client:
    """`Client("server:7000", dealer="dealer:7001", keys="keys/").generate("def main(")`; also a context manager.

    Connecting happens at the first use: handshake, set-up (kept in the cache), a session token, the dealer. One session
    is one sequence; a second `generate` starts a new session. Raises PrivinfError and nothing else.
    """

    def __init__(self, server: str, *, dealer: str, keys: str, options: Options | None = None, progress: Progress | None = None) -> None:
        self.options = options or Options()
        self.server, self.dealer = server, dealer
        self.credentials = load_credentials(keys, "client")
        self._progress = progress or (lambda phase, share: None)
        self._session: ClientSession | None = None
        self.probe: Callable[[Party], Any] | None = None  # `privinf.party.probe` or `clock`, in local sessions alone
        self.result: dict[str, Any] | None = None  # of the last query, the contract's fields
        self.logits: list[Tensor] = []  # of its passes, where they were asked for

    def connect(self) -> ClientSession:
        """The session, made if there is none."""
        if self._session is None:
            self._session = ClientSession(self, self._progress)
        return self._session

    def generate(
        self,
        prompt: str | None = None,
        *,
        ids: Sequence[int] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        ignore_eos: bool = False,
        logits: bool = False,
    ) -> Iterator[Token]:
        """New tokens as they come, greedily. The prompt is a text, or ids where there is no tokenizer.

        With `logits` the server reveals rounded logits, if it allows it, and the client chooses. ConfigError for an empty
        or too long prompt. The numbers of prompt tokens and of new tokens are public.
        """
        if max_new_tokens < 1:
            raise ConfigError("at least one new token must be asked for")
        session = self.connect()
        try:
            start = Prompt.read(session.lowered, prompt, ids)
            if logits and not session.welcome.logits:
                raise HandshakeError("this server does not give logits", party="client", remedy="start it with --allow-logits")
            yield from session.generate(start, max_new_tokens, ignore_eos, logits)
            self.result, self.logits = result_of(session), session.logits
            session.end()
        finally:
            self.close()

    async def generate_async(self, prompt: str | None = None, **options: Any) -> AsyncIterator[Token]:
        """`generate` for services: the protocol runs in a worker thread."""
        import asyncio

        iterator, done = self.generate(prompt, **options), object()
        while (token := await asyncio.to_thread(next, iterator, done)) is not done:
            assert isinstance(token, Token)
            yield token

    def run(self, *inputs: Tensor) -> Tensor:
        """A private pass: a lowered module's output, or for a language model ids (1, T) to rounded logits (1, V)."""
        session = self.connect()
        try:
            output = session.run(inputs)
            self.result = result_of(session)
            session.end()
            return output
        finally:
            self.close()

    def close(self) -> None:
        """Ends the session; may be called again."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ClientSession:
    """One session with a server and its dealer."""

    def __init__(self, client: Client, progress: Progress) -> None:
        self.client, self.options, self.progress = client, client.options, progress
        self.timing = Timing(0.0, 0.0, [])
        self.prompt: Prompt | None = None
        self.tokens: list[int] = []
        self.streamer: Streamer | None = None
        self.finish_reason = "length"
        self.logits: list[Tensor] = []
        options = self.options
        self.connection = dial(client.server, client.credentials, "server", options.timeout, options.emulated)
        self.link: Connection | None = None
        try:
            self._set_up()
        except BaseException as error:
            self.close(error)
            raise

    def _set_up(self) -> None:
        began, connection = time.perf_counter(), self.connection
        connection.meter.phase = "setup"
        greet(connection)
        self.welcome = connection.receive_control(Welcome)
        expect = self.options.expect
        if expect and expect != self.welcome.model:
            raise HandshakeError(f"the server has the model {self.welcome.model}, not the expected {expect}", party="client", peer=self.client.server)
        store = ClientStore(self.options.cache)
        bundle = store.bundle(self.welcome.bundle)
        connection.send_control(Needs(() if bundle is not None else ("bundle",)))
        if bundle is None:
            bundle = self._receive_bundle(store)
        self.lowered = Lowered.from_bundle(bundle)
        if self.lowered.info.id != self.welcome.model:
            raise HandshakeError("the server's bundle is of another model than it says", party="client", peer=self.client.server)
        self.weights = {name: record for name, (record, _, _) in weights_of(self.lowered.graph).items()}
        model = self.welcome.model
        missing = store.missing(model, self.weights)
        connection.send_control(Needs(tuple(missing)), 16 * 2**20)
        connection.max_frame = 64 * 2**20
        for done, name in enumerate(missing):
            store.keep(model, self.weights[name], connection.receive(packed_bytes(self.weights[name])))
            self.progress("set-up", (done + 1) / len(missing))
        party = Party(Role.CLIENT, None, dict(store.load(model, self.weights)))
        party.on_label = lambda label: setattr(connection.meter, "label", label)
        self.runtime = Runtime.of(self.lowered.graph, party)
        token = connection.receive_control(Session).token
        connection.establish()
        self.link = dial(self.client.dealer, self.client.credentials, "dealer", self.options.timeout)
        self.link.meter.phase = "offline"
        greet(self.link)
        self.link.send_control(Join(token))
        self.store = Store(Role.CLIENT, self.link.receive_control(SessionSeed).seed, self.options.device)
        self.link.establish()
        self.timing.setup_s = time.perf_counter() - began

    def _receive_bundle(self, store: ClientStore) -> bytes:
        self.connection.max_frame = self.welcome.size
        bundle = bytes(self.connection.receive(self.welcome.size, Kind.CONTROL))
        self.connection.max_frame = 64 * 2**10
        if hashlib.sha256(bundle).hexdigest() != self.welcome.bundle:
            raise HandshakeError("the public bundle does not have the digest that the server gave", party="client", peer=self.client.server)
        store.keep_bundle(bundle)
        return bundle

    def generate(self, prompt: Prompt, max_new_tokens: int, ignore_eos: bool, logits: bool) -> Iterator[Token]:
        """Passes: one over the prompt, then one for each token but the last."""
        info = self.lowered.info
        self.prompt, self.streamer = prompt, Streamer(prompt.tokenizer)
        ids, stop = list(prompt.ids), set() if ignore_eos else set(info.eos)
        for _ in range(min(max_new_tokens, info.n_positions - len(prompt.ids) + 1)):
            out = self._pass(Pass(len(ids), logits), [torch.tensor([ids])])
            if logits:
                self.logits.append(out)
            token = int(out.argmax()) if logits else int(out)
            self.tokens.append(token)
            ids = [token]
            if token in stop:
                self.finish_reason = "stop"
                return
            yield Token(token, self.streamer.add(token))

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """See `Client.run`."""
        info = self.lowered.info
        if info.is_language_model:
            (ids,) = inputs
            self.prompt = Prompt.read(self.lowered, None, ids.reshape(-1).tolist())
            return self._pass(Pass(ids.shape[-1], True), [ids.reshape(1, -1).long()]).float()
        shapes = [tuple(size or 1 for size in spec.shape) for spec in info.inputs]
        if [tuple(x.shape) for x in inputs] != shapes:
            raise ConfigError(f"the module takes inputs of shapes {shapes}, not {[tuple(x.shape) for x in inputs]}")
        return self._pass(Run(), list(inputs))

    def _walk(self, runtime: Runtime, request: Pass | Run, inputs: list[Tensor], observe: Any = None) -> Tensor | None:
        if isinstance(request, Run):
            return module_output(self.lowered.graph, runtime, inputs, observe=observe)
        return next_token(self.lowered.graph, runtime, inputs[0], logits=request.logits, observe=observe)

    def _pass(self, request: Pass | Run, inputs: list[Tensor]) -> Tensor:
        """One query: what does not depend on it first, then the query itself."""
        began, meter, party = time.perf_counter(), self.connection.meter, self.runtime.party
        meter.phase, meter.label = "online", ("", "")
        self.connection.send_control(request)
        assert self.link is not None
        dealt = self.link.receive_control(Dealt)
        meter.phase = "offline"
        feed = _Feed(self.link, dealt.size, lambda share: self.progress("offline", share))
        ahead = Party(Role.CLIENT, None, party.weights)
        offline = ahead.engine = Offline(ahead, self.connection, self.store, feed.take)
        self._walk(self.runtime.sketch(ahead), request, [x.to("meta") for x in inputs])
        if offline.hash.digest() != dealt.digest or feed.left:
            raise ProtocolDesync("client and server ask for different correlations", party="client", remedy="install the same release on all machines")
        middle = time.perf_counter()
        meter.phase = "online"
        party.engine = Online(Role.CLIENT, self.connection, self.store)
        result = self._walk(self.runtime, request, inputs, self.client.probe(party) if self.client.probe else None)
        with party.label("", ""):  # what follows belongs to no operator
            pass
        assert result is not None
        self.timing.offline_s += middle - began
        self.timing.tokens_s.append(time.perf_counter() - middle)
        return result

    def end(self) -> None:
        """Says that no query follows."""
        self.connection.send_control(End())

    def close(self, error: BaseException | None = None) -> None:
        """Closes both connections; a peer that still listens is told why."""
        for connection in (self.connection, self.link):
            if connection is None:
                continue
            if isinstance(error, PrivinfError):
                with contextlib.suppress(PrivinfError):  # it may have gone already, which may be the error itself
                    connection.send_error(error.message)
            connection.close()


class _Feed:
    """The dealer's payload of one pass, cut into correlations as they are asked for."""

    def __init__(self, link: Connection, size: int, progress: Callable[[float], None]) -> None:
        self._link, self._total, self.left, self._progress = link, size, size, progress
        self._buffer = memoryview(b"")

    def take(self, size: int) -> memoryview:
        """The next bytes."""
        parts = []
        while size > len(self._buffer):
            if len(self._buffer):
                parts.append(self._buffer)
                size -= len(self._buffer)
            if self.left <= 0:
                raise ProtocolDesync("the dealer sent fewer correlations than are needed", party="client")
            self._buffer = self._link.receive()
            self.left -= len(self._buffer)
            self._progress(1 - max(self.left, 0) / max(self._total, 1))
        last, self._buffer = self._buffer[:size], self._buffer[size:]
        return memoryview(b"".join([*parts, last])) if parts else last


__all__ = ["Client", "ClientSession", "Token"]
