"""Correlations: what two parties hold before a query, by kind.

A kind is a frozen record of public integers. It says what it is: the shapes of what each party draws for itself and of what
is shared between the two, and the relation that holds. How one is made is its source's, see `protocols.sources`; protocols
ask for correlations by kind and never name the source.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from functools import cache, lru_cache
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.errors import CorrelationError
from protocols.prg import Stream
from protocols.ring import blank, flat, pack, packed_size, reduce, unpack

Tensors = Sequence[Tensor]
Related = tuple[Sequence[Tensor], Tensor | None]
"""The values to share, and what later kinds may refer to by this correlation's name."""

MAX_MODULUS = 1 << 62
MAX_KINDS = 1 << 16  # of one pass
MAX_ELEMENTS = 1 << 31  # of one part; a peer's claim above it is refused before anything is allocated

Number = Annotated[int, msgspec.Meta(ge=0, lt=MAX_ELEMENTS)]
Flag = Annotated[int, msgspec.Meta(ge=0, le=1)]
Bits = Annotated[int, msgspec.Meta(ge=1, le=64)]
Shift = Annotated[int, msgspec.Meta(ge=0, le=63)]
Shape = Annotated[tuple[Number, ...], msgspec.Meta(max_length=8)]
MAX_SEQUENCES = 1 << 12  # of one pass
Layout = Annotated[tuple[Number, ...], msgspec.Meta(max_length=3 * MAX_SEQUENCES)]  # of rows, `protocols.rows`; or none
Names = Annotated[tuple[Number, ...], msgspec.Meta(min_length=1, max_length=1 << 16)]
Text = Annotated[str, msgspec.Meta(max_length=300)]
FIELDS = (Number, Flag, Bits, Shift, Shape, Layout, Names, Text)
"""The types that a kind's fields may have; a peer's values are held to them where they are read."""


class Role(StrEnum):
    """The two computing parties."""

    SERVER = "server"
    CLIENT = "client"


class OfRole:
    """What belongs to one of the two."""

    role: Role

    @property
    def is_server(self) -> bool:
        """Whether this is S."""
        return self.role is Role.SERVER


@lru_cache(maxsize=4096)
def _size(shape: tuple[int, ...], bits: int) -> int:
    return packed_size(math.prod(shape), bits)


class Part(msgspec.Struct, frozen=True):
    """The public shape of one tensor of a correlation, in Z_2^bits, or modulo a prime (`modulo`); `xor` says how it is shared."""

    shape: tuple[int, ...]
    bits: int  # that an element takes on a wire
    xor: bool = False
    modulus: int = 0  # where it is no power of two

    @staticmethod
    def modulo(shape: tuple[int, ...], modulus: int) -> Part:
        """Of elements of Z_modulus, shared by addition; ValueError unless 2 <= modulus < 2^62, so that sums of two fit an int64."""
        if not 2 <= modulus < MAX_MODULUS:
            raise ValueError(f"a modulus is at least 2 and below {MAX_MODULUS}, not {modulus}")
        return Part(shape, (modulus - 1).bit_length(), modulus=modulus)

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes on a wire."""
        return _size(self.shape, self.bits)

    def draw(self, stream: Stream, device: torch.device | str = "cpu") -> Tensor:
        """Uniform elements, exactly; the stream is read on."""
        if self.modulus:
            return stream.below(self.shape, self.modulus, device)
        return stream.uniform(self.shape, self.bits, device)

    def reduce(self, x: Tensor) -> Tensor:
        """The representatives in [0, 2^bits), or in [0, modulus)."""
        if self.modulus:
            return x if x.is_meta else x.remainder(self.modulus)
        return reduce(x, self.bits)

    def split(self, value: Tensor, share: Tensor) -> Tensor:
        """One party's share of a value from the other's, any representatives."""
        if self.xor:
            return value ^ share
        return self.reduce(value - share) if self.modulus else value - share

    def join(self, share: Tensor, other: Tensor) -> Tensor:
        """The value of two shares; a representative in its range."""
        return self.reduce(share ^ other if self.xor else share + other)


def size_of(parts: Iterable[Part]) -> int:
    """Bytes of several on a wire."""
    return sum([part.size for part in parts])


class Known(Protocol):
    """What a relation may refer to: earlier masks by name, and the weight masks."""

    def mask(self, name: int) -> Tensor:
        """The mask that an earlier kind left under this name; representatives in [0, 2^bits)."""

    def server_mask(self, name: int) -> Tensor:
        """S's share of it, any representatives, for a relation that hangs on how it is shared; only where `Kind.leaves_share`."""

    def weight_mask(self, name: str) -> Tensor:
        """B of the weight with this name, (in, out): C holds W + B. Where C holds nothing of W it is -W."""


class Shapes(Protocol):
    """The same by shapes alone, which are public; CorrelationError for what does not exist."""

    def mask(self, name: int) -> tuple[int, ...]:
        """Of an earlier mask."""

    def server_mask(self, name: int) -> tuple[int, ...]:
        """The same, of one that is left in shares that a sum joins: LookupError for another."""

    def weight_mask(self, name: str) -> tuple[int, ...]:
        """Of the mask of a weight."""


class Fit(NamedTuple):
    """What it comes to to evaluate a kind's relation, said from shapes before anything is made."""

    values: tuple[tuple[int, ...], ...]  # shapes of what it will share, which must be those of the parts
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
    shared_early: ClassVar[bool] = False  # and its shares, see `complete`
    refers: ClassVar[tuple[str, ...]] = ()  # the fields that name other correlations
    moves: ClassVar[tuple[str, ...]] = ()  # and those that say which positions, all of which move on alike

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
        """Holds the fields against the masks that they name, says what `relation` will make; ValueError or LookupError if they do not fit.

        It allocates nothing: the fields come from a peer, and so do the names.
        """
        raise NotImplementedError

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        """What holds: the values to be shared, and what later kinds may refer to by this correlation's name; `fit` came before.

        They follow from both parties' private randomness, from earlier masks, and from S's XOR shares where a sign hangs on them;
        `shares` are S's. Whoever makes the correlation, and however, both parties' shares come to these values.
        """
        raise NotImplementedError

    @property
    def outlives(self) -> bool:
        """Whether what it leaves stays after its pass, until a later kind `replaces` it."""
        return False

    def replaces(self) -> tuple[int, ...]:
        """Masks that no pass after this kind's names any more."""
        return ()

    def tolerance(self) -> tuple[int, ...]:
        """By how many units each shared value may differ from the relation's where nobody knows both parties' parts; none: by nothing."""
        return ()

    def leaves_share(self) -> bool:
        """Whether what it leaves under its name is a sum of two shares of which each party holds its own, see `share_left`."""
        return False

    def share_left(self, own: Tensors, shares: Tensors) -> Tensor:
        """A party's share of what is left, from its own randomness and its shares."""
        raise LookupError(f"a {type(self).__name__} leaves no mask that is shared by addition")

    def complete(self, weights: Mapping[str, Tensor], own: Tensors, shares: Tensors) -> tuple[Tensor, ...]:
        """C's shares, before the query, where it holds masked weights: what it makes of its shares and those."""
        return tuple(shares)

    def bounded(self) -> bool:
        """Whether the fields that the number of parts and their bits are computed from are in bounds, beside their types'."""
        return True

    @property
    def shared_bytes(self) -> int:
        """What one party's shares take, packed."""
        return size_of(parts_of(self).shared)


class Mask(Kind, frozen=True):
    """An opening mask r = r_S + r_C for one wire; no bytes. With `keep` it outlives its pass (a cached key or value)."""

    shape: Shape
    bits: Bits
    keep: Flag = 0
    drawn_early: ClassVar[bool] = True

    def server_parts(self) -> tuple[Part, ...]:
        return (Part(self.shape, self.bits),)

    client_parts = server_parts

    @property
    def outlives(self) -> bool:
        """See `Kind`."""
        return bool(self.keep)

    def fit(self, shapes: Shapes) -> Fit:
        return Fit((), self.shape, 2 * math.prod(self.shape))

    def leaves_share(self) -> bool:
        """See `Kind`."""
        return True

    def share_left(self, own: Tensors, shares: Tensors) -> Tensor:
        """See `Kind`."""
        return own[0]

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        return (), reduce(server[0] + client[0], self.bits)


class Correlation:
    """One correlation as one party holds it: its own values and its shares are handed in, or else shapes alone."""

    __slots__ = ("_own", "_shares", "kind", "name", "role")

    def __init__(
        self, kind: Kind, name: int, role: Role, own: tuple[Tensor, ...] | None = None, shares: tuple[Tensor, ...] | None = None
    ) -> None:
        self.kind, self.name, self.role = kind, name, role
        self._own, self._shares = own, shares

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind}, name={self.name}, values hidden)"

    @property
    def own(self) -> tuple[Tensor, ...]:
        """This party's private randomness."""
        if self._own is None:
            self._own = self._make_own()
        return self._own

    @property
    def shares(self) -> tuple[Tensor, ...]:
        """This party's shares of the shared values."""
        if self._shares is None:
            self._shares = self._make_shares()
        return self._shares

    @shares.setter
    def shares(self, shares: tuple[Tensor, ...]) -> None:
        """What was computed from the shares takes their place."""
        self._shares = shares

    def _make_own(self) -> tuple[Tensor, ...]:
        return blanks(parts_of(self.kind).own(self.role))

    def _make_shares(self) -> tuple[Tensor, ...]:
        return blanks(parts_of(self.kind).shared)


class PartsOf(NamedTuple):
    """All parts of a kind."""

    server: tuple[Part, ...]
    client: tuple[Part, ...]
    shared: tuple[Part, ...]

    def own(self, role: Role) -> tuple[Part, ...]:
        """Private randomness of this party."""
        return self.server if role is Role.SERVER else self.client


@lru_cache(maxsize=1 << 12)
def parts_of(kind: Kind) -> PartsOf:
    """They are asked for several times in a pass."""
    return PartsOf(kind.server_parts(), kind.client_parts(), kind.shared_parts())


def blanks(parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Values that are not known in this walk."""
    return tuple([blank(*part.shape) for part in parts])


def pack_parts(values: Sequence[Tensor], parts: Sequence[Part]) -> bytes:
    """Packs tensors side by side."""
    if len(parts) == 1 and not parts[0].modulus:
        return pack(values[0], parts[0].bits).tobytes()
    pairs = zip(values, parts, strict=True)
    return b"".join(pack(part.reduce(value) if part.modulus else value, part.bits).tobytes() for value, part in pairs)


def pack_rests(values: Sequence[Tensor], shares: Sequence[Tensor], parts: Sequence[Part]) -> bytes:
    """Packs what is left of values without one party's shares of them: the other's shares."""
    if kernels.fast is None or any(part.modulus or not value.is_cpu for value, part in zip(values, parts, strict=True)):
        return pack_parts([part.split(value, share) for value, share, part in zip(values, shares, parts, strict=True)], parts)
    out, at = np.empty(size_of(parts), np.uint8), 0
    for value, share, part in zip(values, shares, parts, strict=True):
        kernels.fast.pack_rest(flat(value), flat(share), int(part.xor), part.bits, out[at : at + part.size])
        at += part.size
    return out.tobytes()


def unpack_parts(payload: memoryview, parts: Sequence[Part], device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """The inverse of `pack_parts`."""
    if len(parts) == 1 and not parts[0].modulus:
        return (unpack(payload[: parts[0].size], parts[0].shape, parts[0].bits, device),)
    out, at = [], 0
    for part in parts:
        value = unpack(payload[at : at + part.size], part.shape, part.bits, device)
        out.append(part.reduce(value) if part.modulus else value)
        at += part.size
    return tuple(out)


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
    for parts in parts_of(made):
        for part in parts:
            if not 1 <= part.bits <= 64 or part.count > MAX_ELEMENTS:
                raise CorrelationError(f"{what} a size out of bounds")
    return made
