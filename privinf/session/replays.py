"""Further tokens of a session from tapes: the pass of one shape is written down once, and then done again for each token of that shape.

What a tape needs is said in `protocols.sources.tape`. Passes over one position with output, after some, of parties on the CPU with compiled
loops and a dealer, have tapes: a shape is then the length to which the row is filled up (`protocols.rows.reach`), and whether logits are
wanted. So have those over one more token of sequences of a batch, once their rows are filled up to the same lengths as in the pass before
(`privinf.graph.batch`). Of each way that passes go (`protocols.kind_hash.way`: a longer row has a bound where a short one has a maximum)
whoever is first writes two tapes, at two positions, and none of that program is used from then on if they differ.

A tape belongs to the weights that it was written with. Those that no session has wait for the next one, without values, within a bound.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.graph.batch import Batch
from privinf.graph.private import Runtime
from privinf.session.devices import walking
from privinf.session.messages import Pass, Run, Step
from protocols import kernels
from protocols.correlations import Kind
from protocols.party import Party
from protocols.rounds import Channel
from protocols.rows import reach
from protocols.sources.base import PartySource
from protocols.sources.dealer import Store
from protocols.sources.shelf import Agreement, Shelf, largest, small
from protocols.sources.tape import Tape, Writer

log = logging.getLogger("privinf")

Shape = tuple[int | tuple[int, ...], bool]
"""To how many elements the row is filled up, or see `Batch.shape`, and whether logits are wanted."""
Program = tuple[bool, bool]
"""Whether a pass is over several sequences, and whether logits are wanted."""
Walk = tuple[Party, Channel, Callable[[], Tensor | None]]
"""Of the client before the query: who walks, where what is sent ahead goes, and the walk."""


class Tapes:
    """The tapes of one party for one model, and which programs may have any."""

    def __init__(self) -> None:
        self.shelf: Shelf[Shape, Tape] = Shelf()
        self._agreement = Agreement()
        self._forbidden = set[Program]()

    def __repr__(self) -> str:
        return f"Tapes({len(self.shelf)} free)"

    def allowed(self, program: Program) -> bool:
        """Whether passes of this program may be written."""
        return program not in self._forbidden

    def agreed(self, kinds: Sequence[Kind]) -> bool:
        """Whether two tapes of passes that go the same way were the same."""
        return self._agreement.holds(kinds)

    def forbid(self, program: Program) -> None:
        """They are not to be written."""
        self._forbidden.add(program)

    def takes(self, shape: Shape, kinds: Sequence[Kind]) -> bool:
        """Whether a pass that needs these is small enough for a tape."""
        fits = small(kinds, most_of(shape))
        if not fits:
            self.forbid(program(shape))
        return fits

    def written(self, shape: Shape, tape: Tape, writer: Writer) -> bool:
        """Whether a tape that was just written may be used."""
        if writer.why or tape.bytes > most_of(shape):
            log.debug("passes of this model are not replayed: %s", writer.why or f"{tape.bytes} bytes")
            self.forbid(program(shape))
            return False
        same = self._agreement.ask(tape.kinds, shape, tape.offset, writer.told)
        if same is False:
            self.forbid(program(shape))
        return same is True and self.allowed(program(shape))


def program(shape: Shape) -> Program:
    """What shapes of any length have in common."""
    return isinstance(shape[0], tuple), shape[1]


def shape_of(request: Pass | Step, offset: int, batch: Batch | None, fills: int) -> tuple[Shape | None, Batch | None]:
    """The shape of a pass after so many positions, if it is over one more token and has one; and where its sequences lie, if of several."""
    if request.every or not (offset and request.output and fills):
        return None, None
    if isinstance(request, Pass):
        return ((min(reach(offset + 1), fills), request.logits) if request.count == 1 else None), None
    step = (batch or Batch()).step(request.new, request.ended, fills)
    return ((step.shape, request.logits) if step.settled else None), step


def most_of(shape: Shape) -> int:
    """Bytes of a tape, at most."""
    return largest(sum(rows > 0 for rows in shape[0]) if isinstance(shape[0], tuple) else 1)


@dataclass
class _Held:
    """The tape that a session has, and the positions that it holds the state of."""

    shape: Shape
    tape: Tape
    offset: int = -1


class Replays:
    """Of one session at one party: which tape a pass has, and whether it is written or read."""

    def __init__(self, tapes: Tapes, runtime: Runtime, graph: Graph) -> None:
        self._tapes, self._runtime = tapes, runtime
        self._taped = all(node.taped for node in graph.nodes if node.state)
        self._held: _Held | None = None
        self._writing: tuple[Shape, Tape, Writer] | None = None
        self._first = 0  # the name of the first correlation of the pass
        self._batch: Batch | None = None  # the pass, where it is over several sequences
        self._claimed: Shape | None = None  # what is being written

    def of(self, store: PartySource, request: Pass | Step | Run, probe: object) -> Shape | None:
        """The shape of the pass that is next, if it may have a tape; of any other the tape that is held knows nothing."""
        shape = self._shape(store, request, probe)
        if shape is None and self._held is not None:
            self._held.offset = -1
        return shape

    def _shape(self, store: PartySource, request: Pass | Step | Run, probe: object) -> Shape | None:
        runtime, self._batch = self._runtime, None
        if not isinstance(request, Pass | Step) or not self._taped:
            return None
        fits = kernels.fast is not None and str(runtime.device) == "cpu" and isinstance(store, Store) and runtime.party.tables is None
        if not fits or getattr(probe, "observes", False) or not self._tapes.allowed((isinstance(request, Step), request.logits)):
            return None
        shape, self._batch = shape_of(request, runtime.offset, runtime.batch, runtime.fills)
        return shape

    @property
    def _position(self) -> int:
        """Positions before the pass, of its first sequence."""
        return self._runtime.offset if self._batch is None else self._batch.windows()[0][0]

    def end(self) -> None:
        """The session is over, or goes on by another tape: what the one that it has holds of its state is nobody's."""
        self._unclaim()
        held, self._held = self._held, None
        if held is not None:
            self._tapes.shelf.give(held.shape, held.tape)

    # ---- before the query

    def ahead(self, shape: Shape, store: PartySource, kinds: Callable[[], Sequence[Kind]], walk: Walk | None = None) -> bool:
        """Spends the correlations of the pass, and at the client does what comes before the query; False if there shall be no tape."""
        assert isinstance(store, Store), "see `of`"
        self._first, self._writing = store.next_name, None
        self._unclaim()
        tape = self._ready(shape)
        if tape is not None:
            tape.take(store)
            if walk is not None:
                with walking("cpu"):
                    tape.before(walk[1], self._position)
            return True
        wanted = kinds()
        if not self._tapes.takes(shape, wanted) or not self._tapes.shelf.claim(shape):
            return False
        self._claimed = shape
        tape = Tape(self._runtime.party.role, wanted, self._first, self._position)
        tape.take(store)
        writer = Writer(tape, self._runtime.party.weights, tells=not self._tapes.agreed(wanted), most=most_of(shape))
        self._writing = shape, tape, writer
        if walk is not None:
            writer.walk(*walk[:2], None, walk[2])
        return True

    def _ready(self, shape: Shape) -> Tape | None:
        """The tape to read, with this session's state; None where one is to be written."""
        held, offset = self._held, self._runtime.offset
        if held is None or held.shape != shape:
            tape = self._tapes.shelf.take(shape)
            if tape is None:
                return None
            held = _Held(shape, tape)
        if held.offset != offset:
            with walking("cpu"):
                held.tape.load(self._runtime.state)
            self._runtime.state.update(held.tape.state())
            held.offset = offset
        if held is not self._held:
            self.end()
            self._held = held
        return held.tape

    # ---- the pass

    def online(self, channel: Channel, early: deque[memoryview], ids: Tensor, run: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """The pass; `run` walks it where it is written."""
        if self._writing is not None:
            return self._write(channel, early, ids, run)
        held, runtime = self._held, self._runtime
        assert held is not None and held.offset == runtime.offset
        held.offset = -1  # until it is through
        held.tape.now.on_label = runtime.party.on_label
        with walking("cpu"):
            found = held.tape.walk(channel, early, self._position, ids, self._first)
        runtime.state.update(held.tape.state())
        runtime.batch = self._batch
        runtime.offset += ids.shape[1]
        held.offset = runtime.offset
        return found

    def _write(self, channel: Channel, early: deque[memoryview], ids: Tensor, run: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        assert self._writing is not None
        (shape, tape, writer), self._writing = self._writing, None
        if not ids.is_meta:
            with walking("cpu"):
                ids = tape.input = writer.recorder.given(ids.clone())
        found = writer.walk(self._runtime.party, channel, early, lambda: run(ids))
        if self._tapes.written(shape, tape, writer):
            with walking("cpu"):
                tape = tape.packed(writer.recorder)  # the state stays where it is until the next pass takes it over
            self._tapes.shelf.add(shape, tape)
            self.end()
            self._held = _Held(shape, tape)
        self._unclaim()
        return found

    def _unclaim(self) -> None:
        claimed, self._claimed = self._claimed, None
        if claimed is not None:
            self._tapes.shelf.leave(claimed)
