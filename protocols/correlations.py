"""Correlations: what a source deals before a query, by kind.

A kind is a frozen record of public integers. It names what each party expands from its own seed and what is shared
between the two. Of a shared value the server's share comes from the server's seed as well, so that only the client is
sent anything: `value - share of S` (or XOR), packed. Protocols ask for correlations by kind and never name the source.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import cache, lru_cache
from typing import Annotated, Any, ClassVar, Protocol

import msgspec
import torch
from torch import Tensor

from protocols.errors import CorrelationError
from protocols.prg import Prg, Stream
from protocols.ring import blank, pack, packed_size, reduce, unpack

Tensors = Sequence[Tensor]
Dealt = tuple[Sequence[Tensor], Tensor | None]
"""The values to share, and what later kinds may refer to by this correlation's name."""

MAX_ELEMENTS = 1 << 31  # of one part; a peer's claim above it is refused before anything is allocated
MAX_AXES = 8

Number = Annotated[int, msgspec.Meta(gt=-MAX_ELEMENTS, lt=MAX_ELEMENTS)]
Numbers = tuple[Number, ...]


class Role(StrEnum):
    """The two computing parties."""

    SERVER = "server"
    CLIENT = "client"


@lru_cache(maxsize=4096)
def _size(shape: tuple[int, ...], bits: int) -> int:
    return packed_size(math.prod(shape), bits)


class Part(msgspec.Struct, frozen=True):
    """The public shape of one tensor of a correlation; `xor` says how it is shared."""

    shape: tuple[int, ...]
    bits: int
    xor: bool = False

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes on a wire."""
        return _size(self.shape, self.bits)


def size_of(parts: Iterable[Part]) -> int:
    """Bytes of several on a wire."""
    return sum([part.size for part in parts])


def _elements(rows: Sequence[int]) -> int:
    """Elements of the full matrix of a layout of rows (`protocols.rows`)."""
    first, number, step = rows
    return number * (first + number * step)


class Masks(Protocol):
    """What a dealer knows while it deals: earlier masks by name, and the weight masks."""

    def mask(self, name: int) -> Tensor:
        """The mask that an earlier kind left under this name; representatives in [0, 2^bits)."""

    def weight_mask(self, name: str) -> Tensor:
        """B of the weight with this name, (in, out)."""


@cache
def _any_kind() -> Any:
    """The union of all kinds."""
    return functools.reduce(operator.or_, Kind.registry.values())


class Kind(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of all kinds; a subclass has fields of the types Number, Numbers and str, and is a list of its name and them on a wire."""

    registry: ClassVar[dict[str, type[Kind]]] = {}
    drawn_early: ClassVar[bool] = False  # whether the client's own part may be needed before the query

    def __init_subclass__(cls) -> None:
        Kind.registry[cls.__name__] = cls
        _any_kind.cache_clear()

    def server_parts(self) -> tuple[Part, ...]:
        """Private randomness of S."""
        return ()

    def client_parts(self) -> tuple[Part, ...]:
        """Private randomness of C."""
        return ()

    def shared_parts(self) -> tuple[Part, ...]:
        """What is shared between S and C."""
        return ()

    def own_parts(self, role: Role) -> tuple[Part, ...]:
        """Private randomness of this party."""
        return self.server_parts() if role is Role.SERVER else self.client_parts()

    def deal(self, masks: Masks, server: Tensors, client: Tensors, shares: Tensors) -> Dealt:
        """The shared values, and what later kinds may refer to by this correlation's name; `shares` are S's."""
        raise NotImplementedError

    def bounded(self) -> bool:
        """Whether the fields that sizes are computed from may be used to compute them: they come from a peer."""
        shape, rows = getattr(self, "shape", ()), getattr(self, "rows", ())
        held = len(rows) in (0, 3) and min(rows, default=0) >= 0 and (not rows or _elements(rows) <= MAX_ELEMENTS)
        return held and 1 <= getattr(self, "bits", 1) <= 64 and 0 <= getattr(self, "shift", 0) < 64 and len(shape) <= MAX_AXES

    @property
    def dealer_bytes(self) -> int:
        """What the dealer sends for it."""
        return size_of(self.shared_parts())


class Mask(Kind, frozen=True):
    """An opening mask r = r_S + r_C for one wire; no bytes. With `keep` it outlives its pass (a cached key or value)."""

    shape: Numbers
    bits: Number
    keep: Number = 0
    drawn_early: ClassVar[bool] = True

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    client_parts = server_parts

    def deal(self, masks: Masks, server: Tensors, client: Tensors, shares: Tensors) -> Dealt:
        return (), reduce(server[0] + client[0], self.bits)


class Correlation:
    """One correlation as one party holds it; expanded when it is first read. Without a stream only its shapes are known."""

    __slots__ = ("_device", "_own", "_payload", "_role", "_shares", "_stream", "kind", "name")

    def __init__(
        self,
        kind: Kind,
        name: int,
        role: Role,
        stream: Stream | None = None,
        payload: memoryview | None = None,  # the client's shares, packed; None where they come from the stream
        device: torch.device | str = "cpu",
        shares: tuple[Tensor, ...] | None = None,  # where they are known otherwise
    ) -> None:
        self.kind, self.name = kind, name
        self._role, self._stream, self._payload, self._device = role, stream, payload, device
        self._own: tuple[Tensor, ...] | None = None
        self._shares = shares

    def __repr__(self) -> str:
        return f"Correlation({self.kind}, name={self.name}, values hidden)"

    def _expand(self, parts: tuple[Part, ...]) -> tuple[Tensor, ...]:
        if self._stream is None:
            return blanks(parts)
        return tuple([self._stream.uniform(part.shape, part.bits, self._device) for part in parts])

    @property
    def own(self) -> tuple[Tensor, ...]:
        """This party's private randomness."""
        if self._own is None:
            self._own = self._expand(self.kind.own_parts(self._role))
        return self._own

    @property
    def shares(self) -> tuple[Tensor, ...]:
        """This party's shares of the shared values."""
        if self._shares is None:
            parts = self.kind.shared_parts()
            if self._payload is not None:
                self._shares = unpack_parts(self._payload, parts, self._device)
            else:
                _ = self.own  # the stream is read in order
                self._shares = self._expand(parts)
        return self._shares

    @shares.setter
    def shares(self, shares: tuple[Tensor, ...]) -> None:
        """What was computed from the shares takes their place."""
        self._shares = shares


def blanks(parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Values that are not known in this walk."""
    return tuple([blank(*part.shape) for part in parts])


def pack_parts(values: Sequence[Tensor], parts: Sequence[Part]) -> bytes:
    """Packs tensors side by side."""
    return b"".join(pack(value, part.bits).tobytes() for value, part in zip(values, parts, strict=True))


def unpack_parts(payload: memoryview, parts: Sequence[Part], device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """The inverse of `pack_parts`."""
    out, at = [], 0
    for part in parts:
        out.append(unpack(payload[at : at + part.size], part.shape, part.bits, device))
        at += part.size
    return tuple(out)


class KindHash:
    """A running digest of the kinds asked for, so that two parties can tell that they asked for the same."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, kind: Kind) -> None:
        """Adds a kind."""
        self._hash.update(msgspec.msgpack.encode(kind))

    def digest(self) -> bytes:
        """Of all so far."""
        return self._hash.digest()


def from_wire(fields: Any) -> Kind:
    """The kind of what its list says, checked: known name, right number and types of fields, bounded sizes."""
    try:
        made: Kind = msgspec.convert(fields, _any_kind())
    except msgspec.ValidationError as error:
        remedy = "compare the versions of all three parties"
        raise CorrelationError(f"a correlation was asked for that is none of this release: {str(error)[:200]}", remedy=remedy) from None
    what = f"a {type(made).__name__} was asked for with"
    if not made.bounded():
        raise CorrelationError(f"{what} a field out of bounds")
    for part in (*made.server_parts(), *made.client_parts(), *made.shared_parts()):
        if not 1 <= part.bits <= 64 or min(part.shape, default=1) < 0 or part.count > MAX_ELEMENTS:
            raise CorrelationError(f"{what} a size out of bounds")
    return made


class Store:
    """One party's correlations of one session: each is taken once, in order.

    The server's come from its seed alone. The client's shares are payloads that are put in ahead of their use; a
    payload is dropped when it is taken.
    """

    def __init__(self, role: Role, seed: bytes, device: torch.device | str = "cpu") -> None:
        self.role = role
        self.device = device
        self.next_name = 1  # of the next correlation that is taken
        self._prg = Prg(seed)
        self._payloads: dict[int, memoryview] = {}
        self._prepared: dict[int, tuple[Tensor, ...]] = {}
        self._expected: dict[int, Kind] = {}

    def __repr__(self) -> str:
        return f"Store(role={self.role.value}, next_name={self.next_name}, seed hidden)"

    def put(self, name: int, payload: memoryview) -> None:
        """Keeps what the dealer sent for a correlation that is still to be taken."""
        if name < self.next_name or name in self._payloads:
            raise CorrelationError(f"correlation {name} was dealt twice", party=self.role.value)
        self._payloads[name] = payload

    def expect(self, name: int, kind: Kind) -> None:
        """Notes which kind was dealt under a name; no other can be taken."""
        if name < self.next_name or name in self._expected:
            raise CorrelationError(f"correlation {name} was asked for twice", party=self.role.value)
        self._expected[name] = kind

    def peek(self, kind: Kind, name: int) -> Correlation:
        """The correlation before its use, for what can be computed ahead."""
        payload = None
        if self.role is Role.CLIENT and (parts := kind.shared_parts()):
            payload = self._payloads.get(name)
            if payload is None or len(payload) != size_of(parts):
                raise CorrelationError(f"correlation {name} ({type(kind).__name__}) is missing or already spent", party="client")
        return Correlation(kind, name, self.role, self._prg.stream(name), payload, self.device)

    def drawn(self, kind: Kind, name: int) -> Correlation:
        """What of it this party draws itself; its shares stay shapes."""
        return Correlation(kind, name, self.role, self._prg.stream(name), None, self.device, blanks(kind.shared_parts()))

    def prepare(self, name: int, shares: tuple[Tensor, ...]) -> None:
        """Replaces the client's shares by what was computed from them ahead of the query."""
        self._payloads[name] = memoryview(b"")
        self._prepared[name] = shares

    def take(self, kind: Kind) -> Correlation:
        """The next correlation; it can never be taken again."""
        name = self.next_name
        self.next_name += 1
        if self._expected.pop(name, kind) != kind:
            raise CorrelationError(f"correlation {name} is a {type(kind).__name__} that was not dealt as such", party=self.role.value)
        prepared = self._prepared.pop(name, None)
        if prepared is not None:
            self._payloads.pop(name)
            return Correlation(kind, name, self.role, self._prg.stream(name), None, self.device, prepared)
        correlation = self.peek(kind, name)
        self._payloads.pop(name, None)
        return correlation


class Dealer:
    """Deals for one session. It knows both parties' seeds and the weight masks, and sees no weight and no query."""

    def __init__(
        self, server_seed: bytes, client_seed: bytes, weight_masks: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self._server, self._client = Prg(server_seed), Prg(client_seed)
        self._weight_masks = weight_masks
        self._device = device
        self._masks: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        self.next_name = 1

    def __repr__(self) -> str:
        return f"Dealer(next_name={self.next_name}, seeds hidden)"

    def mask(self, name: int) -> Tensor:
        """See `Masks`."""
        found = self._masks.get(name)
        if found is None:
            found = self._kept.get(name)
        if found is None:
            raise CorrelationError(f"a correlation refers to the mask {name}, which does not exist", party="dealer")
        return found

    def weight_mask(self, name: str) -> Tensor:
        """See `Masks`."""
        if name not in self._weight_masks:
            raise CorrelationError(f"a correlation refers to the weight {name[:80]!r}, which does not exist", party="dealer")
        return self._weight_masks[name]

    def deal(self, kind: Kind) -> bytes:
        """The client's payload of the next correlation."""
        name, self.next_name = self.next_name, self.next_name + 1
        server_stream, client_stream = self._server.stream(name), self._client.stream(name)
        server = [server_stream.uniform(p.shape, p.bits, self._device) for p in kind.server_parts()]
        client = [client_stream.uniform(p.shape, p.bits, self._device) for p in kind.client_parts()]
        parts = kind.shared_parts()
        shares = [server_stream.uniform(p.shape, p.bits, self._device) for p in parts]
        try:
            values, left = kind.deal(self, server, client, shares)
        except (RuntimeError, LookupError, ValueError, TypeError, OverflowError) as error:
            # the fields came from a peer, and each alone was in bounds
            raise CorrelationError(f"the fields of a {type(kind).__name__} do not fit the masks that they name", party="dealer") from error
        if [value.shape for value in values] != [part.shape for part in parts]:
            raise CorrelationError(f"the shape of a {type(kind).__name__} does not fit the masks that it names", party="dealer")
        if left is not None:
            (self._kept if isinstance(kind, Mask) and kind.keep else self._masks)[name] = left
        own = [value ^ share if part.xor else value - share for value, share, part in zip(values, shares, parts, strict=True)]
        return pack_parts(own, parts)

    def end_pass(self) -> None:
        """Forgets all masks that no later pass refers to."""
        self._masks.clear()

    def rewind(self, name: int) -> None:
        """Takes back what was dealt from this name on, in a pass that has ended and of which nothing was sent to anyone."""
        self.next_name = name
        self._kept = {kept: mask for kept, mask in self._kept.items() if kept < name}

    def forget(self) -> None:
        """Forgets the cached wires' masks too (the context was reset)."""
        self._masks.clear()
        self._kept.clear()
