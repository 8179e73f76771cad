"""How far private logits are from float's, and how often the token is another: one run over a trained model and over random networks.

Every query is a number, from which all that is random in it follows, and is written down once it is done (`Ledger`): a run that was
interrupted, or stopped after its minutes, goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec
import torch
from torch import Tensor

from benchmarks.measure import Run
from benchmarks.networks import Network, model_id
from benchmarks.scenarios.errors import LOGITS, drawn, prompts
from benchmarks.scenarios.passes import float_model, held_out
from benchmarks.schema import Absent, Goal
from privinf.local.child import decode_tensor
from privinf.local.session import LocalSession
from privinf.session.options import Options
from protocols.errors import ConfigError
from tests.support.ladder import LADDER, float_logits, walker

Part = Literal["trained", "random"]
BOUNDS: dict[Part, tuple[float, float]] = {"trained": (0.01, 0.005), "random": (0.03, 0.01)}
"""Must and goal of the worst logit error."""
NAMES: dict[Part, str] = {"trained": "a trained model", "random": "random networks"}
FURTHER, TURN = 4, 5
"""Of TURN prompts one is continued by FURTHER tokens, and of one the token comes from the argmax on shares, no logit being shown."""
SHARES = (0.5, 0.99, 0.999)


@dataclass(frozen=True)
class Extent:
    """How much is asked for; `minutes` 0: until all is done."""

    prompts: int = 1000
    networks: int = 2000
    each: int = 5
    first: int = 0
    minutes: float = 0.0
    keep: Path | None = None


class Passed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One private pass; `error` is the worst of its logits, none where they were not shown."""

    kind: str
    length: int
    token: Literal["same", "tie", "wrong"]
    error: float | None = None


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of one prompt and its further tokens, or of one network."""

    part: Part
    number: int
    passes: tuple[Passed, ...]


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of what a ledger's queries are: only such are put together."""

    commit: str
    model: str
    each: int


class Ledger:
    """The queries that are done, in a file of JSON lines where one is named; a last line that was cut off is dropped."""

    def __init__(self, path: Path | None, head: Head) -> None:
        self.done: dict[tuple[Part, int], Query] = {}
        self._file = None
        if path is None:
            return
        try:
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith(b"\n")]
            if whole and msgspec.json.decode(whole[0], type=Head) != head:
                raise ConfigError(f"{path} is of another commit, model or number of passes", remedy="name another file after --keep")
            for query in (msgspec.json.decode(line, type=Query) for line in whole[1:]):
                self.done[query.part, query.number] = query
            self._file = path.open("r+b" if whole else "wb")
            self._file.truncate(sum(map(len, whole)))
            self._file.seek(0, 2)
            if not whole:
                self._write(head)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path} is no ledger of this scenario: {error}", remedy="name another file after --keep") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, query: Query) -> None:
        """Keeps it."""
        self.done[query.part, query.number] = query
        self._write(query)

    def _write(self, line: msgspec.Struct) -> None:
        if self._file is not None:
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()


def precision(run: Run, work: Path, *, model: Path, extent: Extent) -> None:
    """`prompts` of the trained model over local processes, then `networks` of random weights, `each` passes of one, in this process.

    Adds the worst error, quantiles over passes, and how many tokens were float's, ties (float has the two logits closer than twice
    the bound) and wrong; a pass beyond its bound stands in `absent` with the number that makes it again.
    """
    network = run.network(model, work)
    ends = time.monotonic() + 60 * extent.minutes if extent.minutes else float("inf")
    chosen: dict[Part, Sequence[int]] = {"trained": range(extent.prompts), "random": range(extent.first, extent.first + extent.networks)}
    with Ledger(extent.keep, Head(run.commit, model_id(model), extent.each)) as ledger:
        left = {part: [number for number in numbers if (part, number) not in ledger.done] for part, numbers in chosen.items()}
        try:
            for query in _trained(network, model, work, left["trained"]) if left["trained"] else ():
                ledger.add(query)
                if time.monotonic() > ends:
                    break
            for number in left["random"]:
                if time.monotonic() > ends:
                    break
                ledger.add(_random(number, extent.each, work / "checkpoint"))
        finally:
            for part, numbers in chosen.items():
                found = [ledger.done[part, number] for number in numbers if (part, number) in ledger.done]
                _report(run, part, found)
                if len(found) < len(numbers):
                    run.absent.append(Absent(f"{len(numbers) - len(found)} of {len(numbers)} queries, {NAMES[part]}", "not reached"))


def _trained(network: Network, model: Path, work: Path, numbers: Iterable[int]) -> Iterator[Query]:
    """Prompts of 1 token to the whole context, held-out text and random tokens in turn, in one session."""
    exact, stream, info = float_model(model, network), held_out(network, model), network.lowered.info
    with LocalSession(network.directory, Options(cache=work / "cache", timeout=600.0)) as session:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            length = 1 + int(torch.randint(info.n_positions, (), generator=generator))
            start = int(torch.randint(len(stream) - info.n_positions, (), generator=generator))
            kind = "random tokens" if number % 2 else "text"
            ids = torch.randint(info.vocab, (length,), generator=generator).tolist() if number % 2 else stream[start : start + length]
            count = min(1 + FURTHER, 1 + info.n_positions - length) if number % TURN == 0 else 1
            shown = number % TURN != 1
            tokens = [token.id for token in session.generate(ids=ids, max_new_tokens=count, ignore_eos=True, logits=shown)]
            logits = [decode_tensor(one).double().reshape(-1) for one in session.logits] if shown else []
            done = []
            for place, token in enumerate(tokens):
                wanted = exact(torch.tensor([[*ids, *tokens[:place]]]))
                what = "a further token" if place else kind if shown else f"{kind}, argmax on shares"
                done.append(_passed(what, length + place, wanted, logits[place] if shown else None, token, "trained"))
            yield Query("trained", number, tuple(done))


def _random(number: int, each: int, directory: Path) -> Query:
    """Passes of the network with this seed, the ladder's variants in turn."""
    variant = LADDER[number % len(LADDER)]
    lowered, model = drawn(number, variant, directory)
    pass_ = walker(lowered)
    done = []
    for ids in prompts(number, model, each):
        found = pass_(ids).client.reshape(-1)
        done.append(_passed(variant, len(ids), float_logits(model, ids), found, int(found.argmax()), "random"))
    return Query("random", number, tuple(done))


def _passed(kind: str, length: int, wanted: Tensor, found: Tensor | None, token: int, part: Part) -> Passed:
    behind = float(wanted.max() - wanted[token])
    judged: Literal["same", "tie", "wrong"] = (
        "same" if token == int(wanted.argmax()) else "tie" if behind <= 2 * BOUNDS[part][0] else "wrong"
    )
    return Passed(kind, length, judged, None if found is None else round(float((found - wanted).abs().max()), 6))


def _report(run: Run, part: Part, queries: Sequence[Query]) -> None:
    every = [(query.number, passed) for query in queries for passed in query.passes]
    worst = [passed.error for _, passed in every if passed.error is not None]
    if not every:
        return
    (must, goal), name = BOUNDS[part], NAMES[part]
    if part == "trained":
        run.note("trained: prompts of 1 token to the whole context, text of modules that training does not see and random tokens in turn")
    else:
        run.note(f"random: {len(queries)} networks of {', '.join(LADDER)}, one to three layers, logits up to about {LOGITS:g}")
    run.note("a tie: float has the two tokens' logits closer than twice the bound")
    if worst:
        run.budget.append(Goal(f"worst logit error of {len(worst)} passes of {name}", "", "", must, goal, max(worst)))
        _errors(run, f"{name}, {len(worst)} passes", worst)
        run.measure(f"passes with a logit off by more than {must}", sum(not error <= must for error in worst), f"of {len(worst)}", of=name)
    _grouped(run, name, every, lambda passed: passed.kind)
    _grouped(run, name, every, lambda passed: f"{1 << (passed.length - 1).bit_length()} tokens or fewer")
    for token in ("same", "tie", "wrong"):
        run.measure(f"tokens: {token}", sum(passed.token == token for _, passed in every), f"of {len(every)}", of=name)
    for number, passed in every:
        if passed.token == "wrong" or not (passed.error is None or passed.error <= must):
            reason = f"{passed.kind}, {passed.length} tokens: the token is {passed.token}, a logit off by {passed.error}"
            run.absent.append(Absent(f"{part} {number} within the bound", reason))


def _errors(run: Run, of: str, worst: Sequence[float]) -> None:
    passed = torch.tensor(worst, dtype=torch.float64)
    run.measure("worst logit error", max(worst), "", of=of, samples=tuple(worst))
    for share in SHARES:
        run.measure(f"{share * 100:g} % of the passes' worst errors are below", float(passed.quantile(share)), "", of=of)


def _grouped(run: Run, name: str, every: Sequence[tuple[int, Passed]], key: Callable[[Passed], str]) -> None:
    """The worst of each group, in the order in which they stand in the alphabet, numbers by size."""
    groups: dict[str, list[float]] = {}
    for _, passed in every:
        if passed.error is not None:
            groups.setdefault(key(passed), []).append(passed.error)
    for group in sorted(groups, key=lambda text: (len(text.split()[0]), text) if text[0].isdigit() else (0, text)):
        run.measure(f"worst logit error: {group}", max(groups[group]), f"({len(groups[group])})", of=name)
