"""One client's session at the server: passes, and what is spent for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from privinf.graph.batch import Batch
from privinf.graph.private import Runtime
from privinf.lowering.program import module_output, next_token, next_tokens, unbatched
from privinf.server.budget import Allowance
from privinf.server.models import ServedModel
from privinf.server.preprocessing import Pieces, Preprocessing
from privinf.server.sketches import Request, Sketched, Sketches
from privinf.session.access import Tally
from privinf.session.devices import walking
from privinf.session.messages import End, Pass, Prepare, Run, Spend, Step, Stock, Terms
from privinf.session.prepared import Prepared
from privinf.session.replays import Replays
from privinf.session.service import Service
from privinf.session.source import ServerSource
from privinf.session.turns import InTurn
from privinf.transport.connection import Connection
from protocols.correlations import Kind, Role, size_of
from protocols.errors import Code, HandshakeError, ProtocolDesync
from protocols.party import Online, Party, Trace


def _same(made: Request, asked: Request) -> bool:
    """Whether the two take the same correlations."""
    return made.same(asked) if isinstance(made, Pass) and isinstance(asked, Pass) else made == asked


class ServerSession:
    """One client's passes: the cache of keys and values, and the correlations.

    Its attributes are whose session it is, and what of one pass the next one goes on from.
    """

    def __init__(self, service: Service, model: ServedModel, connection: Connection, source: ServerSource, tally: Tally) -> None:
        self.service, self.model, self.connection, self.source, self.tally = service, model, connection, source, tally
        self.store = source.party  # or that of a prepared query
        self._preprocessing = Preprocessing(service.options, model.lowered.id, service.credentials.fingerprint, connection, source)
        self._prepared: tuple[Prepared, deque[Pass]] | None = None  # the prepared query that is used, and its passes to come
        self._prefetched: Sketched | None = None  # the pass that is made ahead
        self._allowance = Allowance(service, connection, model.budget)
        party = Party(Role.SERVER, None, model.encoded)
        party.on_label = lambda label: setattr(connection.meter, "label", label)
        party.tables = source.tables
        self._fills = model.lowered.info.n_positions if source.fills else 0
        self.runtime = Runtime.of(model.lowered.graph, party, self.store.device, fills=self._fills)
        self._replays = Replays(model.tapes, self.runtime, model.lowered.graph)
        self._sketches = Sketches(self.runtime, costs=service.options.session_bytes > 0)  # nothing else asks for them

    def serve(self) -> None:
        """Answers the client's requests until it ends the session; raises what breaks it."""
        try:
            self._serve()
        finally:
            self._replays.end()

    def _serve(self) -> None:
        while True:
            self.connection.meter.phase, self.connection.meter.label = "online", ("", "")
            with self.service.resting(self.connection):
                request = self.connection.receive_control(Pass | Step | Run | Prepare | Spend | Stock | End)
            if isinstance(request, End):
                return
            self._check(request)
            self._allowance.check(request)
            self.connection.timeout = self.service.options.timeout
            if isinstance(request, Prepare | Stock) and self._prefetched is not None:
                raise ProtocolDesync("the client would prepare a query within another one", party="server")
            if isinstance(request, Prepare):
                self._preprocessing.prepare(request, self._dealt(request.terms))
                self.tally["prepared queries"] += 1
            elif isinstance(request, Stock):
                self.source.stock(request, lambda size: self._allowance.afford([], size))
                self.tally["rows in stock"] += request.positions
            elif isinstance(request, Spend):
                self._spend(request)
            else:
                before = self.store.next_name
                self._pass(request)
                positions = 0 if isinstance(request, Run) else request.count
                self.service.counters.count(passes=1, positions=positions, correlations=self.store.next_name - before)
                self._tell(request)
            self.connection.timeout = self.service.options.idle

    def _tell(self, request: Request) -> None:
        """For the log. A pass over one position after a token only goes on from that; whatever else is taken in is prompt."""
        if isinstance(request, Run):
            self.tally["passes"] += 1
            return
        if isinstance(request, Step):
            known = self.runtime.batch.before if self.runtime.batch else {}
            self.tally["prompt tokens"] += sum(count for number, count in request.new if count > 1 or number not in known)
            self.tally["new tokens"] += len(request.new) if request.output else 0
            return
        if request.count > 1 or not self.tally["new tokens"]:
            self.tally["prompt tokens"] += request.count
        self.tally["new tokens"] += request.output

    def _check(self, request: Request | Prepare | Spend | Stock) -> None:
        info = self.model.lowered.info
        if isinstance(request, Stock):
            return
        if isinstance(request, Run) == info.is_language_model:
            raise ProtocolDesync("the client asks for another kind of pass than the model has", party="server")
        if not isinstance(request, Prepare) and self._preprocessing.prepares:
            raise ProtocolDesync("a session that prepares queries answers none", party="server")
        if isinstance(request, Run):
            return
        if isinstance(request, Pass | Step):
            logits = request.logits
            end = self.runtime.offset + request.count + request.more if isinstance(request, Pass) else self._lengths(request)
            if (logits and not request.output) or (request.every and not logits):
                raise ProtocolDesync("the client asks for logits of a pass without output", party="server")
            if isinstance(request, Pass) and self.runtime.batch is not None:
                raise ProtocolDesync("a session of several sequences was asked for a pass over one", party="server")
        else:
            logits, end = request.terms.logits, self.runtime.offset + request.terms.seq + request.terms.tokens - 1
        if logits and not self.model.allow_logits:
            remedy = "start it with --allow-logits"
            raise HandshakeError("this server does not give logits", party="server", remedy=remedy, code=Code.NO_LOGITS)
        if end > info.n_positions:
            raise ProtocolDesync(f"the client asks for more than the model's {info.n_positions} positions", party="server")

    def _lengths(self, request: Step) -> int:
        """The longest sequence of a batch after this pass; ProtocolDesync for sequences that cannot be gone on with."""
        batch = self.runtime.batch
        before = dict(batch.after) if batch is not None else {}
        if (batch is None and self.runtime.offset) or self._prepared is not None:
            raise ProtocolDesync("a session of one sequence was asked for several", party="server")
        numbers = {number for number, _ in request.new}
        if len(numbers) < len(request.new) or not before.keys() - numbers >= set(request.ended):
            raise ProtocolDesync("the client names a sequence twice, or ends one that is not there", party="server")
        if len(before.keys() - set(request.ended) | numbers) > self.service.options.batch:
            raise ProtocolDesync(f"the client asks for more than {self.service.options.batch} sequences at a time", party="server")
        if (node := unbatched(self.model.lowered.graph)) is not None:
            raise ProtocolDesync(f"{node.name} takes one sequence at a time", party="server")
        return max(before.get(number, 0) + count for number, count in request.new)

    def _walk(self, runtime: Runtime, request: Request, observe: Any = None) -> None:
        graph, info = self.model.lowered.graph, self.model.lowered.info
        if isinstance(request, Pass | Step):
            ids = torch.empty((1, request.count), dtype=torch.int64, device="meta")
            common: dict[str, Any] = {"logits": request.logits, "output": request.output, "every": request.every, "observe": observe}
            with walking(self.store.device):
                if isinstance(request, Step):
                    next_tokens(graph, runtime, ids, request.new, ended=request.ended, **common)
                else:
                    next_token(graph, runtime, ids, **common)
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

    def _dealt(self, terms: Terms) -> Iterator[Pieces]:
        """The passes of a query that is prepared, from an empty context on: what each needs, what of it is kept, what the client sends."""
        party, first = Party(Role.SERVER), 1
        party.tables = self.source.tables
        sketch = Runtime.of(self.model.lowered.graph, party, self.store.device, fills=self._fills)
        for request in terms.passes:
            found = self.ask(request, sketch, first)
            assert found.after is not None, "it was walked"
            sketch, trace = found.after, found.trace
            first += len(trace.kinds)
            yield trace, iter(self.source.record(trace.kinds)), self._receive_early(trace)

    def ask(self, request: Request, runtime: Runtime, first: int) -> Sketched:
        """Asks for a pass's correlations, from the state of this runtime."""
        found = self._sketches.of(request, runtime, first, self._walk_in_turn)
        self._afford(found.trace)
        self.source.ask(found.trace.kinds)
        return found

    def _afford(self, trace: Trace, *made: Trace) -> None:
        """RefusedError where a pass that is to be made, after those that are made and not computed, moves more than the session may."""
        if self.service.options.session_bytes:
            self._allowance.afford([*made, trace], self.source.cost(trace.kinds))

    def _walk_in_turn(self, sketch: Runtime, request: Request) -> None:
        """On shapes."""
        with self.service.turns.turn(self.connection.peer_fingerprint):
            self._walk(sketch, request)

    def _preprocess(self, request: Request) -> tuple[deque[memoryview], Sequence[Kind]]:
        """Has this pass made, and after a token the next one while this one is computed. What C sends ahead, and what the pass takes."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and _same(prefetched.request, request):
            made, trace = prefetched, prefetched.trace
            if self.source.meanwhile is None:  # else its making has begun, and was paid for then
                self._afford(trace)
            self.source.ask_prefetched()
        else:
            if prefetched is not None:
                self.source.drop_prefetched()
            made = self.ask(request, self.runtime, self.store.next_name)
            trace = made.trace
        self.source.make(trace.kinds)
        if (likely := self._likely(request)) is not None:
            self._prefetched = following = self._sketches.following(made, likely, self._walk_in_turn)
            self.source.prefetch(following.trace.kinds, further=following.further)
            if self.source.meanwhile is not None:
                self._afford(following.trace, trace)
        early = deque(self._receive_early(trace))
        self.source.flush()
        return early, trace.kinds

    def _likely(self, request: Request) -> Pass | Step | None:
        """What comes after a pass where its source makes that meanwhile, if the context has room for it."""
        following = None if isinstance(request, Run) else self.source.follows(request)
        most = self.model.lowered.info.n_positions
        if isinstance(request, Step) and isinstance(following, Step):
            after = (self.runtime.batch or Batch()).step(request.new, request.ended).after
            return following if all(after[number] < most for number, _ in following.new) else None
        return following if not isinstance(request, Run) and self.runtime.offset + request.count < most else None

    def _receive_early(self, trace: Trace) -> Iterator[memoryview]:
        """What the client sends ahead of a pass."""
        self.connection.meter.phase = "offline"
        for parts in trace.early:
            data = self.connection.exchange(None, size_of(parts))
            assert data is not None
            yield data

    def _spend(self, request: Spend) -> None:
        if self.runtime.offset or self.runtime.batch is not None or self._prepared is not None:
            raise ProtocolDesync("the client would use a prepared query within another one", party="server")
        prepared = self._preprocessing.spend(request)
        if prepared is not None:
            self.store, self._prepared = prepared.store(self.store.device), (prepared, deque(request.terms.passes))

    def _pass(self, request: Request) -> None:
        self._allowance.spend(1 if isinstance(request, Run) else request.outputs)
        kinds: Sequence[Kind] = ()
        if self._prepared is not None:
            prepared, due = self._prepared
            if not due or request != due.popleft():
                raise ProtocolDesync("the client asks for a pass that was not prepared", party="server")
            early = prepared.next_pass(self.store)
        else:
            early, kinds = self._preprocess(request)
        self.connection.meter.phase = "online"
        party = self.runtime.party
        meanwhile = self.source.meanwhile if self._prepared is None else None
        party.engine = Online(Role.SERVER, InTurn(self.connection, self.service.turns), self.store, early, meanwhile)
        observe = self.model.probe(party) if self.model.probe else None
        shape = self._replays.of(self.store, request, self.model.probe) if self._prepared is None else None
        with self.service.turns.turn(self.connection.peer_fingerprint), self.source.computing():
            if shape is not None and self._replays.ahead(shape, self.store, lambda: kinds):
                assert isinstance(request, Pass | Step)
                channel, ids = party.engine.channel, torch.empty((1, request.count), dtype=torch.int64, device="meta")
                self._replays.online(channel, early, ids, lambda _: self._walk(self.runtime, request, observe))
            else:
                self._walk(self.runtime, request, observe)
            self.source.settle()
        self.store.end_pass()
        self.source.taken()
        with party.label("", ""):  # what follows belongs to no operator
            pass
