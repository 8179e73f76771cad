"""The pool: prepared queries that a party keeps on disk until they are used, and the marks of what is spent, which outlive it.

    CACHE/prepared/LANE/INDEX.bin    a prepared query, at the server and the client (`prepared`)
    CACHE/spent/LANE.json            its marks, see `marks`

An index is spent by a mark, durable before anything is used. So a crash loses at most the index that was marked, and a file of a
marked index, from a crash or a backup, is never used.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from privinf.files import locked, move_into_place, part_file, refusals, sweep, write_private
from privinf.session.headed import Damaged, Placed
from privinf.session.marks import LANE_NAME, Lane, Marks, lock_of
from privinf.session.messages import MAX_HELD
from privinf.session.prepared import Header, Prepared, Writer, read_header
from protocols.errors import ConfigError

log = logging.getLogger("privinf")
MAX_LANES = 1024  # of one client, at one party


class Pool:
    """One party's pool in its cache directory. Several processes may share it."""

    def __init__(self, cache: Path, role: str) -> None:
        self.cache, self.role = cache, role

    @contextlib.contextmanager
    def open(self, lane: Lane, wait_s: float, until: float = 0.0) -> Iterator[PoolLane]:
        """A lane, locked against everyone else who uses this directory; ConfigError if another holds it for too long.

        `until`: when its certificates expire, as far as they are known, seconds since the epoch. A session may outlive them; its lanes
        do not, for their marks may be gone then.
        """
        with self.locked(lane, wait_s, until):
            yield PoolLane(self, lane, until)

    @contextlib.contextmanager
    def locked(self, lane: Lane, wait_s: float, until: float) -> Iterator[None]:
        """The same, for whoever reads its files otherwise."""
        if 0 < until < time.time():
            raise ConfigError("a certificate of these prepared queries has expired", party=self.role, remedy="run `privinf keys renew`")
        with locked(lock_of(self.cache, lane.name(self.role)), wait_s):
            yield

    def holds(self, lane: Lane) -> bool:
        """Whether there may be something of a lane. Where there is nothing, nothing is to be made only because a peer names it."""
        name = lane.name(self.role)
        return (self.cache / "spent" / f"{name}.json").exists() or (self.cache / "prepared" / name).exists()

    def lanes(self, wanted: Lane) -> list[Lane]:
        """Lanes of which a prepared query will do for this one's terms, those for the fewest new tokens first."""
        found, terms = [], wanted.terms
        for path in (self.cache / "prepared").glob(f"{self.role}-{wanted.client[:16]}-{terms.seq}+*"):
            match = LANE_NAME.fullmatch(path.name)
            if match and match[3] and int(match[3]) >= terms.tokens:
                lane = msgspec.structs.replace(wanted, terms=msgspec.structs.replace(terms, tokens=int(match[3])))
                if lane.name(self.role) == path.name:
                    found.append(lane)
        return sorted(found, key=lambda lane: lane.terms.tokens)

    def any_of(self, lane: Lane) -> bool:
        """Whether a file of this lane is there, as far as a look without its lock tells."""
        return next((self.cache / "prepared" / lane.name(self.role)).glob("*.bin"), None) is not None

    def kept(self, client: str) -> tuple[int, int]:
        """How many prepared queries are kept for a client's certificate, and their bytes."""
        sizes = []
        for path in (self.cache / "prepared").glob(f"{self.role}-{client[:16]}-*/*.bin"):
            with contextlib.suppress(OSError):  # it has just been used
                sizes.append(path.stat().st_size)
        return len(sizes), sum(sizes)

    @contextlib.contextmanager
    def writer(self, lane: Lane, header: Header) -> Iterator[Writer]:
        """A prepared query on its way to the disk; gone at the end of the block unless a shelf has taken it."""
        directory = self.cache / "prepared" / lane.name(self.role)
        with contextlib.ExitStack() as stack:
            with refusals(directory):
                file, part = stack.enter_context(part_file(directory))
            yield Writer(file, part, header)


class PoolLane:
    """One lane, while its lock is held."""

    def __init__(self, pool: Pool, lane: Lane, until: float) -> None:
        self._role, self.lane, self._until = pool.role, lane, until
        name = lane.name(pool.role)
        self._directory = pool.cache / "prepared" / name
        self._file = pool.cache / "spent" / f"{name}.json"

    # ---- marks

    def _marks(self) -> Marks:
        try:
            marks = msgspec.json.decode(self._file.read_bytes(), type=Marks)
        except FileNotFoundError:
            return Marks(self.lane)
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged"
            remedy = "without it nothing of this lane is used here; restore the file, or renew this party's certificate"
            raise ConfigError(f"cannot read what is spent from {self._file}: {reason}", party=self._role, remedy=remedy) from None
        if marks.lane != self.lane:
            raise ConfigError(f"{self._file} is of another lane", party=self._role, remedy="restore the file")
        return marks

    def _keep(self, marks: Marks) -> None:
        if not self._file.exists():
            pattern = f"{self._role}-{self.lane.client[:16]}-*.json"
            if sum(1 for _ in self._file.parent.glob(pattern)) >= MAX_LANES:
                message = f"the {self._role} keeps marks of {MAX_LANES} kinds of prepared queries for this client already"
                raise ConfigError(message, party=self._role, remedy="prepare for fewer lengths")
        with refusals(self._file):
            write_private(self._file, msgspec.json.encode(msgspec.structs.replace(marks, until=self._until)))

    @property
    def spent(self) -> int:
        """The highest spent index; ConfigError if that cannot be known."""
        return self._marks().spent

    def raise_to(self, spent: int) -> int:
        """Takes note of what another party knows to be spent, and makes the mark file if there is none; the highest spent index."""
        marks = self._marks()
        if spent > marks.spent or not self._file.exists():
            self._keep(msgspec.structs.replace(marks, spent=max(spent, marks.spent)))
        return max(spent, marks.spent)

    def reserve(self, above: int, count: int = 1) -> int:
        """The first of so many new indices, above this and all that were ever spent, kept or handed out here."""
        marks = self._marks()
        index = 1 + max(above, marks.spent, marks.reserved, *self._indices(), 0)
        self._keep(msgspec.structs.replace(marks, reserved=index + count - 1))
        return index

    def spend(self, index: int) -> bool:
        """Marks an index as spent, durably, and removes its file; False if it was spent before. ConfigError if it cannot be marked."""
        marks = self._marks()
        if index <= marks.spent:
            return False
        self._keep(msgspec.structs.replace(marks, spent=index))
        self.discard(index)
        return True

    # ---- files

    def _path(self, index: int) -> Path:
        return self._directory / f"{index:010d}.bin"

    def _indices(self) -> list[int]:
        return sorted(int(path.stem) for path in self._directory.glob("*.bin") if path.stem.isascii() and path.stem.isdigit())

    def discard(self, index: int) -> None:
        """Removes a prepared query."""
        with contextlib.suppress(OSError):
            self._path(index).unlink()

    def clear(self, spent: int) -> None:
        """Removes what must not be used: all up to this index, with a line that says so."""
        stale = [index for index in self._indices() if index <= spent]
        for index in stale:
            self.discard(index)
        if stale:
            what = f"{len(stale)} prepared quer{'y' if len(stale) == 1 else 'ies'} of {self._directory.name} refused and removed"
            log.warning("%s: index %d and below are spent; a query was cut off, or a backup was copied back", what, spent)

    def held(self) -> dict[int, bytes]:
        """Index and serial of each prepared query that may be used; what is damaged, of another lane or release is removed."""
        sweep(self._directory)
        self.clear(self.spent)
        found = {}
        for index in self._indices()[:MAX_HELD]:
            with self._sound(index):
                header = read_header(self._path(index))
                self._check(header, index)
                found[index] = header.serial
        return found

    def load(self, index: int) -> Prepared | None:
        """A prepared query, read whole and checked; None if it is no good, and then it is removed."""
        with self._sound(index):
            prepared = Prepared.read(self._path(index))
            self._check(prepared.header, index)
            return prepared
        return None

    def add(self, part: Path, index: int) -> None:
        """Takes what a writer has sealed; ConfigError."""
        path = self._path(index)
        with refusals(path):
            move_into_place(part, path)

    def adopt(self, part: Path) -> int:
        """Takes a whole file that was written elsewhere for this lane; its index. ConfigError where it is none, or its index is in use."""
        try:
            header = read_header(part)
            self._check(header, header.index)
        except Damaged as error:
            raise ConfigError(f"a prepared query cannot be kept: {error}", party=self._role) from None
        if header.index <= self.spent or self._path(header.index).exists():
            raise ConfigError(f"a prepared query cannot be kept: its index {header.index} is in use", party=self._role)
        self.add(part, header.index)
        return header.index

    def _check(self, header: Placed, index: int) -> None:
        if (header.role, header.lane, header.index) != (self._role, self.lane.name(self._role), index):
            raise Damaged("it is of another model, client, server or place")

    @contextlib.contextmanager
    def _sound(self, index: int) -> Iterator[None]:
        path = self._path(index)
        try:
            yield
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("cannot read the prepared query %s: %s; going on without it", path, error.strerror)
        except Damaged as error:
            self.discard(index)
            log.warning("the prepared query %s was removed: %s", path, error)
