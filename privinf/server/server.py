"""The server: owns a model, serves each client a session of its own, and learns nothing about prompt or answer."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from privinf.graph.private import Runtime, encode_weights, weights_of
from privinf.lowering.lowered import Lowered
from privinf.lowering.program import module_output, next_token
from privinf.lowering.setup import Item, masked
from privinf.server.budget import Allowance, Budget, SetUps
from privinf.server.dealer_source import DealerSource, reach_dealer
from privinf.server.models import open_model
from privinf.server.preprocessing import prepare_at_server, spend_at_server
from privinf.session.access import Tally, name_of, one_line
from privinf.session.blame import as_told
from privinf.session.devices import walking
from privinf.session.marks import Lane
from privinf.session.messages import (
    MAX_KINDS,
    End,
    Needs,
    Pass,
    Prepare,
    Run,
    Session,
    Spend,
    Welcome,
    greet,
)
from privinf.session.options import Options
from privinf.session.pool import Pool, PoolLane
from privinf.session.prepared import Prepared
from privinf.session.service import Service
from privinf.session.source import ServerSource
from privinf.session.turns import InTurn
from privinf.transport.connection import Connection
from privinf.transport.frames import FrameKind
from privinf.transport.listener import parse_address
from protocols.correlations import Role, size_of
from protocols.errors import Code, ConfigError, HandshakeError, ProtocolDesync, RefusedError
from protocols.party import Online, Party, Trace

log = logging.getLogger("privinf.server")


class Server(Service):
    """`Server("model_dir", listen="0.0.0.0:7000", dealer="dealer:7001", keys="keys/").start()`; also a context manager.

    `model` is a lowered directory, a checkpoint directory or a `Lowered`. Safe to run in a thread of a service.
    Raises ConfigError for a bad model, keys or address.
    """

    role = "server"

    def __init__(
        self,
        model: str | Path | Lowered,
        *,
        listen: str,
        dealer: str,
        keys: str,
        allow_logits: bool = False,
        clients: str | Path | None = None,
        options: Options | None = None,
    ) -> None:
        options, listed = options or Options(), None if clients is None else Path(clients)
        parse_address(dealer)  # a malformed one is noticed now
        super().__init__(listen=listen, keys=keys, allowed_roles={"client"}, options=options, link=True, clients=listed)
        try:
            self.lowered = model if isinstance(model, Lowered) else open_model(Path(model), options.cache)
            self._prepare()
        except BaseException:
            self._listener.close()
            raise
        self.dealer, self.allow_logits = dealer, allow_logits
        self.fingerprint, self.stock = self.credentials.fingerprint, Pool(options.cache, self.role)
        self.budget = Budget(options.cache, options.budget, options.budget_hours, options.timeout) if options.budget else None
        self.probe: Callable[[Party], Any] | None = None  # `privinf.local.probe` or `clock`, in local sessions alone

    def reload(self) -> None:
        super().reload()
        self.fingerprint = self.credentials.fingerprint

    def budgets(self) -> dict[str, int]:
        return {} if self.budget is None else dict(self.budget.spent)

    def _prepare(self) -> None:
        if not self.lowered.has_weights or self.lowered.mask_seed is None:
            raise ConfigError("this model came without weights and cannot be served")
        self.lowered.check_weights()
        graph = self.lowered.graph
        weights = weights_of(graph)
        self._weights = {name: record for name, (record, _, _) in weights.items()}
        self._labels = {name: node.label for name, (_, node, _) in weights.items()}
        self._encoded = encode_weights(graph, self.options.device)
        self._bundle = self.lowered.bundle()
        whole, options = len(self._bundle) + sum(item.size for item in self.lowered.setup.items.values()), self.options
        self._set_ups = SetUps(options.setups * whole, f"{options.setups} set-ups of this model", options.setup_hours)

    def handle(self, connection: Connection) -> None:
        """One client: handshake, set-up, then passes until it ends."""
        connection.meter.phase = "setup"
        greet(connection)
        connection.timeout = self.options.timeout
        connection.send_control(Welcome(self.lowered.id, len(self._bundle), self.allow_logits))
        if connection.receive_control(Needs).names:
            self._may_send(connection, len(self._bundle))
            connection.send(self._bundle, FrameKind.CONTROL)
        self._set_up(connection, connection.receive_control(Needs, MAX_KINDS).names)
        link = reach_dealer(self, self.dealer)
        try:
            self._serve(connection, link)
        except Exception as error:
            for each in (connection, link):  # the client before the dealer, whose end it would take for the cause
                self.tell(each, as_told(error, self.role))
            raise
        finally:
            self.retire(link)

    def _serve(self, connection: Connection, link: Connection) -> None:
        """A session, announced to the dealer and then to the client."""
        token, seed, weights = secrets.token_bytes(16), self.lowered.mask_seed, self._weights.values()
        assert seed is not None
        source = DealerSource(link, token, connection.peer_fingerprint, seed, weights, self.options.device)
        connection.send_control(Session(token))
        connection.establish()
        connection.timeout = self.options.idle
        with one_line(self.say_of_a_session, name_of(connection), lambda: connection) as tally:
            ServerSession(self, connection, source, tally).serve()
        self.leave(connection)
        source.end()

    def _set_up(self, connection: Connection, names: tuple[str, ...]) -> None:
        """Sends the masked weights that the client has not kept, one message each."""
        connection.max_frame = 64 * 2**20
        if len(set(names)) < len(names):
            raise HandshakeError("the client asks for a weight twice", party="server")
        strange = next((name for name in names if name not in self._weights), None)
        if strange is not None:
            raise HandshakeError(f"the client asks for a weight {strange[:80]!r} that the model does not have", party="server")
        self._may_send(connection, sum(self.lowered.setup.items[name].size for name in names))
        with self.turns.turn(connection.peer_fingerprint):
            for name in names:
                data = self._masked(name)
                connection.meter.label = self._labels[name]
                with self.turns.between(connection.peer_fingerprint):
                    connection.send(data)
        connection.meter.label = ("", "")

    def _may_send(self, connection: Connection, size: int) -> None:
        """Counts a part of the set-up before it is sent."""
        try:
            self._set_ups.spend(connection.peer_fingerprint, size)
        except RefusedError as error:
            raise self.refusal(error) from None

    def _masked(self, name: str) -> memoryview:
        """A masked weight, which is what the model's id stands for."""
        assert self.lowered.mask_seed is not None
        data = masked(self._encoded[name], self.lowered.mask_seed, self._weights[name])
        if Item.of(data) != self.lowered.setup.items[name]:
            remedy = "lower the checkpoint again with `privinf convert`"
            raise HandshakeError(f"the server's masked {name} is not what its model's id stands for", party="server", remedy=remedy)
        return data

    @property
    def encoded(self) -> Mapping[str, Tensor]:
        """The encoded weights, shared by all sessions."""
        return self._encoded


class ServerSession:
    """One client's passes: the cache of keys and values, and the correlations."""

    def __init__(self, server: Server, connection: Connection, source: ServerSource, tally: Tally) -> None:
        self.server, self.connection, self.source, self.tally = server, connection, source, tally
        self.store = source.party  # or that of a prepared query
        self._prepared: Prepared | None = None
        self._due: deque[Pass] = deque()  # the passes of a prepared query
        self._prepares = False
        self._prefetched: tuple[Pass, Runtime, Trace] | None = None  # the pass that is made ahead, and the state after it
        self._allowance = Allowance(server, connection, server.budget)
        party = Party(Role.SERVER, None, server.encoded)
        party.on_label = lambda label: setattr(connection.meter, "label", label)
        self.runtime = Runtime.of(server.lowered.graph, party, self.store.device)

    def serve(self) -> None:
        """Answers the client's requests until it ends the session; raises what breaks it."""
        while True:
            self.connection.meter.phase, self.connection.meter.label = "online", ("", "")
            with self.server.resting(self.connection):
                request = self.connection.receive_control(Pass | Run | Prepare | Spend | End)
            if isinstance(request, End):
                return
            self._check(request)
            self._allowance.check(request)
            self.connection.timeout = self.server.options.timeout
            if isinstance(request, Prepare):
                self._prepares = True
                prepare_at_server(self, request)
                self.tally["prepared queries"] += 1
            elif isinstance(request, Spend):
                self._spend(request)
            else:
                before = self.store.next_name
                self._pass(request)
                positions = request.count if isinstance(request, Pass) else 0
                self.server.count(passes=1, positions=positions, correlations=self.store.next_name - before)
                self._tell(request)
            self.connection.timeout = self.server.options.idle

    def _tell(self, request: Pass | Run) -> None:
        """For the log. A pass over one position after a token only goes on from that; whatever else is taken in is prompt."""
        if isinstance(request, Run):
            self.tally["passes"] += 1
            return
        if request.count > 1 or not self.tally["new tokens"]:
            self.tally["prompt tokens"] += request.count
        self.tally["new tokens"] += request.output

    def _check(self, request: Pass | Run | Prepare | Spend) -> None:
        info = self.server.lowered.info
        if isinstance(request, Run) == info.is_language_model:
            raise ProtocolDesync("the client asks for another kind of pass than the model has", party="server")
        if not isinstance(request, Prepare) and self._prepares:
            raise ProtocolDesync("a session that prepares queries answers none", party="server")
        if isinstance(request, Run):
            return
        if isinstance(request, Pass):
            logits, end = request.logits, self.runtime.offset + request.count
            if logits and not request.output:
                raise ProtocolDesync("the client asks for logits of a pass without output", party="server")
        else:
            logits, end = request.terms.logits, self.runtime.offset + request.terms.seq + request.terms.tokens - 1
        if logits and not self.server.allow_logits:
            raise HandshakeError(
                "this server does not give logits", party="server", remedy="start it with --allow-logits", code=Code.NO_LOGITS
            )
        if end > info.n_positions:
            raise ProtocolDesync(f"the client asks for more than the model's {info.n_positions} positions", party="server")

    def _walk(self, runtime: Runtime, request: Pass | Run, observe: Any = None) -> None:
        graph, info = self.server.lowered.graph, self.server.lowered.info
        if isinstance(request, Pass):
            ids = torch.empty((1, request.count), dtype=torch.int64, device="meta")
            with walking(self.store.device):
                next_token(graph, runtime, ids, logits=request.logits, output=request.output, observe=observe)
            return
        known = not isinstance(runtime.party.engine, Trace)  # then S's share of the input is 0; ids are C's alone
        inputs = [
            torch.empty([size or 1 for size in spec.shape], dtype=torch.int64, device="meta")
            if spec.kind == "ids"
            else torch.zeros([size or 1 for size in spec.shape], device="cpu" if known else "meta")
            for spec in info.inputs
        ]
        with walking(self.store.device):
            module_output(graph, runtime, inputs, observe=observe)

    def shelf(self, lane: Lane) -> AbstractContextManager[PoolLane]:
        """A lane of this session's, see `Stock.open`."""
        return self.server.stock.open(lane, self.server.options.timeout, self.connection.peer_until)

    def fresh_runtime(self) -> Runtime:
        """An empty context, for a query that is prepared."""
        return Runtime.of(self.server.lowered.graph, Party(Role.SERVER), self.store.device)

    def ask(self, request: Pass | Run, runtime: Runtime, first: int) -> tuple[Runtime, Trace]:
        """Asks for a pass's correlations, from the state of this runtime; the state after it, and what it needs."""
        sketch, trace = self._sketched(request, runtime, first)
        self._allowance.afford(trace)
        self.source.ask(trace.kinds)
        return sketch, trace

    def _sketched(self, request: Pass | Run, runtime: Runtime, first: int) -> tuple[Runtime, Trace]:
        """A pass walked on shapes."""
        trace = Trace(Role.SERVER, first, costs=self.server.options.session_bytes > 0)  # nothing else asks for them
        sketch = runtime.sketch(Party(Role.SERVER, trace))
        with self.server.turns.turn(self.connection.peer_fingerprint):
            self._walk(sketch, request)
        return sketch, trace

    def _preprocess(self, request: Pass | Run) -> deque[memoryview]:
        """Has this pass made, and after a token the next one while this one is computed. What C sends ahead."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[0] == request:
            sketch, trace = prefetched[1:]
            self._allowance.afford(trace)
            self.source.ask_prefetched()
        else:
            sketch, trace = self.ask(request, self.runtime, self.store.next_name)
        self.store.begin_pass(trace.kinds)
        if isinstance(request, Pass) and request.count == 1 and request.output and sketch.offset < self.server.lowered.info.n_positions:
            self._prefetched = request, *self._sketched(request, sketch, self.store.next_name + len(trace.kinds))
            self.source.prefetch(self._prefetched[2].kinds)
        early = deque(self.receive_early(trace))
        self.source.flush()
        return early

    def receive_early(self, trace: Trace) -> Iterator[memoryview]:
        """What the client sends ahead of a pass."""
        self.connection.meter.phase = "offline"
        for parts in trace.early:
            data = self.connection.exchange(None, size_of(parts))
            assert data is not None
            yield data

    def _spend(self, request: Spend) -> None:
        if self.runtime.offset or self._prepared is not None:
            raise ProtocolDesync("the client would use a prepared query within another one", party="server")
        self._prepared = spend_at_server(self, request)
        if self._prepared is not None:
            self.store, self._due = self._prepared.store(self.store.device), deque(request.terms.passes)

    def _pass(self, request: Pass | Run) -> None:
        if not isinstance(request, Pass) or request.output:
            self._allowance.spend()
        if self._prepared is not None:
            if not self._due or request != self._due.popleft():
                raise ProtocolDesync("the client asks for a pass that was not prepared", party="server")
            early = self._prepared.next_pass(self.store)
        else:
            early = self._preprocess(request)
        self.connection.meter.phase = "online"
        party = self.runtime.party
        party.engine = Online(Role.SERVER, InTurn(self.connection, self.server.turns), self.store, early)
        with self.server.turns.turn(self.connection.peer_fingerprint):
            self._walk(self.runtime, request, self.server.probe(party) if self.server.probe else None)
        self.store.end_pass()
        with party.label("", ""):  # what follows belongs to no operator
            pass
