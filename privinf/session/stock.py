"""The file of one stock of rows, and how its rows are spent.

    MAGIC, length of the header (4 bytes), header (msgpack), pages

A page has the rows of `PAGE` positions (the last may have fewer): of every map at the client the masks, packed, then this party's shares,
and in the end a SHA-256 of the stock's serial, the page's number and all of that. So a pass reads and checks the pages of its own rows.

    CACHE/prepared/LANE/INDEX.bin    INDEX is that of the stock's first position; its positions have the indices that follow
    CACHE/spent/LANE.json            the highest index that is spent, see `pool`: durable before any row up to it is used

Pages whose rows are all spent are overwritten, and a file whose pages all are is removed. As a row's bytes of one party alone it says
nothing; both parties' bytes undo the masks of what uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import torch
from torch import Tensor

from privinf.files import finish, part_file, refusals, sweep
from privinf.lowering.stocking import MOST
from privinf.session.headed import Damaged, Placed, headed, read_headed
from privinf.session.marks import Lane
from privinf.session.pool import Pool, PoolLane
from protocols.correlations import Part, Role, pack_parts, size_of, unpack_parts
from protocols.lattice.rows import TOGETHER, Map

MAGIC = b"privinf stock of rows 1\n"
MAX_HEADER = 1 << 22
PAGE = 16
TRIES = 3
"""How often C asks for rows of a pass, and S answers: S may know more to be spent once, where C was put back to an earlier state."""
assert TOGETHER % PAGE == 0
_DIGEST = 32


class Header(Placed, frozen=True):
    """Of a stock."""

    positions: Annotated[int, msgspec.Meta(ge=1, le=MOST)]
    maps: Annotated[tuple[Map, ...], msgspec.Meta(min_length=1, max_length=1 << 16)]

    @property
    def last(self) -> int:
        """The index of the last position."""
        return self.index + self.positions - 1

    def parts(self, page: int) -> list[tuple[Part, ...]]:
        """Of each map, what a page has of it."""
        count = min(PAGE, self.positions - page * PAGE)
        found = []
        for each in self.maps:
            rows = count * each.each
            masks = (Part((rows, each.inner), each.bits),) if self.role == Role.CLIENT else ()
            found.append((*masks, Part((rows, each.outer), each.bits)))
        return found

    @property
    def pages(self) -> int:
        """How many there are."""
        return -(-self.positions // PAGE)

    def page_size(self, page: int) -> int:
        """Bytes of a page, its digest included."""
        return sum(size_of(parts) for parts in self.parts(page)) + _DIGEST

    @property
    def size(self) -> int:
        """Bytes of all pages."""
        return (self.pages - 1) * self.page_size(0) + self.page_size(self.pages - 1)

    def fresh_hash(self, page: int) -> hashlib._Hash:
        """Of a page's digest."""
        return hashlib.sha256(self.serial + page.to_bytes(8, "big"))


class Writer:
    """Writes one as it is made. ConfigError where the disk refuses."""

    def __init__(self, file: BinaryIO, part: Path, header: Header) -> None:
        self.part, self.header, self._file = part, header, file
        beginning = headed(MAGIC, header)
        self._begun = len(beginning)
        self._digests: dict[int, hashlib._Hash] = {}  # of pages that are not whole yet
        self._places: dict[int, int] = {}  # and where in them the next map begins
        with refusals(part.parent):
            file.write(beginning)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._begun + self.header.size

    def put(self, number: int, start: int, masks: Tensor, shares: Tensor) -> None:
        """What was made of a map from a position on, whole pages or up to the last; maps come in order."""
        header, each = self.header, self.header.maps[number]
        for at in range(0, len(shares) // each.each, PAGE):
            page = (start + at) // PAGE
            parts = header.parts(page)[number]
            rows = slice(at * each.each, at * each.each + parts[-1].shape[0])
            data = pack_parts([x[rows] for x in ((masks, shares) if len(parts) > 1 else (shares,))], parts)
            digest = self._digests.setdefault(page, header.fresh_hash(page))
            digest.update(data)
            place = self._places.get(page, self._begun + page * header.page_size(0))
            self._places[page] = place + len(data)
            if number == len(header.maps) - 1:
                data = bytes(data) + self._digests.pop(page).digest()
            with refusals(self.part.parent):
                self._file.seek(place)
                self._file.write(data)

    def seal(self) -> None:
        """It is durable; the file has no name yet."""
        with refusals(self.part.parent):
            finish(self._file)


def _read_header(file: BinaryIO) -> tuple[Header, int]:
    """The header, and where the pages begin; Damaged."""
    header, begun = read_headed(file, MAGIC, Header, MAX_HEADER, "stock of rows")
    if os.fstat(file.fileno()).st_size != begun + header.size:
        raise Damaged("it is cut short, or damaged")
    return header, begun


Read = list[tuple[Tensor | None, Tensor]]


def _read_page(file: BinaryIO, header: Header, begun: int, page: int) -> list[tuple[Tensor, ...]]:
    size = header.page_size(page)
    file.seek(begun + page * header.page_size(0))
    data = memoryview(file.read(size))
    digest = header.fresh_hash(page)
    digest.update(data[:-_DIGEST])
    if len(data) != size or digest.digest() != data[-_DIGEST:]:
        raise Damaged("a page of it is damaged")
    found, at = [], 0
    for parts in header.parts(page):
        end = at + size_of(parts)
        found.append(tuple(unpack_parts(data[at:end], parts)))
        at = end
    return found


def read_rows(path: Path, header: Header, index: int, count: int) -> Read:
    """The rows of so many positions from an index on, of each map; Damaged or OSError."""
    first = index - header.index
    pages = range(first // PAGE, (first + count - 1) // PAGE + 1)
    with path.open("rb") as file:
        again, begun = _read_header(file)
        if again != header:
            raise Damaged("it is another one")
        read = [_read_page(file, header, begun, page) for page in pages]
    found: Read = []
    for number, each in enumerate(header.maps):
        start = (first - pages.start * PAGE) * each.each
        rows = slice(start, start + count * each.each)
        whole = [torch.cat([page[number][k] for page in read])[rows] for k in range(len(read[0][number]))]
        found.append((whole[0] if len(whole) > 1 else None, whole[-1]))
    return found


class StockLane(PoolLane):
    """The stocks of one lane, while its lock is held."""

    def stocks(self) -> Iterator[tuple[Path, Header]]:
        """Those of which something is left, the first made first; what is spent, damaged, of another lane or release is removed."""
        sweep(self._directory)
        spent = self.spent
        for index in self._indices():
            path, header = self._path(index), None
            with self._sound(index), path.open("rb") as file:
                header, _ = _read_header(file)
                self._check(header, index)
            if header is not None and header.last > spent:
                yield path, header
            elif header is not None:
                self.discard(index)

    def take(self, path: Path, header: Header, index: int, count: int) -> Read | None:
        """Reads rows, then marks them, and all before, as spent, durably; None where the stock is no good, and then it is removed.

        ConfigError where they cannot be marked.
        """
        with self._sound(header.index):
            found = read_rows(path, header, index, count)
            spent = self.spent
            self.raise_to(index + count - 1)
            _erase(path, header, spent, index + count - 1)
            for _ in self.stocks():  # those before it of which too little was left are gone with that
                pass
            return found
        return None


def _erase(path: Path, header: Header, before: int, spent: int) -> None:
    """Overwrites the pages that were not all spent at `before` and are now; removes the file where nothing is left."""
    if spent >= header.last:
        path.unlink()
        return
    first, end = (max(0, x + 1 - header.index) // PAGE for x in (before, spent))
    with path.open("r+b") as file:
        _, begun = _read_header(file)
        for page in range(first, end):
            file.seek(begun + page * header.page_size(0))
            file.write(bytes(header.page_size(page)))


@contextlib.contextmanager
def opened(pool: Pool, lane: Lane, wait_s: float, until: float) -> Iterator[StockLane]:
    """A lane of stocks, see `Pool.open`."""
    with pool.locked(lane, wait_s, until):
        yield StockLane(pool, lane, until)


@contextlib.contextmanager
def writing(pool: Pool, lane: Lane, header: Header) -> Iterator[Writer]:
    """A stock on its way to the disk; gone at the end of the block unless its lane has taken it."""
    directory = pool.cache / "prepared" / lane.name(pool.role)
    with contextlib.ExitStack() as stack:
        with refusals(directory):
            file, part = stack.enter_context(part_file(directory))
        yield Writer(file, part, header)
