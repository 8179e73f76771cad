"""How a query goes through passes, in numbers that are public: the prompt in pieces, then a position for each new token; and padding."""

from __future__ import annotations


def steps(seq: int, new_tokens: int = 1, chunk: int = 0) -> list[tuple[int, bool]]:
    """(new positions, whether an output is revealed) of each pass of a query.

    The prompt of `seq` positions is taken in by passes of at most `chunk` (0: all at once), of which the last alone reveals something:
    the first new token. Then each new token but the last goes through a pass of its own.
    """
    size = chunk or seq
    whole, rest = divmod(seq - 1, size)
    return [*[(size, False)] * whole, (rest + 1, True), *[(1, True)] * (new_tokens - 1)]


def padded(count: int, multiple: int, room: int) -> int:
    """The next multiple (0: the count itself), or what there is room for, if that is less."""
    return min(-(-count // multiple) * multiple, room) if multiple else count
