"""A conversation that the gateway keeps, and how a prompt is found to go on from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from privinf.client.conversation import Conversation
from privinf.client.session import ClientSession
from privinf.transport.meter import PHASES, Cell

Encode = Callable[[str], list[int] | None]
Follows = tuple[int, list[int], bool]
"""Positions in the cache, new ids, whether the last new token is kept."""


@dataclass(eq=False, repr=False)
class Held:
    """A conversation and what is needed to see whether a prompt goes on from it."""

    conversation: Conversation
    text: str | None = None  # of the whole sequence, where the prompt was a text
    ended: bool = False  # the last token ended the reply, and is not part of the text

    def follow(self, ids: list[int], text: str | None, encode: Encode) -> Follows | None:
        """How the prompt goes on from here, if it does."""
        so_far, room = self.conversation.ids, self.conversation.room
        if not so_far:
            return 0, ids, True
        for keep in (True, False):
            start = so_far if keep else so_far[:-1]
            fits = 0 < len(ids) - len(start) <= room - keep  # what pads turns takes room too
            if fits and ids[: len(start)] == start:
                return len(so_far) - 1, ids[len(start) :], keep
        if self.text is None or text is None or not text.startswith(self.text):
            return None
        # the tokenizer may cut the reply otherwise than the model wrote it: what the model wrote stays
        rest = encode(text[len(self.text) :])
        if not rest or len(rest) + (not self.ended) > room:
            return None
        return len(so_far) - 1, rest, not self.ended

    def cells(self) -> dict[tuple[str, str], Cell]:
        """What moved so far, by peer and phase, in a session of its own."""
        return cells_of(self.conversation.own)

    @property
    def spent(self) -> int:
        """Correlations that were used."""
        return spent_of(self.conversation.own)


def cells_of(session: ClientSession | None) -> dict[tuple[str, str], Cell]:
    """What moved so far in a session, by peer and phase."""
    dialled = [] if session is None else session.lines.dialled
    return {(end.peer_role, phase): end.meter.total(phase) for end in dialled for phase in PHASES}


def spent_of(session: ClientSession | None) -> int:
    """Correlations that were used in a session."""
    return 0 if session is None else session.store.next_name - 1
