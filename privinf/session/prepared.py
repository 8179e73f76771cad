"""The file of one prepared query: seed, correlations of all its passes, and a digest over all of it.

    MAGIC, length of the header (4 bytes), header, the passes' data, footer, length of the footer (8 bytes), SHA-256 (32 bytes)

Header and footer are msgpack. A pass's data are at the client its shares, packed, in the order of the kinds (where a kind computes
something ahead of the query, the result); at the server the client's early messages. Where the two are alone, both have no seed to
expand, and keep of every kind what they drew themselves and their shares. Neither party's file alone says anything about a query, and
both together undo the masks of the one query that uses them.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import torch
from torch import Tensor

from privinf.files import finish, refusals
from privinf.session.headed import Damaged, Placed, headed, read_headed
from privinf.session.messages import SessionToken
from privinf.trust import DEALER
from protocols import kinds as _kinds  # noqa: F401  (makes every kind known)
from protocols.correlations import Correlation, Kind, Role, from_wire, on_wire, pack_parts, size_of, unpack_parts
from protocols.errors import CorrelationError
from protocols.sources.base import PartySource
from protocols.sources.dealer import Store

MAGIC = b"privinf prepared query 1\n"
MAX_HEADER = 1 << 16
_TAIL = 8 + 32


class Header(Placed, frozen=True):
    """Of a prepared query."""

    seed: SessionToken  # of what is drawn; where the two are alone nothing is
    trust: Annotated[str, msgspec.Meta(max_length=32)] = DEALER

    def __repr__(self) -> str:
        return f"Header({self.role}, {self.lane}, {self.index}, seed hidden)"


class _PassRecord(msgspec.Struct, frozen=True):
    """One pass: its kinds, the bytes of its data, and at the server the bytes of each early message."""

    kinds: list[msgspec.Raw]
    size: int
    early: list[int]


class Writer:
    """Streams one to the disk. ConfigError where the disk refuses."""

    def __init__(self, file: BinaryIO, part: Path, header: Header) -> None:
        self.part, self.header, self.size = part, header, 0
        self._file, self._hash = file, hashlib.sha256()
        self._passes: list[_PassRecord] = []
        self._begun = 0
        self.write(headed(MAGIC, header))
        self._begun = self.size

    def write(self, data: bytes | memoryview) -> None:
        """Data of the present pass."""
        with refusals(self.part.parent):
            self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def end_pass(self, kinds: list[Kind], early: list[int]) -> None:
        """What was written since the last call is one pass."""
        self._passes.append(_PassRecord(on_wire(kinds), self.size - self._begun, early))
        self._begun = self.size

    def seal(self) -> None:
        """Writes the rest, durably; the file has no name yet."""
        footer = msgspec.msgpack.encode(self._passes)
        self.write(footer + len(footer).to_bytes(8, "big"))
        with refusals(self.part.parent):
            self._file.write(self._hash.digest())
            finish(self._file)
        self.size += 32


class Prepared:
    """A prepared query that is being used, pass by pass."""

    def __init__(self, header: Header, passes: list[_PassRecord], data: list[bytes]) -> None:
        self.header = header
        self._passes = deque(zip(passes, data, strict=True))

    def __repr__(self) -> str:
        return f"Prepared({self.header.lane}, {self.header.index}, contents hidden)"

    @staticmethod
    def read(path: Path) -> Prepared:
        """A whole file, checked; Damaged or OSError."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_header(file)
            file.seek(max(start, size - _TAIL))
            length = int.from_bytes(file.read(8), "big")
            if start + length + _TAIL > size:
                raise Damaged("it is cut short, or damaged")
            file.seek(size - _TAIL - length)
            try:
                passes = msgspec.msgpack.decode(file.read(length), type=list[_PassRecord])
            except (msgspec.MsgspecError, ValueError, RecursionError):
                raise Damaged("it is damaged") from None
            if (
                min((record.size for record in passes), default=0) < 0
                or start + sum(record.size for record in passes) + length + _TAIL != size
            ):
                raise Damaged("it is cut short, or damaged")
            file.seek(0)
            digest = hashlib.sha256(file.read(start))
            data = []
            for record in passes:  # a buffer for each, which is freed after its pass
                data.append(file.read(record.size))
                digest.update(data[-1])
            digest.update(file.read(length + 8))
            if file.read() != digest.digest():
                raise Damaged("it is damaged")
        return Prepared(header, passes, data)

    def store(self, device: torch.device | str) -> PartySource:
        """A source that expands from this query's seed, or gives what was kept."""
        role = Role(self.header.role)
        return Store(role, self.header.seed, device) if self.header.trust == DEALER else Held(role, device)

    def next_pass(self, store: PartySource) -> deque[memoryview]:
        """Puts the next pass's correlations into the store that was made of it; at the server, the client's early messages."""
        if not self._passes:
            raise CorrelationError("all passes of the prepared query are used", party=self.header.role)
        record, data = self._passes.popleft()
        view, at = memoryview(data), 0
        kinds = [from_wire(fields) for fields in record.kinds]
        store.begin_pass(kinds)
        for name, kind in enumerate(kinds, store.next_name):
            if isinstance(store, Held):
                at += store.read(kind, name, view[at:])
            elif isinstance(store, Store) and store.role is Role.CLIENT and kind.shared_parts():
                store.put(name, view[at : at + kind.shared_bytes])
                at += kind.shared_bytes
        early: deque[memoryview] = deque()
        for size in record.early:
            early.append(view[at : at + size])
            at += size
        if at != len(data):
            raise CorrelationError("a prepared query does not fit its own list of correlations", party=self.header.role)
        return early


class Held(PartySource):
    """What was kept of a prepared query that the two made alone: nothing can be made of it but what it holds."""

    def make(self, kind: Kind, name: int) -> Correlation:
        """See `PartySource`."""
        raise CorrelationError(f"correlation {name} ({type(kind).__name__}) is missing or already spent", party=self.role.value)

    def read(self, kind: Kind, name: int, data: memoryview) -> int:
        """Holds a correlation whose bytes the data begin with; how many they are."""
        own, shared = kind.own_parts(self.role), kind.shared_parts()
        at, end = size_of(own), size_of(own) + size_of(shared)
        if end > len(data):
            raise CorrelationError("a prepared query does not fit its own list of correlations", party=self.role.value)
        values, shares = unpack_parts(data[:at], own, self.device), unpack_parts(data[at:end], shared, self.device)
        self.hold(Correlation(kind, name, self.role, values, shares))
        return end


def packed(correlations: Iterable[Correlation]) -> Iterator[bytes]:
    """Each as `Held.read` reads it."""
    for each in correlations:
        yield pack_parts(each.own, each.kind.own_parts(each.role)) + pack_parts(each.shares, each.kind.shared_parts())


class Recorder(Store):
    """The client's store while a query is prepared: what a query would use goes to a file instead."""

    def __init__(self, writer: Writer, device: torch.device | str) -> None:
        super().__init__(Role.CLIENT, writer.header.seed, device)
        self._writer = writer
        self._kinds: list[Kind] = []

    def expect(self, name: int, kind: Kind) -> None:
        """Notes the next kind; the one before is complete."""
        self._flush()
        self._kinds.append(kind)

    def completed(self, kind: Kind, name: int, shares: tuple[Tensor, ...]) -> None:
        """The shares as they will be used, packed as the dealer's were."""
        self._payloads[name] = memoryview(pack_parts(shares, kind.shared_parts()))

    def _flush(self) -> None:
        for payload in self._payloads.values():  # one at most
            self._writer.write(payload)
        self._payloads.clear()

    def end_pass(self) -> None:
        """All of a pass was asked for."""
        self._flush()
        self._writer.end_pass(self._kinds, [])
        self.next_name += len(self._kinds)
        self._kinds = []


def _read_header(file: BinaryIO) -> tuple[Header, int]:
    """The header, and where the data begin."""
    return read_headed(file, MAGIC, Header, MAX_HEADER, "prepared query")


def read_header(path: Path) -> Header:
    """Of a file whose rest is not looked at; Damaged or OSError."""
    with path.open("rb") as file:
        return _read_header(file)[0]


__all__ = ["Header", "Held", "Prepared", "Recorder", "Writer", "packed", "read_header"]
