"""One session of the client: handshake, set-up, and the passes of a query."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from privinf.client.payload import OneWay, Payload
from privinf.client.preprocessing import prepare_at_client, spend_at_client
from privinf.client.sampling import GREEDY, Sampler, Sampling
from privinf.client.setup import ClientStore, parts_of, receive_bundle, receive_part
from privinf.client.text import Prompt, Streamer, Token
from privinf.client.tokenizer import settle
from privinf.graph.private import Runtime, weights_of
from privinf.lowering.program import module_output, next_token
from privinf.lowering.steps import padded
from privinf.session.blame import farewell, sane
from privinf.session.devices import walking
from privinf.session.marks import Lane
from privinf.session.messages import MAX_KINDS, Dealt, End, Join, Needs, Pass, Run, Session, SessionSeed, Terms, Welcome, greet
from privinf.session.pool import Pool, PoolLane
from privinf.session.prepared import Prepared
from privinf.transport.connection import Connection
from privinf.transport.listener import dial
from privinf.transport.shaper import Link
from protocols.correlations import Role
from protocols.errors import ConfigError, HandshakeError, ProtocolDesync, TransportError
from protocols.party import Offline, Online, Party
from protocols.ring import unpack
from protocols.sources.dealer import Store

if TYPE_CHECKING:
    from privinf.client.client import Client

Progress = Callable[[str, float], None]  # (phase, share done)


@dataclass
class Timing:
    """Seconds: set-up, the offline steps in sum, the online part of each new token, and that of passes that only pad a reply."""

    setup_s: float
    offline_s: float
    tokens_s: list[float]
    padding_s: float = 0.0

    def after(self, earlier: Timing) -> Timing:
        """Of a reply that began in an earlier session."""
        tokens, padding = [*earlier.tokens_s, *self.tokens_s], earlier.padding_s + self.padding_s
        return Timing(earlier.setup_s + self.setup_s, earlier.offline_s + self.offline_s, tokens, padding)


class ClientSession:
    """One session with a server and its dealer."""

    def __init__(self, client: Client, progress: Progress) -> None:
        self.client, self.options, self.progress = client, client.options, progress
        self.timing = Timing(0.0, 0.0, [])
        self.prompt: Prompt | None = None
        self.tokens: list[int] = []
        self.shown = (0, 0)  # prompt tokens and new tokens of the last query as the server saw them, padding included
        self.streamer: Streamer | None = None
        self.sampler: Sampler | None = None
        self.whole = False  # all tokens of the reply are here
        self.earlier: list[ClientSession] = []  # in which the reply began, and which broke
        self.finish_reason = "length"
        self.logits: list[Tensor] = []
        self.link: Connection | None = None
        self.stock = Pool(self.options.cache, Role.CLIENT)
        self.prepared: Prepared | None = None  # the prepared query that this one uses
        self._closed = threading.Event()
        self._dialled: list[Connection] = []
        self._masked: dict[str, Tensor] = {}  # the masked weights
        self._unshown_s = 0.0  # online seconds of passes since the last output

    def __repr__(self) -> str:
        return f"ClientSession({self.client.server}, prompt and tokens hidden)"

    @property
    def connections(self) -> list[Connection]:
        """To the server, and once that was reached to the dealer."""
        return list(self._dialled)

    def open(self, connect_s: float | None = None) -> None:
        """Handshake, set-up and the dealer; tries for `connect_s` seconds to reach the server, by default as the options say."""
        began = time.perf_counter()
        wait = self.options.connect_s if connect_s is None else connect_s
        self.connection = self._dial(self.client.server, "server", wait, self.options.emulated)
        self.connection.meter.phase = "setup"
        with sane(HandshakeError, "the server's public bundle makes no sense", party="client", peer=self.client.server):
            token = self._set_up(self.connection)
        self.connection.establish()
        self.link = link = self._dial(self.client.dealer, "dealer", self.options.connect_s)
        link.meter.phase = "offline"
        greet(link)
        link.send_control(Join(token))
        self.store = Store(Role.CLIENT, link.receive_control(SessionSeed).seed, self.options.device)
        link.establish()
        self.timing.setup_s = time.perf_counter() - began

    def _dial(self, address: str, role: str, connect_s: float, emulated: Link | None = None) -> Connection:
        waiting = self.client.waiting
        connection = dial(address, self.client.credentials, role, self.options.timeout, emulated, connect_s=connect_s, waiting=waiting)
        self._dialled.append(connection)
        if self._closed.is_set():  # meanwhile, by another thread
            connection.close()
        return connection

    def _set_up(self, connection: Connection) -> bytes:
        """Compares versions and models, and fetches what is not kept of the model; the session's token."""
        greet(connection)
        self.welcome = connection.receive_control(Welcome)
        expect, model, peer = self.options.expect, self.welcome.model, f"server {self.client.server}"
        if expect and expect != model:
            what, remedy = f"the server has the model {model!r}, not the expected {expect!r}", "compare with what `privinf serve` prints"
            raise HandshakeError(what, party="client", peer=peer, remedy=remedy)
        store = ClientStore(self.options.cache)
        self.lowered = receive_bundle(connection, self.welcome, store, peer)
        settle(self.lowered, self.client.tokenizer, self.options.expect_tokenizer, peer)
        parts = parts_of(self.lowered, peer)
        self.weights = {name: weight for name, (weight, _) in parts.items()}
        missing = [name for name, (_, item) in parts.items() if not self._take(name, store.load(model, name, item))]
        store.sweep(model)
        connection.send_control(Needs(tuple(missing)), MAX_KINDS)
        connection.max_frame = 64 * 2**20
        nodes = {name: node for name, (_, node, _) in weights_of(self.lowered.graph).items()}
        for done, name in enumerate(missing):
            connection.meter.label = nodes[name].label
            data = receive_part(connection, name, parts[name][1], peer)
            store.keep(model, parts[name][1], data)
            self._take(name, data)
            self.progress("set-up", (done + 1) / len(missing))
        connection.meter.label = ("", "")
        party = Party(Role.CLIENT, None, self._masked)
        party.on_label = lambda label: setattr(connection.meter, "label", label)
        self.runtime = Runtime.of(self.lowered.graph, party, self.options.device)
        return connection.receive_control(Session).token

    def _take(self, name: str, data: bytes | memoryview | None) -> bool:
        """Takes a masked weight that has been checked, if there is one."""
        if data is not None:
            weight = self.weights[name]
            self._masked[name] = unpack(memoryview(data), weight.shape, weight.bits).to(self.options.device)
        return data is not None

    def want_logits(self) -> None:
        """HandshakeError unless the server gives them."""
        if not self.welcome.logits:
            peer = f"server {self.client.server}"
            raise HandshakeError("this server does not give logits", party="client", peer=peer, remedy="start it with --allow-logits")

    # ---- queries prepared ahead of time

    def lane(self, terms: Terms) -> Lane:
        """Of queries that are prepared on these terms."""
        return Lane(self.lowered.id, self.client.credentials.fingerprint, self.connection.peer_fingerprint, terms)

    def shelf(self, lane: Lane) -> contextlib.AbstractContextManager[PoolLane]:
        """A lane of this session's, see `Stock.open`."""
        return self.stock.open(lane, self.options.timeout, self.connection.peer_until)

    def lanes(self, terms: Terms) -> list[Lane]:
        """Those of which a prepared query may be here."""
        model, fingerprint = self.lowered.id, self.client.credentials.fingerprint
        return self.stock.lanes(model, fingerprint, self.connection.peer_fingerprint, terms)

    def prepare(self, seq: int, max_new_tokens: int, logits: bool) -> dict[str, Any]:
        """Prepares one query, see `Client.prepare`."""
        if logits:
            self.want_logits()
        n_positions = self.lowered.info.n_positions
        if not self.lowered.info.is_language_model:
            raise ConfigError("this model is no language model; nothing can be prepared for it")
        if not 1 <= seq <= n_positions:
            raise ConfigError(f"a prompt has 1 to {n_positions} tokens with this model, not {seq}")
        return prepare_at_client(self, self._terms(seq, max_new_tokens, logits))

    def _terms(self, seq: int, tokens: int, logits: bool) -> Terms:
        """A query as the server may see it: padded as the options say, and cut to what the context has room for."""
        options, room = self.options, self.lowered.info.n_positions - self.runtime.offset
        seq = padded(seq, options.pad_prompt, room)
        most = room - seq + 1
        return Terms(seq, padded(min(tokens, most), options.pad_reply, most), logits, options.chunk if options.chunk < seq else 0)

    def _spend(self, terms: Terms) -> None:
        """From here on a query that was prepared is used, if one fits."""
        began = time.perf_counter()
        self.prepared = spend_at_client(self, terms)
        if self.prepared is not None:
            self.store = self.prepared.store(self.options.device)
        self.timing.offline_s += time.perf_counter() - began

    def fresh_runtime(self) -> Runtime:
        """An empty context, for a query that is prepared."""
        return Runtime.of(self.lowered.graph, Party(Role.CLIENT), self.options.device)

    # ---- queries

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        ignore_eos: bool,
        logits: bool,
        sampling: Sampling = GREEDY,
        *,
        prepared: bool = False,
        after: int = 0,
        begun: ClientSession | None = None,
    ) -> Iterator[Token]:
        """Passes: over the prompt, which goes on from what the session has cached, then one for each token but the last.

        With `prepared` a query that was prepared is used if one fits; then the session is over after this query. What pads the prompt
        stands in front of it, but after its first `after` ids; what pads the reply are passes after its last token, and a caller
        who turns away before the iterator has ended leaves them out. With `begun` the reply goes on that broke in that session: after
        its prompt, padded as it was, and its tokens, with what is left of its sampler's random numbers.
        """
        info, revealed = self.lowered.info, logits or not sampling.greedy
        if revealed:
            self.want_logits()
        self.prompt, self.streamer, self.sampler = prompt, Streamer(prompt.tokenizer, sampling.stop), Sampler(sampling)
        self.tokens, self.logits, self.finish_reason, self.whole = [], [], "length", False
        stop = {*sampling.stop_ids, *(() if ignore_eos else info.eos)}
        terms = self._terms(len(prompt.ids), max_new_tokens, revealed)
        room = info.n_positions - self.runtime.offset - terms.seq + 1  # for new tokens
        ids = self._filled(prompt.ids, terms.seq, after)
        if begun is not None:
            self._go_on(begun)
            ids += self.tokens
            terms = Terms(len(ids), terms.tokens - len(self.tokens), revealed, self.options.chunk if self.options.chunk < len(ids) else 0)
        first = len(self.tokens)
        if prepared:
            self._spend(terms)
        for left in reversed(range(min(max_new_tokens - first, terms.tokens))):
            out = self._next(self.tokens[-1], revealed) if len(self.tokens) > first else self._prefill(ids, terms)
            if logits:
                self.logits.append(out)
            token = self.sampler.choose(out) if revealed else int(out)
            if not 0 <= token < info.vocab:
                raise ProtocolDesync("the output is no token of the vocabulary", party="client", peer=f"server {self.client.server}")
            self.tokens.append(token)
            text = None if token in stop else self.streamer.add(token)
            if token in stop or self.streamer.stopped:
                self.finish_reason, left = "stop", 0
            self.whole = left == 0
            yield Token(token, self.streamer.rest() if text is None else text if left else text + (self.streamer.rest() or ""))
            if self.finish_reason == "stop":
                break
        for _ in range(padded(len(self.tokens), self.options.pad_reply, room) - len(self.tokens)):
            self._next(self.tokens[-1], revealed)  # like any other to the server; what it reveals is dropped
            self.timing.padding_s += self.timing.tokens_s.pop()

    def _go_on(self, begun: ClientSession) -> None:
        """Takes over a reply, of which the other session says no more; HandshakeError if it was another model's."""
        if self.lowered.id != begun.lowered.id:
            peer = f"server {self.client.server}"
            raise HandshakeError("the server has another model now, so that the reply cannot go on", party="client", peer=peer)
        self.earlier, self.timing = [*begun.earlier, begun], self.timing.after(begun.timing)
        self.streamer, self.sampler, self.tokens, self.logits = begun.streamer, begun.sampler, begun.tokens, begun.logits

    def _filled(self, ids: Sequence[int], seq: int, after: int) -> list[int]:
        """A prompt of `seq` tokens: end tokens in front of it where it has fewer."""
        info = self.lowered.info
        end = info.eos[0] if info.eos else info.bos
        if not self.options.pad_prompt:
            return list(ids)
        if end is None:
            raise ConfigError("this model names no end token with which a prompt could be padded", remedy="leave --pad-prompt out")
        return [*ids[:after], *[end] * (seq - len(ids)), *ids[after:]]

    def _prefill(self, ids: Sequence[int], terms: Terms) -> Tensor:
        """The output after these ids, in passes of at most the chunk's size."""
        done, found, self.shown = 0, None, (terms.seq, 0)
        for request in terms.prefill:
            found = self._pass(request, [torch.tensor([ids[done : done + request.count]])])
            done += request.count
        assert found is not None
        return found

    def _next(self, token: int, logits: bool) -> Tensor:
        """The output after one more token."""
        found = self._pass(Pass(1, logits), [torch.tensor([[token]])])
        assert found is not None
        return found

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """See `Client.run`."""
        info = self.lowered.info
        shapes = [tuple(size or 1 for size in spec.shape) for spec in info.inputs]
        if info.is_language_model and len(inputs) == 1 and inputs[0].dim() in (1, 2) and not inputs[0].is_floating_point():
            self.want_logits()
            self.prompt = Prompt.read(self.lowered, None, inputs[0].reshape(-1).tolist())
            terms = self._terms(len(self.prompt.ids), 1, True)
            ids = self._filled(self.prompt.ids, terms.seq, 0)
            self._spend(terms)
            return self._prefill(ids, terms).float()
        if info.is_language_model or [tuple(x.shape) for x in inputs] != shapes:
            wanted = "ids (1, T)" if info.is_language_model else f"inputs of shapes {shapes}"
            raise ConfigError(f"the model takes {wanted}, not {[tuple(x.shape) for x in inputs]}")
        rows = min((node.parameter_shapes["weight"][0] for node in self.lowered.graph.nodes if node.reads_ids), default=0)
        for x, spec in zip(inputs, info.inputs, strict=True):
            if x.is_floating_point() != (spec.kind == "float"):
                raise ConfigError(f"the input {spec.name} is to be {'real numbers' if spec.kind == 'float' else 'ids'}")
            if not bool((torch.isfinite(x) if spec.kind == "float" else (x >= 0) & (x < rows)).all()):
                raise ConfigError(f"the input {spec.name} is not finite, or an id in it is outside of the vocabulary")
        found = self._pass(Run(), list(inputs))
        assert found is not None
        return found

    def _walk(self, runtime: Runtime, request: Pass | Run, inputs: list[Tensor], observe: Any = None) -> Tensor | None:
        with walking(self.options.device):
            if isinstance(request, Run):
                return module_output(self.lowered.graph, runtime, inputs, observe=observe)
            return next_token(self.lowered.graph, runtime, inputs[0], logits=request.logits, output=request.output, observe=observe)

    def _pass(self, request: Pass | Run, inputs: list[Tensor]) -> Tensor | None:
        """What does not depend on the query first, then the pass itself; None if it has no output."""
        began, meter, party = time.perf_counter(), self.connection.meter, self.runtime.party
        meter.phase, meter.label = "online", ("", "")
        peer = f"server {self.client.server}"
        with self._unless_closed(), sane(ProtocolDesync, "the server's model cannot be walked", party="client", peer=peer):
            self.connection.send_control(request)
            if self.prepared is not None:
                self.prepared.next_pass(self.store)
            else:
                sketch = self.runtime.sketch(Party(Role.CLIENT, None, party.weights))
                self.walk_offline(request, sketch, self.store, [x.to("meta") for x in inputs], lambda done: self.progress("offline", done))
            middle = time.perf_counter()
            meter.phase = "online"
            party.engine = Online(Role.CLIENT, self.connection, self.store)
            result = self._walk(self.runtime, request, inputs, self.client.probe(party) if self.client.probe else None)
            with party.label("", ""):  # what follows belongs to no operator
                pass
        self.timing.offline_s += middle - began
        self._unshown_s += time.perf_counter() - middle
        if result is not None:
            result = result.clone()  # outside of inference mode: a tensor like any other
            self.timing.tokens_s.append(self._unshown_s)
            self._unshown_s, self.shown = 0.0, (self.shown[0], self.shown[1] + isinstance(request, Pass))
        return result

    def walk_offline(
        self, request: Pass | Run, sketch: Runtime, store: Store, inputs: list[Tensor], progress: Callable[[float], None]
    ) -> None:
        """What does not depend on the query: takes what the dealer deals for a pass, and sends what can be sent ahead."""
        assert self.link is not None
        dealt = self.link.receive_control(Dealt)
        self.connection.meter.phase = "offline"
        feed = Payload(self.link, dealt.size, progress)
        store.begin_pass(fetch=feed.take)
        sketch.party.engine = Offline(sketch.party.weights, OneWay(self.connection), store)
        sketch.party.on_label = lambda label: setattr(self.connection.meter, "label", label)
        self._walk(sketch, request, inputs)
        self.connection.meter.label = ("", "")
        self.connection.flush()
        if store.asked.digest() != dealt.digest or feed.left:
            peer, remedy = f"server {self.client.server}", "install the same release on all machines"
            raise ProtocolDesync("client and server ask for different correlations", party="client", peer=peer, remedy=remedy)

    @contextlib.contextmanager
    def _unless_closed(self) -> Iterator[None]:
        """A pass from under which another thread took the weights is no fault of the peer's."""
        try:
            yield
        except ProtocolDesync:
            if self._closed.is_set():
                raise TransportError("this session was closed at this end", party="client") from None
            raise

    def end(self) -> None:
        """Says that no query follows."""
        self.connection.send_control(End())

    def close(self, error: BaseException | None = None) -> None:
        """Closes both connections, from any thread; a peer that still listens is told why."""
        self._closed.set()
        for connection in self._dialled:
            farewell(connection, error)
        for connection in self._dialled:
            connection.close()
        self._masked.clear()  # at once, not when the collector finds the cycle: they may be most of the memory
