"""A run while it grows, and the loop that interleaves the backends' samples, so that noise hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.backends import ALONE, OURS, backend
from benchmarks.backends.base import Sample
from benchmarks.links import link_of
from benchmarks.networks import SHIPPED, Network, made, model_id, opened
from benchmarks.schema import Absent, Goal, Link, Measure, Predicted, Result, Row, Setting, Socket, median, totals_of


class Run:
    """What has been measured so far; `result` may be asked for at any time."""

    def __init__(self, scenario: str) -> None:
        self.scenario = scenario
        self.started, self._began = machine.now(), time.monotonic()
        self.commit = machine.commit()  # of the code that was loaded
        self.machine = machine.machine()
        self.model: dict[str, str] = {}
        self.rows: list[Row] = []
        self.sockets: list[Socket] = []
        self.predicted: list[Predicted] = []
        self.measures: list[Measure] = []
        self.budget: list[Goal] = []
        self.broken: list[str] = []  # of what was required
        self.absent: list[Absent] = []
        self.notes: list[str] = []
        self.seconds: dict[tuple[Setting, str], tuple[float, ...]] = {}

    def network(self, model: Path | None, work: Path) -> Network:
        """A MODEL directory, noted with its id; without one a network of the shipped model's shape with random weights."""
        if model is None:
            return made("SM(t)+ScFuFFN", work, **SHIPPED)
        found = opened(model, work)
        self.model[model.resolve().name] = model_id(model)
        return found

    def measure(self, name: str, value: float, unit: str, network: Network | None = None, seq: int = 0, **more: Any) -> None:
        """Adds one figure."""
        sizes = {key: value for key, value in network.sizes.items() if key != "heads"} if network else {}
        self.measures.append(Measure(name, float(value), unit, **sizes, seq=seq, **more))

    def require(self, name: str, unit: str, most: float, found: float) -> None:
        """Adds a line of the budget that this very run must keep: the command fails otherwise, once its result is written."""
        self.budget.append(Goal(name, unit, "", most, most, found))
        if not found <= most:
            self.broken.append(f"{name}: {found:g} {unit}".strip() + f", and at most {most:g} may be")

    def note(self, text: str) -> None:
        """Adds a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def result(self, complete: bool) -> Result:
        """The schema's form."""
        return Result(
            scenario=self.scenario,
            command=machine.command(),
            commit=self.commit,
            started=self.started,
            machine=self.machine,
            versions=machine.versions(),
            complete=complete,
            took_s=round(time.monotonic() - self._began, 1),
            model=self.model,
            rows=tuple(self.rows),
            totals=tuple(totals_of(self.rows, self.seconds)),
            sockets=tuple(self.sockets),
            predicted=tuple(self.predicted),
            measures=tuple(self.measures),
            budget=tuple(self.budget),
            absent=tuple(self.absent),
            notes=tuple(self.notes),
        )


def take(run: Run, network: Network, seq: int, name: str, used: Any, link: Link = Link()) -> None:  # noqa: B008
    """Adds what a backend counted, once it is closed."""
    counted = used.counted()
    run.rows += counted.rows
    run.sockets += counted.sockets
    run.predicted += counted.predicted
    for note in counted.notes:
        run.note(note)
    for party, peak in counted.memory.items():
        run.measure("peak memory", peak, "B", network, seq, of=f"{name} {party}", link=link)
    for figure, values in counted.figures.items():
        unit, samples = "B" if "payload" in figure else "", values if len(values) > 1 else ()
        run.measure(figure, sum(values) / len(values), unit, network, seq, of=name, link=link, samples=samples)
    if counted.rows and hasattr(used, "samples"):
        for phase in ("setup", "offline", "online"):
            if samples := used.samples(phase):
                run.seconds[counted.rows[0].setting, phase] = samples


def interleave(
    run: Run,
    network: Network,
    seq: int,
    names: Sequence[str],
    *,
    samples: int = 3,
    errors: int = 1,
    link: str | None = None,
    device: str = "cpu",
    kernel: Link | None = None,
) -> None:
    """A warm-up of every backend, then `samples` passes of each in turn; then `errors` passes that reveal logits where those did not.

    Adds rows, peak memory, errors of the logits against float, and the ratios of seconds, bytes and rounds to ours.
    """
    makers = {name: backend(name) for name in names}
    vocab = network.lowered.info.vocab
    machine.require_memory(sum(maker.needs(network.parameters, seq, vocab) for maker in makers.values()), " and ".join(names))
    used = {name: maker(network, seq, link=link, device=device, kernel=kernel) for name, maker in makers.items()}
    done: dict[str, list[Sample]] = {name: [] for name in names}
    run.note(f"weights of {network.lowered.info.variant}: {network.weights}; largest attention score {network.largest_score:.1f}")
    shaped = kernel or link_of(link)
    try:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(used[name])
            for number in range(samples + 1):
                for name in names:
                    done[name].append(used[name].once(network.ids(seq, number)))
            _errors(run, network, seq, used, done, errors, shaped)
    finally:
        for name in names:
            if done[name] and name != "plain":
                take(run, network, seq, name, used[name], shaped)
        _seconds(run, network, seq, done, shaped)


def _errors(run: Run, network: Network, seq: int, used: dict[str, Any], done: dict[str, list[Sample]], count: int, link: Link) -> None:
    """Of every pass whose logits are known: some backends reveal them in each."""
    if not count:
        return
    exact = [network.floats(network.ids(seq, number)) for number in range(max(count, *(len(found) for found in done.values())))]
    for name, one in used.items():
        if name == "plain":
            continue
        known = [(number, sample.logits) for number, sample in enumerate(done[name]) if sample.logits is not None]
        known += [(number, one.once(network.ids(seq, number), logits=True).logits) for number in range(count)]
        worst = tuple(float((logits - exact[number]).abs().max()) for number, logits in known)
        agree = sum(int(logits.argmax() == exact[number].argmax()) for number, logits in known)
        run.measure("worst logit error", max(worst), "", network, seq, of=name, samples=worst, link=link)
        run.measure("greedy tokens equal to float's", agree, f"of {len(known)}", network, seq, of=name, link=link)


def _seconds(run: Run, network: Network, seq: int, done: dict[str, list[Sample]], link: Link) -> None:
    """Seconds of every backend, and how many times ours another takes, sample by sample."""
    online = {name: [s.seconds["online"] for s in found[1:]] for name, found in done.items()}
    for name, samples in online.items():
        if samples:
            run.measure("online seconds", median(samples) or 0.0, "s", network, seq, of=name, samples=tuple(samples), link=link)
    mine = OURS if OURS in online else ALONE
    for name, samples in online.items():
        pairs = list(zip(samples, online.get(mine, []), strict=False))
        if name in (OURS, ALONE, "plain") or not pairs:
            continue
        ratios = tuple(other / ours for other, ours in pairs)
        run.measure("online seconds, times ours", median(ratios) or 0.0, "x", network, seq, of=name, samples=ratios, link=link)
        for what, of_other, of_ours in _counts(run, network, seq, name, mine):
            if of_ours and of_other:
                run.measure(f"online {what}, times ours", of_other / of_ours, "x", network, seq, of=name, link=link)


def _counts(run: Run, network: Network, seq: int, name: str, mine: str) -> list[tuple[str, int, int]]:
    def of(which: str) -> tuple[int, int]:
        who = {"backend": OURS, "alone": which == ALONE} if which == mine else {"backend": which}
        own = {**network.sizes, "seq": seq, **who, "phase": "online", "party": "client"}
        client = [r for r in run.rows if all(getattr(r, key) == value for key, value in own.items())]
        return sum(r.bytes_sent + r.bytes_received for r in client), sum(r.rounds for r in client)

    (bytes_other, rounds_other), (bytes_ours, rounds_ours) = of(name), of(mine)
    return [("bytes", bytes_other, bytes_ours), ("rounds", rounds_other, rounds_ours)]
