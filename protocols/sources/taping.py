"""Which passes a dealer has tapes of (`protocols.sources.dealing`), and a session's way to them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from protocols import kernels
from protocols.correlations import Kind
from protocols.prg import Prg
from protocols.product import MatmulMask
from protocols.recording import Recorder
from protocols.sequences import PutRowsMask
from protocols.sources.dealing import DealtTape, Masks, most_of
from protocols.sources.shelf import Agreement, Shelf, small


class DealtTapes:
    """Tapes for one set of weights' masks; any may be used once two recordings of one digest, at two positions, have told the same.

    That is asked of each way that passes go (`protocols.kind_hash.way`); where two differ, none is used from then on.
    """

    def __init__(self) -> None:
        self.shelf: Shelf[bytes, DealtTape] = Shelf()
        self._agreement = Agreement()
        self._refused = False

    @property
    def writes(self) -> bool:
        """Whether any pass has a tape."""
        return kernels.fast is not None and not self._refused

    def agreed(self, kinds: Sequence[Kind]) -> bool:
        """Whether two recordings of passes that go this way were the same."""
        return self._agreement.holds(kinds)

    def fits(self, kinds: Sequence[Kind]) -> bool:
        """Whether a pass of these may have a tape: a further token's, and small."""
        further = any(isinstance(kind, PutRowsMask) or (isinstance(kind, MatmulMask) and kind.reach) for kind in kinds)
        if not self.writes or not further or not small(kinds, most_of(kinds)):
            return False
        return all(isinstance(kind, PutRowsMask) or not kind.replaces() for kind in kinds)

    def written(self, digest: bytes, tape: DealtTape, recorder: Recorder) -> bool:
        """Whether a tape that was just written may be used."""
        same: bool | None = False
        if not recorder.why and tape.bytes <= most_of(tape.kinds):
            same = self._agreement.ask(tape.kinds, digest, tape.position, recorder.told)
        self._refused |= same is False
        return same is True and not self._refused


class Taping:
    """A session's way to tapes: it has one at a time.

    The first pass of a shape is dealt without one, and the next one written. Both parties write theirs in the first and wait for what is
    dealt, but not for what is dealt meanwhile for the pass after it; and of what comes once nothing is written at all.
    """

    def __init__(self, tapes: DealtTapes) -> None:
        self._tapes = tapes
        self._held: tuple[bytes, DealtTape] | None = None
        self._ready: tuple[bytes, DealtTape] | None = None  # of the pass that is next
        self._claimed: bytes | None = None  # what is to be written
        self._seen = b""  # what the last pass was that had no tape
        self._next = 0  # the name after the last pass that had the tape; what it holds of the caches is of that one

    @property
    def writes(self) -> bool:
        """See `DealtTapes`."""
        return self._tapes.writes

    def fits(self, kinds: Sequence[Kind]) -> bool:
        """See `DealtTapes`."""
        return self._tapes.fits(kinds)

    def deal(
        self, masks: Masks, prgs: tuple[Prg, Prg], kinds: Sequence[Kind], digest: bytes, first: int
    ) -> tuple[dict[int, Tensor], list[bytes]]:
        """What outlives the pass, by name, and the client's payload; once it is `ready`."""
        held, ready = self._held, self._ready
        tape, self._ready = None if ready is None else ready[1], None
        if held is not None and first != self._next:  # another pass came between, or the last one was dropped and its names are used anew
            held[1].forget()
        self._next = first + len(kinds)
        if tape is not None:
            left, pieces = tape.deal(masks, prgs, kinds, first), tape.pieces()
        else:
            tape = DealtTape(kinds)
            left, recorder = tape.write(masks, prgs, first, tells=not self._tapes.agreed(kinds))
            pieces = tape.pieces()
            if not self._tapes.written(digest, tape, recorder):
                self._leave()
                return left, pieces
            tape = tape.packed(recorder)  # what it has of this pass stays where it is until the next one takes it over
            self._tapes.shelf.add(digest, tape)
            self._leave()
        if held is None or held[1] is not tape:
            self.end(masks)
            self._held = digest, tape
        return left, pieces

    def ready(self, kinds: Sequence[Kind], digest: bytes) -> bool:
        """Whether there is a tape of this pass, or one is to be written; not while another session writes one."""
        self._leave()
        found = self._held[1] if self._held is not None and self._held[0] == digest else self._tapes.shelf.take(digest)
        if found is not None and found.follows(kinds):
            self._ready = digest, found
            return True
        if found is not None and (self._held is None or self._held[1] is not found):
            self._tapes.shelf.give(digest, found)  # a digest does not say how one kind's positions lie to another's
        seen, self._seen = self._seen, digest
        if seen == digest and self._tapes.shelf.claim(digest):
            self._claimed = digest
        return self._claimed is not None

    def _leave(self) -> None:
        """What was to be written is not, or is."""
        claimed, self._claimed = self._claimed, None
        if claimed is not None:
            self._tapes.shelf.leave(claimed)
        if self._ready is not None and (self._held is None or self._held[1] is not self._ready[1]):
            self._tapes.shelf.give(*self._ready)
        self._ready = None

    def interrupted(self) -> None:
        """A pass is dealt without a tape."""
        self._leave()
        self._next = 0

    def end(self, masks: Masks | None = None) -> None:
        """The session has no tape any more; what of its memory is among these masks is copied there."""
        self._leave()
        held, self._held = self._held, None
        if held is not None:
            if masks is not None:
                for stack in held[1].stacks:
                    masks.detach(stack.out)
            self._tapes.shelf.give(*held)
