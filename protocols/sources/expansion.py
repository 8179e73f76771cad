"""Many small tensors at once, from keystreams and from what was dealt: a call for each of them would take longer than the work."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from protocols import kernels
from protocols.arena import Moves
from protocols.correlations import Correlation, Kind, Part, Role, parts_of, unpack_parts
from protocols.prg import BLOCK, Prg, Stream, word_size
from protocols.ring import packed_size

Parts = Sequence[Part]

Drawn = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]
"""S's own values, C's own values, S's shares."""

SMALL = 1 << 14  # elements of a correlation up to which it is expanded together with others
MOST = 1 << 16  # elements that are expanded at a time
_SIZES = [word_size(bits) for bits in range(65)]


def together(device: torch.device | str) -> bool:
    """Whether anything is expanded together with others here."""
    return kernels.fast is not None and str(device) == "cpu"


def counts_of(parts: Parts) -> list[int] | None:
    """Elements of each part; None if they are not to be expanded together with others."""
    counts = []
    for part in parts:
        if part.modulus:
            return None
        counts.append(math.prod(part.shape))
    return counts if sum(counts) <= SMALL else None


def draw_both(server: Prg, client: Prg, first: int, kinds: Sequence[Kind], device: torch.device | str) -> list[Drawn]:
    """Of correlations from this name on, what both parties draw and S's shares; none if the next is not to be expanded with others."""
    at_server, at_client, lengths, total = Together(), Together(), [], 0
    for kind in kinds if together(device) else ():
        parts = parts_of(kind)
        ours, theirs = counts_of(parts.server + parts.shared), counts_of(parts.client)
        if ours is None or theirs is None or total >= MOST:
            break
        at_server.add(parts.server + parts.shared, ours)
        at_client.add(parts.client, theirs)
        lengths.append(len(parts.server))
        total += sum(ours) + sum(theirs) + 1
    if not lengths:
        return []
    names = range(first, first + len(lengths))
    both = zip(at_server.draw(server, names), at_client.draw(client, names), lengths, strict=True)
    return [(ours[:length], theirs, ours[length:]) for ours, theirs, length in both]


class Whole:
    """Tensors of all correlations of a pass, side by side in memory that each pass fills anew; by compiled code alone.

    `parts` are those of each correlation, in order; ValueError where they are not in a ring of bits.
    """

    def __init__(self, parts: Sequence[Parts]) -> None:
        flat = [part for each in parts for part in each]
        if any(part.modulus for part in flat):
            raise ValueError("elements modulo a prime are drawn one after the other")
        counts, bits = [part.count for part in flat], [part.bits for part in flat]
        starts, packed, blocks, at, first = [], [], [], 0, 0
        for each in parts:
            here = at
            for count, width in zip(counts[first : first + len(each)], bits[first : first + len(each)], strict=True):
                starts.append(here)
                here += count * _SIZES[width]
            first += len(each)
            blocks.append(-(-(here - at) // BLOCK))
            at += BLOCK * blocks[-1]
        at = 0
        for part in flat:
            packed.append(at)
            at += part.size
        self.out = torch.zeros(sum(counts), dtype=torch.int64)
        self.size = at
        """Bytes of all of them, packed."""
        self._blocks = np.array(blocks, np.int64)
        self._lists = [np.array(each, np.int64) for each in (starts, counts, [_SIZES[width] for width in bits], bits)]
        self._packed = np.array(packed, np.int64)
        tensors = [piece.view(part.shape) for piece, part in zip(torch.split(self.out, counts), flat, strict=True)] if flat else []
        self.values: list[tuple[Tensor, ...]] = []
        """Of each correlation."""
        for each in parts:
            self.values.append(tuple(tensors[: len(each)]))
            del tensors[: len(each)]

    def moved(self, to: Moves) -> Self:
        """The same in other memory, where it is only filled."""
        found = copy.copy(self)
        found.out, found.values = to.tensor(self.out), [()] * len(self.values)
        return found

    def draw(self, prg: Prg, first: int) -> None:
        """What `Part.draw` makes of the start of each correlation's stream; the streams by name, from the first on."""
        names = np.arange(first, first + len(self._blocks))
        if self.out.numel():
            kernels.fast.uniform_many(prg.starts(names, self._blocks), *self._lists, self.out.numpy())

    def unpack(self, data: memoryview) -> None:
        """What `unpack_parts` makes of what was packed side by side, of just so many bytes."""
        raw = np.frombuffer(data, np.uint8)
        assert raw.size == self.size, "packed parts of other sizes"
        _, counts, _, bits = self._lists
        if raw.size:
            kernels.fast.unpack_many(raw, self._packed, counts, bits, self.out.numpy())


class Together:
    """Tensors of several correlations that are expanded at once; `add` one after the other, then `draw` or `unpack`."""

    def __init__(self) -> None:
        self._shapes: list[tuple[int, ...]] = []
        self._counts: list[int] = []
        self._bits: list[int] = []
        self._lengths: list[int] = []  # parts of each correlation

    def add(self, parts: Parts, counts: Sequence[int]) -> None:
        """The parts of one."""
        self._shapes += [part.shape for part in parts]
        self._bits += [part.bits for part in parts]
        self._counts += counts
        self._lengths.append(len(parts))

    def draw(self, prg: Prg, names: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """What `Part.draw` makes of each stream's start, part by part; the streams by name."""
        starts, sizes, blocks, at, first = [], [_SIZES[bits] for bits in self._bits], [], 0, 0
        for length in self._lengths:
            here = at
            for place in range(first, first + length):
                starts.append(here)
                here += self._counts[place] * sizes[place]
            first += length
            blocks.append(-(-(here - at) // BLOCK))
            at += BLOCK * blocks[-1]
        out = np.empty(sum(self._counts), np.int64)
        lists = (starts, self._counts, sizes, self._bits)
        kernels.fast.uniform_many(prg.starts(names, blocks), *[np.array(x, np.int64) for x in lists], out)
        return self._shaped(out)

    def unpack(self, payloads: Sequence[memoryview]) -> list[tuple[Tensor, ...]]:
        """What `unpack_parts` makes of each payload."""
        starts, at = [], 0
        for count, bits in zip(self._counts, self._bits, strict=True):
            starts.append(at)
            at += packed_size(count, bits)
        raw = np.frombuffer(b"".join(payloads), np.uint8)
        assert raw.size == at, "payloads of other sizes"
        out = np.empty(sum(self._counts), np.int64)
        kernels.fast.unpack_many(raw, *[np.array(x, np.int64) for x in (starts, self._counts, self._bits)], out)
        return self._shaped(out)

    def _shaped(self, out: np.ndarray) -> list[tuple[Tensor, ...]]:
        if not self._counts:
            return [()] * len(self._lengths)
        pieces = torch.split(torch.from_numpy(out), self._counts)
        tensors = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        found, first = [], 0
        for length in self._lengths:
            found.append(tuple(tensors[first : first + length]))
            first += length
        return found


class Streamed(Correlation):
    """One that is expanded when it is first read. The client's shares are a payload, the server's come from its stream."""

    __slots__ = ("_device", "_payload", "_stream")

    def __init__(
        self,
        kind: Kind,
        name: int,
        role: Role,
        stream: Stream,
        device: torch.device | str,
        payload: memoryview | None = None,
        shares: tuple[Tensor, ...] | None = None,
    ) -> None:
        super().__init__(kind, name, role, shares=shares)
        self._stream, self._device, self._payload = stream, device, payload

    def _expand(self, parts: Sequence[Part]) -> tuple[Tensor, ...]:
        return tuple([part.draw(self._stream, self._device) for part in parts])

    def _make_own(self) -> tuple[Tensor, ...]:
        return self._expand(self.kind.own_parts(self.role))

    def _make_shares(self) -> tuple[Tensor, ...]:
        if self._payload is not None:
            return unpack_parts(self._payload, self.kind.shared_parts(), self._device)
        _ = self.own  # the stream is read in order
        return self._expand(self.kind.shared_parts())
