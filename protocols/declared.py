"""The algebra in which each protocol declares its cost: a formula of public shapes and rings, `cost_<protocol>` beside it.

A declaration runs nothing and asks for no correlation. Tests hold it to the walk that `explain` makes and to the bytes and
rounds counted on the wire, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

from protocols.ring import packed_size

BOTH, DOWN, UP, NONE = "=", ">", "<", "-"  # an exchange; S to C alone; C to S alone; a round whose only part left early


@dataclass(frozen=True, slots=True)
class Declared:
    """Bytes between S and C online (both directions), from D, and from C ahead of the query; and who sends in each round."""

    online: int = 0
    dealer: int = 0
    early: int = 0
    steps: str = ""

    def __add__(self, after: Declared) -> Declared:
        return Declared(self.online + after.online, self.dealer + after.dealer, self.early + after.early, self.steps + after.steps)

    def beside(self, other: Declared) -> Declared:
        """Both at once: their k-th rounds are one."""
        steps = ""
        for pair in zip_longest(self.steps, other.steps, fillvalue=NONE):
            senders = {*pair} - {NONE}
            steps += senders.pop() if len(senders) == 1 else BOTH if senders else NONE
        both = self + other
        return Declared(both.online, both.dealer, both.early, steps)

    @property
    def rounds(self) -> int:
        """As the client sees them: the depth of the chain of dependent messages that ends there.

        `linear` alone has none: nothing comes back. Its message counts once S answers with something that waited for it.
        """
        server = client = 0
        for step in self.steps:
            at_server = max(server, client + 1) if step in (BOTH, UP) else server
            client = max(client, server + 1) if step in (BOTH, DOWN) else client
            server = at_server
        return client


def dealt(*parts: tuple[int, int]) -> Declared:
    """(count, bits) of each part that D sends."""
    return Declared(dealer=sum(packed_size(count, bits) for count, bits in parts))


def exchanged(*parts: tuple[int, int]) -> Declared:
    """(count, bits) of each part of one exchange."""
    return Declared(online=2 * sum(packed_size(count, bits) for count, bits in parts), steps=BOTH)
