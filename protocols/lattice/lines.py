"""How operands that grow are named, for products that need not send again what is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """Of which named pieces, of how many columns or rows each, the right operand of some heads is joined; a name has one piece, ever."""

    names: tuple[int, ...]
    sizes: tuple[int, ...]
    heads: int


class Joined(NamedTuple):
    """A right operand that is joined from named pieces along an axis, -1 or -2, and stays for later products: its heads, line by line."""

    axis: int
    lines: Sequence[Line]
