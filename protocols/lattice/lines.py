"""How operands that grow are named, for products that need not send again what is there."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """Of which named pieces, of how many columns or rows each, the right operand of some heads is joined; a name has one piece, ever."""

    names: tuple[int, ...]
    sizes: tuple[int, ...]
    heads: int
