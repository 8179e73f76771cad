"""How the correlations of a pass are made side by side: who waits for whom, what runs at a time, and transfers in batches.

Makers ask for transfers one by one, each for a few elements; what all of them ask for in one step and of one sort (sender, bits)
travels as one batch. Each correlation begins as soon as those are made that it names. All of it follows from the kinds alone, so
that both parties and every walk do the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.lattice.lines import Joined, Line
from protocols.ring import blank, known
from protocols.rounds import Item, Protocol_, Received
from protocols.sources.two_party.pair import LatticeEnd, Pieces, TransfersEnd
from protocols.sources.two_party.sketch import sketch

MANY = 1 << 13  # factors that fill a ciphertext
WINDOW = 1 << 26  # elements that correlations under way hold at a time, all in all
SENT = 1 << 22  # elements of messages that may leave at once, and wait for the others' round until they are so many


@dataclass(frozen=True, eq=False)
class _Request(Item):
    """In the place of a round: what a maker asks of the transfers. `sort`: method, sender and bits, alike at both parties."""

    sort: tuple[Any, ...] = ()
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)
    result: tuple[int, ...] = ()  # the answer's shape
    need: Tensor | None = None
    names: tuple[int, ...] = ()  # of what the right operand of a product of matrices is joined from
    owner: str = ""  # whose it is, where a ledger is kept


@dataclass(frozen=True, eq=False)
class _Fork(Item):
    """In the place of a round: protocols that go on each by itself, whatever the others wait for."""

    protocols: tuple[Protocol_[Any], ...] = field(default=(), repr=False)


class Ahead(list[Item]):
    """A round that C sends alone, that nobody answers and on whose order nothing hangs: it may leave before that of the others.

    A transfer's may not: both parties count what transfers they have in the order in which extensions began.
    """


def _ahead(protocol: Protocol_[Tensor]) -> Protocol_[Tensor]:
    """A protocol of such rounds."""
    received: Received | None = None
    while True:
        try:
            items = next(protocol) if received is None else protocol.send(received)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        assert not any(item.from_server for item in items)
        received, items = (yield Ahead(items)), []


def beside(*protocols: Protocol_[Any]) -> Protocol_[list[Any]]:
    """As `parallel`, of a maker: the k-th round of one does not wait for the k-th of another. One that waits yields no items."""
    (results,) = yield [_Fork(blank(0), 1, protocols=protocols)]
    return results  # type: ignore[return-value]


class Batched:
    """The transfers as makers see them: they ask, `run` answers."""

    def _ask(self, sort: tuple[Any, ...], *tensors: Tensor) -> Protocol_[Tensor]:
        (answer,) = yield [_Request(tensors[0], 1, sort=sort, tensors=tensors, result=tuple(tensors[0].shape))]
        return answer

    def correlated(self, sender: Role, choice: Tensor, delta: Tensor, bits: int, *, xor: bool = False) -> Protocol_[Tensor]:
        """See `TransfersEnd`."""
        return self._ask(("correlated", sender, bits, xor), choice, delta)

    def product(self, sender: Role, x: Tensor, y: Tensor, bits: int, y_bits: int, drop: int = 0) -> Protocol_[Tensor]:
        """See `TransfersEnd`."""
        return self._ask(("product", sender, bits, y_bits, drop), x, y)

    def chosen(self, sender: Role, choice: Tensor, words: Tensor, choice_bits: int, bits: int) -> Protocol_[Tensor]:
        """See `TransfersEnd`."""
        return self._ask(("chosen", sender, choice_bits, bits), choice, words)

    def ands(self, x: Tensor, y: Tensor, bits: int) -> Protocol_[Tensor]:
        """See `TransfersEnd`."""
        return self._ask(("ands", bits), x, y)


class BatchedLattice:
    """The lattice as makers see it: products of matrices of one shape, of all layers, become one product with more heads."""

    def __init__(self, lattice: LatticeEnd) -> None:
        self._lattice = lattice

    def matmul(
        self, holder: Role, left: Tensor, right: Tensor, bits: int, need: Tensor | None = None, pieces: Pieces | None = None
    ) -> Protocol_[Tensor]:
        """See `MakersLattice`."""
        *heads, n, d = left.shape
        m = right.shape[-1]
        wanted = None if need is None else need.numpy().tobytes()
        request = _Request(
            left,
            1,
            sort=("matmul", holder, bits, (n, d), (d, m), wanted, pieces and (pieces.axis, pieces.sizes)),
            names=pieces.names if pieces else (),
            tensors=(left.reshape(-1, n, d), right.reshape(-1, d, m)),
            result=(*heads, n, m),
            need=need,
        )
        (answer,) = yield [request]
        return answer

    def columns(self, holder: Role, x: Tensor, y: Tensor, bits: int) -> Protocol_[Tensor]:
        """See `MakersLattice`."""
        (n, width), shape = x.shape, tuple(x.shape)
        (answer,) = yield [_Request(x, 1, sort=("columns", holder, bits, (width,), (1,)), tensors=(x, y), result=shape)]
        assert y.shape == (n, 1)
        return answer

    def linear(self, weight: Any, r: Tensor, out: int, bits: int, *, transposed: bool = False) -> Protocol_[Tensor]:
        """See `LatticeEnd`."""
        return _ahead(self._lattice.linear(weight, r, out, bits, transposed=transposed))

    def lookup(self, table: Any, ids: Tensor, out: int, bits: int, size: int) -> Protocol_[Tensor]:
        """See `LatticeEnd`."""
        return _ahead(self._lattice.lookup(table, ids, out, bits, size))


class Ends(NamedTuple):
    """What batches run on."""

    transfers: TransfersEnd
    lattice: LatticeEnd


def _perform(ends: Ends, requests: Sequence[_Request], tensors: Sequence[Tensor]) -> Protocol_[Tensor]:
    method, *rest = requests[0].sort
    transfers = ends.transfers
    if method == "matmul":
        holder, bits, *_, pieces = rest
        kept = pieces and Joined(pieces[0], [Line(each.names, pieces[1], math.prod(each.result[:-2])) for each in requests])
        return ends.lattice.matmul(holder, tensors[0], tensors[1], bits, requests[0].need, kept)
    if method == "columns":
        return _columns(ends.lattice, rest[0], tensors[0], tensors[1], rest[1])
    if method == "ands":
        return transfers.ands(tensors[0], tensors[1], rest[0])
    if method == "correlated":
        sender, bits, xor = rest
        return transfers.correlated(sender, tensors[0], tensors[1], bits, xor=xor)
    sender, first, second, *more = rest
    return (transfers.product if method == "product" else transfers.chosen)(sender, tensors[0], tensors[1], first, second, *more)


def _columns(lattice: LatticeEnd, holder: Role, x: Tensor, y: Tensor, bits: int) -> Protocol_[Tensor]:
    """Many factors fill ciphertexts of their own, each a place; of fewer each has a ciphertext's part for all that it multiplies."""
    n, width = x.shape
    if width == 1 or n >= MANY:
        found = yield from lattice.matmul(holder, x.reshape(n, width, 1), y.reshape(n, 1, 1), bits)
    else:
        other = Role.CLIENT if holder is Role.SERVER else Role.SERVER
        found = yield from lattice.matmul(other, y.reshape(n, 1, 1), x.reshape(n, 1, width), bits)
    return found.reshape(n, width) if known(found) else blank(n, width)


def _joined(tensors: Sequence[Tensor], last: tuple[int, ...]) -> Tensor:
    """Side by side along one axis, (n, *last)."""
    if known(*tensors):
        return torch.cat([x.reshape(-1, *last) for x in tensors])
    return blank(sum(math.prod(x.shape) for x in tensors) // (math.prod(last) or 1), *last)


def _batch(ends: Ends, requests: Sequence[_Request]) -> Protocol_[list[Tensor]]:
    """The answers to requests of one sort, by one transfer or one product."""
    sort = requests[0].sort
    last: tuple[tuple[int, ...], tuple[int, ...]] = ((), (1 << sort[2],) if sort[0] == "chosen" else ())
    if sort[0] in ("matmul", "columns"):
        last = sort[3], sort[4]
    joined = [_joined([r.tensors[k] for r in requests], last[k]) for k in range(2)]
    protocol = _perform(ends, requests, joined)
    del joined  # it is held for as long as the protocol needs it
    answer = yield from protocol
    flat = answer.reshape(-1) if known(answer) else answer
    found, at = [], 0
    for request in requests:
        count = math.prod(request.result)
        found.append(flat[at : at + count].reshape(request.result) if known(flat) else sketch(request.result))
        at += count
    return found


@dataclass(eq=False)
class Task:
    """A correlation to be made: `start` gives its maker's generator, `finish` takes its result. `needs`: names of tasks before it."""

    name: int
    weight: int
    needs: frozenset[int]
    start: Callable[[], Generator[list[Item], Received, Any]]
    finish: Callable[[Any], None]


Watch = Callable[[Protocol_[Any], Sequence[tuple[str, int]]], Protocol_[Any]]
"""What a ledger does with a batch: by those who asked for it, and the elements that each wants."""


class _Round(NamedTuple):
    """One that a protocol is to be resumed from, and who takes the protocol's result."""

    protocol: Generator[list[Item], Received, Any]
    items: list[Item]
    end: Callable[[Any], None]


class _Run:
    """See `run`. Every step goes over tasks and protocols in an order that both parties share."""

    def __init__(self, ends: Ends, tasks: Sequence[Task], window: int, watch: Watch | None) -> None:
        self.ends, self.window, self.watch = ends, window, watch
        self.waiting = list(reversed(tasks))  # the next comes last
        self.undone = {task.name for task in tasks}
        self.admitted: list[Task] = []
        self.held = 0
        self.asked: dict[tuple[Any, ...], list[tuple[Any, _Request]]] = {}
        self.running: list[_Round] = []
        self.ahead: list[_Round] = []  # `Ahead`
        self.filled = 0  # elements of these

    def admit(self) -> Protocol_[None]:
        """Tasks in the order of use, as many as the window holds, begin when what they name is made."""
        while True:
            while self.waiting and (not self.held or self.held + self.waiting[-1].weight <= self.window):
                task = self.waiting.pop()
                self.held += task.weight
                self.admitted.append(task)
            ready = [task for task in self.admitted if not task.needs & self.undone]
            if not ready:
                return
            self.admitted = [task for task in self.admitted if task.needs & self.undone]
            for task in ready:
                self.advance(task.start(), None, self._ending(task))
                if self.filled > SENT:
                    yield from self.travel(self.left_ahead())

    def left_ahead(self) -> list[_Round]:
        """Takes what may leave before the others' round."""
        found, self.ahead, self.filled = self.ahead, [], 0
        return found

    def travel(self, rounds: list[_Round]) -> Protocol_[None]:
        """One message each way; of what is sent nothing is held here until it is answered, nor of what arrives once it is taken."""
        waiting = [(each.protocol, len(each.items), each.end) for each in reversed(rounds)]
        items = [[item for each in rounds for item in each.items]]
        rounds.clear()
        received = yield items.pop()
        received.reverse()
        while waiting:
            protocol, count, end = waiting.pop()
            self.advance(protocol, [received.pop() for _ in range(count)], end)

    def _ending(self, task: Task) -> Callable[[Any], None]:
        def end(result: Any) -> None:
            task.finish(result)
            self.undone.discard(task.name)
            self.held -= task.weight

        return end

    def advance(self, protocol: Generator[list[Item], Received, Any], received: Received | None, end: Callable[[Any], None]) -> None:
        """Resumes a protocol to its next round or to its end; a round of requests alone is asked for, not sent."""
        try:
            items = next(protocol) if received is None else protocol.send(received)
        except StopIteration as stop:
            end(stop.value)
            return
        if not any(isinstance(item, _Request | _Fork) for item in items):
            if isinstance(items, Ahead):
                self.ahead.append(_Round(protocol, items, end))
                self.filled += sum(item.value.numel() for item in items)
            else:
                self.running.append(_Round(protocol, items, end))
            return
        answers: list[Any] = [None] * len(items)
        left = len(items)
        messages = [(k, item) for k, item in enumerate(items) if not isinstance(item, _Request | _Fork)]

        def answered(places: Sequence[int]) -> Callable[[Any], None]:
            def take(values: Any) -> None:
                nonlocal left
                for place, value in zip(places, values, strict=True):
                    answers[place] = value
                left -= len(places)
                if not left:
                    self.advance(protocol, answers, end)

            return take

        for k, item in enumerate(items):
            if isinstance(item, _Request):
                self.asked.setdefault(item.sort, []).append((answered([k]), item))
            elif isinstance(item, _Fork):
                self._fork(item, answered([k]))
        if messages:
            self.advance(_sent([item for _, item in messages]), None, answered([k for k, _ in messages]))

    def _fork(self, fork: _Fork, take: Callable[[Any], None]) -> None:
        results: list[Any] = [None] * len(fork.protocols)
        left = len(results)

        def ending(place: int) -> Callable[[Any], None]:
            def end(result: Any) -> None:
                nonlocal left
                results[place] = result
                left -= 1
                if not left:
                    take([results])

            return end

        for place, protocol in enumerate(fork.protocols):
            self.advance(protocol, None, ending(place))

    def launch(self) -> None:
        """What was asked for becomes batches, a protocol each."""
        asked, self.asked = self.asked, {}
        for requests in asked.values():
            takers = [taker for taker, _ in requests]

            def deal(answers: list[Tensor], takers: list[Any] = takers) -> None:
                for taker, answer in zip(takers, answers, strict=True):
                    taker([answer])

            batch = _batch(self.ends, [request for _, request in requests])
            if self.watch is not None:
                batch = self.watch(batch, [(request.owner, math.prod(request.result)) for _, request in requests])
            self.advance(batch, None, deal)


def _sent(items: list[Item]) -> Protocol_[Received]:
    return (yield items)


def run(ends: Ends, tasks: Sequence[Task], window: int = WINDOW, watch: Watch | None = None) -> Protocol_[None]:
    """Runs all tasks, which stand in the order of use; each round is that of everything under way."""
    state = _Run(ends, tasks, window, watch)
    while True:
        yield from state.admit()
        while state.asked:
            state.launch()
            yield from state.admit()
        rounds, state.running = [*state.running, *state.left_ahead()], []
        if not rounds:
            assert not state.waiting and not state.admitted
            return
        yield from state.travel(rounds)
