"""A table for people in which no figure is cut: words wrap, and where that is not enough, columns go into a table of their own."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

GAP = 2
LONGEST = 24
"""Characters; a longer word may be broken."""


@dataclass(frozen=True)
class Column:
    """A title and a cell for each row: figures, whole and on the right, or words, which wrap. Titles may have several lines."""

    title: str
    cells: Sequence[str]
    words: bool = False

    @property
    def widest(self) -> int:
        """Characters of its longest line."""
        return max(len(line) for text in (self.title, *self.cells) for line in text.split("\n"))

    @property
    def least(self) -> int:
        """Characters without which it cannot be."""
        return (
            min(LONGEST, max(len(word) for text in (self.title, *self.cells) for word in text.split() or [""]))
            if self.words
            else self.widest
        )


def console_for_tables() -> Console:
    """Of the terminal's width, or of COLUMNS; without either as wide as a table wants to be."""
    console = Console(highlight=False)
    return console if console.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(highlight=False, width=1 << 12)


def show_table(console: Console, names: Column, columns: Sequence[Column], *, bold: Collection[int] = ()) -> None:
    """Rows of names, each followed by its columns; `bold` are the numbers of rows."""
    blocks: list[list[Column]] = [[]]
    for column in columns:
        if blocks[-1] and names.least + sum(each.least + GAP for each in (*blocks[-1], column)) > console.width:
            blocks.append([])
        blocks[-1].append(column)
    for number, block in enumerate(blocks):
        if number:
            console.print()
        _print_block(console, names, block, bold)


def _print_block(console: Console, names: Column, block: Sequence[Column], bold: Collection[int]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    spare = max(0, console.width - names.least - sum(column.least + GAP for column in block))
    lines = max(column.title.count("\n") for column in (names, *block))
    for column in (names, *block):  # the words on the left take first what is left over
        width = min(column.widest, column.least + spare)
        spare -= width - column.least
        title = "\n" * (lines - column.title.count("\n")) + column.title
        table.add_column(title, justify="left" if column.words else "right", no_wrap=not column.words, overflow="fold", width=width)
    for row, cells in enumerate(zip(names.cells, *(column.cells for column in block), strict=True)):
        table.add_row(*cells, style="bold" if row in bold else "")
    console.print(table, soft_wrap=True)
