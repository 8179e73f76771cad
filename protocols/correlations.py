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
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import cache, lru_cache
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

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

Number = Annotated[int, msgspec.Meta(ge=0, lt=MAX_ELEMENTS)]
Flag = Annotated[int, msgspec.Meta(ge=0, le=1)]
Bits = Annotated[int, msgspec.Meta(ge=1, le=64)]
Shift = Annotated[int, msgspec.Meta(ge=0, le=63)]
Shape = Annotated[tuple[Number, ...], msgspec.Meta(max_length=8)]
Layout = Annotated[tuple[Number, ...], msgspec.Meta(max_length=3)]  # of rows, `protocols.rows`; or none
Names = Annotated[tuple[Number, ...], msgspec.Meta(min_length=1, max_length=1 << 16)]
Text = Annotated[str, msgspec.Meta(max_length=300)]
FIELDS = (Number, Flag, Bits, Shift, Shape, Layout, Names, Text)
"""The types that a kind's fields may have; a peer's values are held to them where they are read."""


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


class Masks(Protocol):
    """What a dealer knows while it deals: earlier masks by name, and the weight masks."""

    def mask(self, name: int) -> Tensor:
        """The mask that an earlier kind left under this name; representatives in [0, 2^bits)."""

    def weight_mask(self, name: str) -> Tensor:
        """B of the weight with this name, (in, out)."""


class Shapes(Protocol):
    """The same by shapes alone, which are public; CorrelationError for what does not exist."""

    def mask(self, name: int) -> tuple[int, ...]:
        """Of an earlier mask."""

    def weight_mask(self, name: str) -> tuple[int, ...]:
        """Of the mask of a weight."""


class Fit(NamedTuple):
    """What it comes to to deal a kind, said from shapes before anything is made."""

    values: tuple[tuple[int, ...], ...]  # shapes of what `deal` will share, which must be those of the parts
    left: tuple[int, ...] | None = None  # of what it will leave under its name
    held: int = 0  # elements that it holds at a time beyond the parts, at most
    macs: int = 0  # steps beyond one for each of those: multiply-adds


def fits(*equal: bool) -> None:
    """ValueError, which becomes a CorrelationError, unless all that a kind and the masks that it names must have in common is so."""
    if not all(equal):
        raise ValueError("shapes that do not fit")


@cache
def _decoder() -> msgspec.msgpack.Decoder[Any]:
    """Of any kind."""
    return msgspec.msgpack.Decoder(functools.reduce(operator.or_, Kind.registry.values()))


class Kind(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of all kinds; a subclass has fields of the types in `FIELDS`, and is a list of its name and them on a wire."""

    registry: ClassVar[dict[str, type[Kind]]] = {}
    drawn_early: ClassVar[bool] = False  # whether the client's own part may be needed before the query

    def __init_subclass__(cls) -> None:
        Kind.registry[cls.__name__] = cls
        _decoder.cache_clear()

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

    def fit(self, shapes: Shapes) -> Fit:
        """Holds the fields against the masks that they name, and says what `deal` will make; ValueError or LookupError if they do not fit.

        It allocates nothing: the fields come from a peer, and so do the names.
        """
        raise NotImplementedError

    def deal(self, masks: Masks, server: Tensors, client: Tensors, shares: Tensors) -> Dealt:
        """The shared values, and what later kinds may refer to by this correlation's name; `shares` are S's. `fit` came before."""
        raise NotImplementedError

    def bounded(self) -> bool:
        """Whether the fields that the number of parts and their bits are computed from are in bounds, beside their types'."""
        return True

    @property
    def dealer_bytes(self) -> int:
        """What the dealer sends for it."""
        return size_of(self.shared_parts())


class Mask(Kind, frozen=True):
    """An opening mask r = r_S + r_C for one wire; no bytes. With `keep` it outlives its pass (a cached key or value)."""

    shape: Shape
    bits: Bits
    keep: Flag = 0
    drawn_early: ClassVar[bool] = True

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    client_parts = server_parts

    def fit(self, shapes: Shapes) -> Fit:
        return Fit((), self.shape, 2 * math.prod(self.shape))

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


def on_wire(kinds: Iterable[Kind]) -> list[msgspec.Raw]:
    """As `from_wire` reads them."""
    return [msgspec.Raw(msgspec.msgpack.encode(kind)) for kind in kinds]


def from_wire(data: bytes | msgspec.Raw) -> Kind:
    """The kind of what was encoded, checked: known name, right number and types of fields, bounded sizes."""
    try:
        made: Kind = _decoder().decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        remedy = "compare the versions of all three parties"
        raise CorrelationError(f"a correlation was asked for that is none of this release: {str(error)[:200]}", remedy=remedy) from None
    what = f"a {type(made).__name__} was asked for with"
    if not made.bounded():
        raise CorrelationError(f"{what} a field out of bounds")
    if max((part.count for part in (*made.server_parts(), *made.client_parts(), *made.shared_parts())), default=0) > MAX_ELEMENTS:
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
