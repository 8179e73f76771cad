"""Ciphertexts that stay for later products: a cache that grows is encrypted once, and what is new of it when it comes.

The right operands of a session's products are often what they were in the pass before and some columns (keys) or rows (values) more. What a
product's `Line`s name is public, so that both parties know what the one who answers still has. The first product of a line is laid out as
any
(`plan`); of what comes later, where it is little, each column stands under a secret of its own, or each row is a step of its own, in
ciphertexts that grow. Every answer is flooded and re-randomised as any, and every chunk of ciphertexts has one. Nothing is kept beyond
`MOST` elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.lattice.ciphertext import Keys
from protocols.lattice.gilboa import Products
from protocols.lattice.lines import Line
from protocols.lattice.matmul import Chunk, answer, seal
from protocols.lattice.plan import DEGREES, Plan, fitting, key_bytes, layout
from protocols.ring import blank, known
from protocols.rounds import Protocol_

ROOM = 64
"""Columns or rows that ciphertexts grow to."""
FEW = 8
"""New columns or rows up to which they grow; more are laid out by themselves."""
MOST = 1 << 26
"""Elements of ciphertexts that stay, at most; with more, all are forgotten."""


@dataclass(eq=False)
class Entry:
    """A chunk and what it covers: for each piece, in order, its name in every line, and its size."""

    chunk: Chunk
    heads: tuple[int, ...]
    names: list[tuple[int, ...]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    grows: bool = False

    @property
    def size(self) -> int:
        """Columns or rows."""
        return sum(self.sizes)

    @property
    def elements(self) -> int:
        """What its ciphertexts are."""
        plan = self.chunk.plan
        return plan.groups * plan.steps * plan.secrets * plan.budget.degree * len(plan.budget.primes)


class Use(NamedTuple):
    """An entry as a product uses it: the lines, by number, that it covers, from which piece on."""

    entry: Entry
    lines: tuple[int, ...]
    first: int


class Kept:
    """The entries of one session, alike at both parties; `axis` -1: pieces are columns, -2: rows."""

    def __init__(self) -> None:
        self._at: dict[tuple[Role, int, int, int], tuple[Entry, int]] = {}  # (holder, axis, bits, first name): entry and line within

    def copy(self) -> Kept:
        """The same without values, for a prediction."""
        found, made = Kept(), dict[int, Entry]()
        for key, (entry, line) in self._at.items():
            if id(entry) not in made:
                made[id(entry)] = replace(entry, chunk=Chunk(entry.chunk.plan), names=list(entry.names), sizes=list(entry.sizes))
            found._at[key] = made[id(entry)], line
        return found

    def uses(self, holder: Role, axis: int, bits: int, lines: Sequence[Line]) -> list[Use] | None:
        """The entries that cover the lines' first pieces, whole; None where one covers other lines too: it is never cut."""
        found: dict[tuple[int, int], tuple[Entry, list[int], list[int]]] = {}
        for number, line in enumerate(lines):
            at = 0
            while at < len(line.names) and (hit := self._at.get((holder, axis, bits, line.names[at]))):
                entry, within = hit
                end = at + len(entry.sizes)
                if entry.heads[within] != line.heads or list(line.names[at:end]) != [names[within] for names in entry.names]:
                    break
                _, numbers, withins = found.setdefault((id(entry), at), (entry, [], []))
                numbers.append(number)
                withins.append(within)
                at = end
        if any(withins != list(range(len(entry.heads))) for entry, _, withins in found.values()):
            return None
        uses = [Use(entry, tuple(numbers), first) for (_, first), (entry, numbers, _) in found.items()]
        return sorted(uses, key=lambda use: use.first)

    def put(self, holder: Role, axis: int, bits: int, entry: Entry) -> None:
        """Remembers a new entry; forgets all others where they have grown too many."""
        each = {id(other): other.elements for other, _ in self._at.values()}
        if sum(each.values()) + entry.elements > MOST:
            self._at.clear()
        for name in (name for names in entry.names for name in names):  # what it takes the place of
            self._at.pop((holder, axis, bits, name), None)
        for within, name in enumerate(entry.names[0]):
            self._at[holder, axis, bits, name] = entry, within

    @property
    def nbytes(self) -> int:
        """Of their ciphertexts, at the party that answers them."""
        return sum(x.nbytes for entry in {id(entry): entry for entry, _ in self._at.values()}.values() for x in entry.chunk.sealed)

    def clear(self) -> None:
        """Forgets all."""
        self._at.clear()


@lru_cache(maxsize=256)
def growing(heads: int, inner: int, columns: int, bits: int, axis: int) -> Plan | None:
    """The layout of a chunk that grows to `ROOM` columns (-1), each under its secret, or rows (-2), each a step."""
    for degree in DEGREES:
        if axis == -1:
            parts = max(1, min(inner, degree // heads))
            plan = fitting(heads, 1, inner, ROOM, bits, degree, 1, -(-inner // -(-inner // parts)))
        else:
            width = 1 << max(0, (columns - 1).bit_length())
            plan = fitting(heads, 1, ROOM, columns, bits, degree, width, 1) if width <= degree // 2 else None
        if plan is not None:
            return plan
    return None


def cut(x: Tensor, lines: Sequence[Line], numbers: Sequence[int], axis: int, start: int, size: int) -> Tensor:
    """Of x (all lines' heads, ...) the heads of some lines, and of `axis`, where it is not 0, `size` places from `start` on."""
    starts = [sum(line.heads for line in lines[:k]) for k in range(len(lines))]
    heads = sum(lines[k].heads for k in numbers)
    if not known(x):
        shape = [heads, *x.shape[1:]]
        if axis:
            shape[axis] = size
        return blank(*shape)
    found = torch.cat([x[starts[k] : starts[k] + lines[k].heads] for k in numbers])
    return found.narrow(axis, start, size) if axis else found


def resized(plan: Plan, axis: int, size: int) -> Plan:
    """The layout of a growing chunk for so many columns or rows."""
    return replace(plan, columns=size) if axis == -1 else replace(plan, inner=size)


class Task(NamedTuple):
    """One chunk's part of a product: which lines and places it covers, and what is sealed first, of how many places."""

    entry: Entry
    lines: tuple[int, ...]
    start: int
    new: int = 0


def _begun(heads: Sequence[int], axis: int, bits: int, new: int, shape: tuple[int, int, int]) -> Entry:
    """An entry for so many new columns or rows, of a product with (n, d) and (d, m)."""
    rows, inner, columns = shape
    plan = growing(sum(heads), inner if axis == -1 else 0, 0 if axis == -1 else columns, bits, axis) if new <= FEW else None
    grows = plan is not None
    inner, columns = (inner, new) if axis == -1 else (new, columns)
    plan = plan or layout(sum(heads), rows, inner, columns, bits, rows * columns)
    assert plan is not None, "what is kept was laid out, and this is no wider"
    return Entry(Chunk(plan), tuple(heads), grows=grows)


def tasks(
    kept: Kept, found: Sequence[Use], holder: Role, axis: int, bits: int, lines: Sequence[Line], shape: tuple[int, int, int, int]
) -> list[Task]:
    """What a product of (heads, n, d) and (heads, d, m), `shape`, takes where its first pieces are there; it is noted as done.

    New pieces join the last chunk of their lines where that grows and has room for them, or begin another, of all lines that have as many.
    """
    out = [Task(use.entry, use.lines, sum(lines[use.lines[0]].sizes[: use.first])) for use in found]
    covered = [0] * len(lines)
    for use in found:
        for number in use.lines:
            covered[number] = max(covered[number], use.first + len(use.entry.sizes))
    for at in sorted(set(covered)):
        numbers = tuple(k for k, count in enumerate(covered) if count == at)
        sizes, start = lines[numbers[0]].sizes[at:], sum(lines[numbers[0]].sizes[:at])
        new = sum(sizes)
        if not new:
            continue
        joins = [k for k, task in enumerate(out) if task.lines == numbers and task.entry.grows and task.start + task.entry.size == start]
        if joins and new <= FEW and out[joins[0]].entry.size + new <= ROOM:
            out[joins[0]] = task = out[joins[0]]._replace(new=new)
        else:
            task = Task(_begun([lines[k].heads for k in numbers], axis, bits, new, shape[1:]), numbers, start, new)
            out.append(task)
        task.entry.names += [tuple(lines[k].names[piece] for k in numbers) for piece in range(at, len(lines[numbers[0]].names))]
        task.entry.sizes += sizes
        if out[-1] is task:
            kept.put(holder, axis, bits, task.entry)
    for task in out:
        entry, plan = task.entry, replace(task.entry.chunk.plan, rows=shape[1])
        entry.chunk.plan = resized(plan, axis, entry.size) if entry.grows else plan
    return out


def perform(
    transfers: Products, role: Role, holder: Role, keys: Keys, task: Task, axis: int, left: Tensor, right: Tensor, need: Tensor | None
) -> Protocol_[Tensor]:
    """One task: seals what is new of right (its lines' heads and its places alone), and answers all of it."""
    entry, chunk = task.entry, task.entry.chunk
    if task.new:
        before = entry.size - task.new
        part = resized(chunk.plan, axis, task.new) if entry.grows else chunk.plan
        yield from seal(role, holder, keys, chunk, part, right, *((before, 0) if axis == -1 else (0, before)))
    return (yield from answer(transfers, role, holder, keys, chunk, left, need))


def dearer(
    kept: Kept,
    keys: Mapping[tuple[int, tuple[int, ...]], int],
    holder: Role,
    axis: int,
    bits: int,
    lines: Sequence[Line],
    shape: tuple[int, int, int, int],
    anew: Plan,
) -> bool:
    """Whether going on takes more bytes than laying all of it out anew; `keys`: how many secrets each ring has."""
    copy = kept.copy()
    found = copy.uses(holder, axis, bits, lines)
    assert found

    def missing(plan: Plan, count: int) -> int:
        return key_bytes(plan.budget, max(0, count - keys.get((plan.budget.degree, plan.budget.primes), 0)))

    again = 0
    for task in tasks(copy, found, holder, axis, bits, lines, shape):
        plan = task.entry.chunk.plan
        again += plan.sent(plan.rows * plan.columns)[1]
        if task.new:
            part = resized(plan, axis, task.new) if task.entry.grows else plan
            again += part.sent(0)[0] + missing(plan, plan.secrets)
    return again > sum(anew.sent(shape[1] * shape[3])) + missing(anew, anew.secrets)
