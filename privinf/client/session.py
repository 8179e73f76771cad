"""One session of the client: passes over the connections to a server and its dealer."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from privinf.client.joining import Joined
from privinf.client.lines import Lines
from privinf.client.payload import OneWay
from privinf.client.preprocessing import Preprocessing, Shelf
from privinf.graph.private import Runtime
from privinf.lowering.program import module_output, next_token, next_tokens, unbatched
from privinf.lowering.steps import padded
from privinf.session.blame import sane
from privinf.session.devices import walking
from privinf.session.messages import End, Pass, Run, Step, Terms
from privinf.session.options import Lengths, Options
from privinf.session.prepared import Prepared, Writer
from privinf.session.replays import Replays
from protocols.correlations import Kind, Role
from protocols.errors import Code, ConfigError, HandshakeError, ProtocolDesync, TransportError
from protocols.party import Offline, Online, Party, Trace
from protocols.sources.base import PartySource


@dataclass
class Timing:
    """Seconds: set-up, the offline steps in sum, the online part of each output, and that of passes that only pad a reply."""

    setup_s: float = 0.0
    offline_s: float = 0.0
    tokens_s: list[float] = field(default_factory=list)
    padding_s: float = 0.0
    unshown_s: float = 0.0  # online, of passes since the last output


def padded_terms(options: Lengths, room: int, seq: int, tokens: int, logits: bool) -> Terms:
    """A query as a server may see it: padded as the options say, and cut to the positions that the context has room for."""
    seq = padded(seq, options.pad_prompt, room)
    most = room - seq + 1
    return in_chunks(options, seq, padded(min(tokens, most), options.pad_reply, most), logits)


def in_chunks(options: Lengths, seq: int, tokens: int, logits: bool) -> Terms:
    """A query of just these lengths, in pieces as the options say."""
    return Terms(seq, tokens, logits, options.chunk if options.chunk < seq else 0)


class ClientSession:
    """One session with a server and its dealer: one sequence, or several of a batch, whose masked keys and values both parties hold.

    Six of its attributes are what the handshake has found.
    """

    def __init__(self, lines: Lines, found: Joined) -> None:
        self.lines, self.peers, self.setup_s = lines, lines.peers, found.setup_s
        self.connection, self.source = found.connection, found.source
        self.lowered, self.trust, self.gives_logits = found.lowered, found.trust, found.gives_logits
        self.most = found.batch
        """Sequences that the server takes at a time."""
        self.runtime, self.store = found.runtime, found.source.party
        self.preprocessing = Preprocessing(lines.peers, found)
        self.replays = Replays(lines.tapes, self.runtime, self.lowered.graph)
        self.prepared: Prepared | None = None
        """The prepared query that this session uses."""

    def __repr__(self) -> str:
        return f"ClientSession({self.peers.server}, prompt and tokens hidden)"

    @property
    def options(self) -> Options:
        """The client's."""
        return self.peers.options

    @property
    def lone(self) -> Any:
        """A node for which this session is of one sequence; None where it may be of several."""
        return unbatched(self.lowered.graph)

    def want_logits(self) -> None:
        """HandshakeError unless the server gives them."""
        if not self.gives_logits:
            remedy = "start it with --allow-logits"
            raise HandshakeError(
                "this server does not give logits", party="client", peer=self.peers.named, remedy=remedy, code=Code.NO_LOGITS
            )

    # ---- lengths

    def terms(self, seq: int, tokens: int, logits: bool, cached: int | None = None) -> Terms:
        """A query as the server may see it, see `padded_terms`.

        `cached` are the positions of its sequence, where the session has several.
        """
        room = self.lowered.info.n_positions - (self.runtime.offset if cached is None else cached)
        return padded_terms(self.options, room, seq, tokens, logits)

    def filled(self, ids: Sequence[int], seq: int, after: int) -> list[int]:
        """A prompt of `seq` tokens: end tokens where it has fewer, in front of it but after its first `after` ids."""
        info = self.lowered.info
        end = next((token for token in (*info.eos, info.bos) if token is not None and token < info.vocab), None)
        if not self.options.pad_prompt:
            return list(ids)
        if end is None:
            raise ConfigError("this model names no end token with which a prompt could be padded", remedy="leave --pad-prompt out")
        return [*ids[:after], *[end] * (seq - len(ids)), *ids[after:]]

    # ---- queries prepared ahead of time

    def prepare(self, seq: int, max_new_tokens: int, logits: bool) -> dict[str, Any]:
        """Prepares one query, see `Client.prepare`."""
        return self.preprocessing.prepare(self.preparing(seq, max_new_tokens, logits), self._walk_offline)

    def prepare_for_another(
        self, seq: int, max_new_tokens: int, logits: bool, shelf: Shelf, scratch: Path
    ) -> contextlib.AbstractContextManager[Writer]:
        """Prepares one whose file another process keeps, see `Preprocessing.for_another`."""
        return self.preprocessing.for_another(self.preparing(seq, max_new_tokens, logits), self._walk_offline, shelf, scratch)

    def preparing(self, seq: int, max_new_tokens: int, logits: bool) -> Terms:
        """The terms of a query that is to be prepared; ConfigError for lengths that do not fit the model."""
        if logits:
            self.want_logits()
        n_positions = self.lowered.info.n_positions
        if not self.lowered.info.is_language_model:
            raise ConfigError("this model is no language model; nothing can be prepared for it")
        if not 1 <= seq <= n_positions:
            raise ConfigError(f"a prompt has 1 to {n_positions} tokens with this model, not {seq}")
        return self.terms(seq, max_new_tokens, logits)

    def stock(self, positions: int) -> dict[str, Any]:
        """Makes a stock of rows, see `Client.prepare`."""
        return self.source.stock(positions, partial(self.peers.progress, "stock"))

    def spend(self, terms: Terms) -> float:
        """From here on a query that was prepared is used, if one fits, and then the session is over after it; the seconds it took."""
        began = time.perf_counter()
        self.prepared = self.preprocessing.spend(terms)
        if self.prepared is not None:
            self.store = self.prepared.store(self.options.device)
        return time.perf_counter() - began

    # ---- passes

    def prefill(self, ids: Sequence[int], terms: Terms, timing: Timing) -> Tensor:
        """The output after these ids, in passes of at most the chunk's size."""
        done, found = 0, None
        *before, last = terms.prefill
        for request in (*before, self._with_more(last, terms.tokens > 1)):
            found = self._pass(request, [torch.tensor([ids[done : done + request.count]])], timing)
            done += request.count
        assert found is not None
        return found

    def scored(self, ids: Sequence[int], terms: Terms, timing: Timing) -> Iterator[Tensor]:
        """`prefill`, but rounded logits of every position, pass by pass, each (n, V)."""
        done, passes = 0, terms.prefill
        for number, each in enumerate(passes, 1):
            request = self._with_more(Pass(each.count, True, every=each.count > 1), number == len(passes) and terms.tokens > 1)
            found = self._pass(request, [torch.tensor([ids[done : done + each.count]])], timing)
            assert found is not None
            if number < len(passes):  # no token comes of it
                timing.unshown_s += timing.tokens_s.pop()
            yield found
            done += each.count

    def next(self, token: int, logits: bool, timing: Timing, *, more: bool = False) -> Tensor:
        """The output after one more token; `more`: another one may follow."""
        found = self._pass(self._with_more(Pass(1, logits), more), [torch.tensor([[token]])], timing)
        assert found is not None
        return found

    def _with_more(self, request: Pass, more: bool) -> Pass:
        """The request, which says that a token may follow where its correlations can be made meanwhile."""
        more = more and self.source.foresees and self.prepared is None
        return Pass(request.count, request.logits, request.output, more, request.every)

    def step(
        self,
        new: Sequence[tuple[int, Sequence[int]]],
        timing: Timing,
        *,
        ended: Sequence[int] = (),
        logits: bool = False,
        output: bool = True,
        every: bool = False,
    ) -> Tensor | None:
        """One pass over new ids of several sequences, by number; the output of each, (B,) tokens or (B, V) logits, if it has one.

        A number that is not cached yet begins a sequence, and those in `ended` are forgotten. With `every` logits of every new id, (n, V).
        Where the model takes one sequence alone it is a session's only one, and the pass one of such a session.
        """
        if self.lone is not None:
            ((_, ids),) = new
            return self._pass(Pass(len(ids), logits, output, every=every), [torch.tensor([list(ids)])], timing)
        request = Step(tuple([(number, len(ids)) for number, ids in new]), tuple(ended), logits, output, every)
        return self._pass(request, [torch.tensor([[each for _, ids in new for each in ids]])], timing)

    def compute(self, inputs: Sequence[Tensor], timing: Timing) -> Tensor:
        """The output of a lowered module that is no language model; ConfigError for inputs that it does not take."""
        info = self.lowered.info
        shapes = [tuple(size or 1 for size in spec.shape) for spec in info.inputs]
        if info.is_language_model or [tuple(x.shape) for x in inputs] != shapes:
            wanted = "ids (1, T)" if info.is_language_model else f"inputs of shapes {shapes}"
            raise ConfigError(f"the model takes {wanted}, not {[tuple(x.shape) for x in inputs]}")
        rows = min((node.parameter_shapes["weight"][0] for node in self.lowered.graph.nodes if node.reads_ids), default=0)
        for x, spec in zip(inputs, info.inputs, strict=True):
            if x.is_floating_point() != (spec.kind == "float"):
                raise ConfigError(f"the input {spec.name} is to be {'real numbers' if spec.kind == 'float' else 'ids'}")
            if not bool((torch.isfinite(x) if spec.kind == "float" else (x >= 0) & (x < rows)).all()):
                raise ConfigError(f"the input {spec.name} is not finite, or an id in it is outside of the vocabulary")
        found = self._pass(Run(), list(inputs), timing)
        assert found is not None
        return found

    def _walk(self, runtime: Runtime, request: Pass | Step | Run, inputs: list[Tensor], observe: Any = None) -> Tensor | None:
        with walking(self.options.device):
            graph = self.lowered.graph
            if isinstance(request, Run):
                return module_output(graph, runtime, inputs, observe=observe)
            common: dict[str, Any] = {"logits": request.logits, "output": request.output, "every": request.every, "observe": observe}
            if isinstance(request, Step):
                return next_tokens(graph, runtime, inputs[0], request.new, ended=request.ended, **common)
            return next_token(graph, runtime, inputs[0], **common)

    def _pass(self, request: Pass | Step | Run, inputs: list[Tensor], timing: Timing) -> Tensor | None:
        """What does not depend on the query first, then the pass itself; None if it has no output."""
        began, meter, party, probe = time.perf_counter(), self.connection.meter, self.runtime.party, self.peers.probe
        meter.phase, meter.label = "online", ("", "")
        with self._unless_closed(), sane(ProtocolDesync, "the server's model cannot be walked", party="client", peer=self.peers.named):
            self.connection.send_control(request)
            taped = False
            if self.prepared is not None:
                self.prepared.next_pass(self.store)
            else:
                taped = self._make(request, [x.to("meta") for x in inputs])
            middle = time.perf_counter()
            meter.phase = "online"
            party.engine = Online(Role.CLIENT, self.connection, self.store, meanwhile=self.source.meanwhile)
            observe = probe(party) if probe else None
            with self.source.computing():
                if taped:
                    run = partial(self._walk, self.runtime, request, observe=observe)
                    result = self.replays.online(party.engine.channel, deque(), inputs[0], lambda ids: run(inputs=[ids]))
                else:
                    result = self._walk(self.runtime, request, inputs, observe)
                self.source.settle()
            self.store.end_pass()
            with party.label("", ""):  # what follows belongs to no operator
                pass
        begun, self.source.set_up_s = self.source.set_up_s, 0.0
        timing.setup_s += begun
        timing.offline_s += middle - began - begun
        timing.unshown_s += time.perf_counter() - middle
        if result is not None:
            result = result.clone()  # outside of inference mode: a tensor like any other
            timing.tokens_s.append(timing.unshown_s)
            timing.unshown_s = 0.0
        return result

    def _make(self, request: Pass | Step | Run, inputs: list[Tensor]) -> bool:
        """What does not depend on the query; and from here on the next pass is made too, if one may follow. Whether by a tape."""
        foreseen = self.source.foreseen
        if foreseen is not None and not (isinstance(request, Pass) and foreseen.same(request)):
            self.source.drop_foreseen()
        sketch = self.runtime.sketch(Party(Role.CLIENT, None, self.runtime.party.weights))
        taped = self._walk_offline(request, sketch, self.store, inputs, partial(self.peers.progress, "offline"), self.replays)
        if isinstance(request, Pass) and request.more:
            following = request.following
            ids = [torch.empty((1, 1), dtype=torch.int64, device="meta")]
            self.source.foresee(following, lambda first: self._kinds(first, sketch, following, ids))
        return taped

    def _kinds(self, first: int, sketch: Runtime, request: Pass | Step | Run, inputs: list[Tensor]) -> list[Kind]:
        """What a pass from this state takes, from that name on."""
        trace = Trace(Role.CLIENT, first, costs=False)
        self._walk(sketch.sketch(Party(Role.CLIENT, trace)), request, inputs)
        return trace.kinds

    def _walk_offline(
        self,
        request: Pass | Step | Run,
        sketch: Runtime,
        store: PartySource,
        inputs: list[Tensor],
        progress: Callable[[float], None],
        replays: Replays | None = None,
    ) -> bool:
        """What does not depend on the query: takes what is made for a pass, and sends what can be sent ahead. Whether by a tape."""
        taped, shape = False, replays.of(store, request, self.peers.probe) if replays is not None else None

        def kinds() -> list[Kind]:
            return self._kinds(store.next_name, sketch, request, inputs)

        with self.source.making(store, kinds, progress):
            self.connection.meter.phase = "offline"
            channel, party = OneWay(self.connection), sketch.party
            party.engine = Offline(party.weights, channel, store)
            party.on_label = lambda label: setattr(self.connection.meter, "label", label)
            if replays is not None and shape is not None:
                taped = replays.ahead(shape, store, kinds, (party, channel, lambda: self._walk(sketch, request, inputs)))
            if not taped:
                self._walk(sketch, request, inputs)
            self.connection.meter.label = ("", "")
            self.connection.flush()
        return taped

    @contextlib.contextmanager
    def _unless_closed(self) -> Iterator[None]:
        """A pass from under which another thread took the weights is no fault of the peer's."""
        try:
            yield
        except ProtocolDesync:
            if self.lines.closed:
                raise TransportError("this session was closed at this end", party="client") from None
            raise

    # ---- the end

    def end(self) -> None:
        """Says that no query follows."""
        self.connection.send_control(End())

    def close(self, error: BaseException | None = None) -> None:
        """Closes both connections, from any thread; a peer that still listens is told why."""
        self.lines.close(error)
