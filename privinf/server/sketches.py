"""What passes will take: walks on shapes; a further token's pass that only moves on from the one before it is not walked again.

Of two passes of one shape (`privinf.session.replays.shape_of`) the second takes what `protocols.kind_hash.moved_on` makes of the first.
That is not taken for granted: in each session, of each way that passes go, the first that could be told so is walked all the same. Where
the walk finds something else, all are walked from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from privinf.graph.batch import Batch
from privinf.graph.private import Runtime
from privinf.session.messages import Pass, Run, Step
from privinf.session.replays import Shape, shape_of
from protocols.kind_hash import moved_on, way
from protocols.party import Party, Trace

Request = Pass | Step | Run
Walk = Callable[[Runtime, Request], None]


@dataclass
class Sketched:
    """A pass on shapes: what it takes, and if it was walked the state after it."""

    request: Request
    trace: Trace
    shape: Shape | None
    after: Runtime | None = None
    further: bool = False
    """Whether its kinds are those of the pass before it, `moved_on`."""


class Sketches:
    """Of one session, whose `runtime` is the state before the pass under way.

    `walk` walks a pass from a state, with a trace as engine. It is not kept: it is the session's, which would then keep itself alive.
    `costs`: whether traces count them.
    """

    def __init__(self, runtime: Runtime, *, costs: bool) -> None:
        self._runtime, self._costs = runtime, costs
        self._agreed = set[object]()  # ways
        self._refused = False

    def of(self, request: Request, before: Runtime, first: int, walk: Walk) -> Sketched:
        """A pass from this state on, whose first correlation has this name."""
        trace = Trace(before.party.role, first, costs=self._costs)
        after = before.sketch(Party(before.party.role, trace))
        walk(after, request)
        shape = None if isinstance(request, Run) else shape_of(request, before.offset, before.batch, before.fills)[0]
        return Sketched(request, trace, shape, after)

    def following(self, made: Sketched, request: Pass | Step, walk: Walk) -> Sketched:
        """The pass after one that is yet to be computed."""
        first, further = made.trace.first + len(made.trace.kinds), None
        shape = self._shape_after(made.request, request)
        if shape is not None and shape == made.shape and not self._refused:
            further = moved_on(made.trace.kinds, made.trace.first)
        if further is not None and (made.further or way(further) in self._agreed):
            return Sketched(request, made.trace.of_others(further, first), shape, further=True)
        state = made.after if made.after is not None else self.of(made.request, self._runtime, made.trace.first, walk).after
        assert state is not None, "a pass that was walked leaves a state"
        found = self.of(request, state, first, walk)
        if further is not None:
            found.further = further == found.trace.kinds
            self._refused = not found.further
            self._agreed.add(way(further))
        return found

    def _shape_after(self, made: Request, request: Pass | Step) -> Shape | None:
        """The shape of a pass after one that is yet to be computed, where both are over one more token of the same."""
        runtime = self._runtime
        batch, offset = runtime.batch, runtime.offset
        if isinstance(made, Pass) and isinstance(request, Pass):
            return shape_of(request, offset + made.count, batch, runtime.fills)[0] if made.same(request) else None
        if isinstance(made, Step) and isinstance(request, Step) and made.new == request.new and made.logits == request.logits:
            after = (batch or Batch()).step(made.new, made.ended, runtime.fills)
            return shape_of(request, offset + made.count, after, runtime.fills)[0]
        return None
