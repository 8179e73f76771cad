"""What a report takes out of results: settings, sums of rows, figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.published import SMALLEST
from benchmarks.schema import Link, Measure, Predicted, Result, Row, Setting, Total

ATTENTION = "attn.attention"
BOUND = 0.05
"""No logit of a pass may be farther from float than this."""


def matches(thing: Any, **fields: Any) -> bool:
    """Whether all fields have these values."""
    return all(getattr(thing, name) == value for name, value in fields.items())


def same(a: Setting | Measure, b: Setting | Measure) -> bool:
    """Whether both are of one network, length and link, whatever ran it."""
    return all(getattr(a, name) == getattr(b, name) for name in ("variant", "layers", "width", "seq", "link"))


def totals(results: Iterable[Result], **fields: Any) -> list[Total]:
    """Of all results; those with a dealer, unless others are asked for."""
    return [t for result in results for t in result.totals if matches(t, **{"alone": False, **fields})]


def measures(results: Iterable[Result], **fields: Any) -> list[Measure]:
    """Of all results."""
    return [m for result in results for m in result.measures if matches(m, **fields)]


def value(results: Iterable[Result], setting: Setting | Measure, name: str, of: str) -> float | None:
    """A figure of a setting, the last one measured."""
    same = {key: getattr(setting, key) for key in ("variant", "layers", "width", "seq", "link")}
    found = measures(results, name=name, of=of, **same)
    return found[-1].value if found else None


def of_scenario(results: Iterable[Result], *names: str) -> list[Result]:
    """In the order of the names."""
    return [r for name in names for r in results if r.scenario == name]


def ladder_totals(results: Sequence[Result]) -> list[Total]:
    """Our online totals of the ladder at the largest size that was measured, its own order, a network once."""
    found = totals(of_scenario(results, "ladder"), backend="privinf", phase="online", link=Link(), device="cpu")
    largest = max(((t.layers, t.width, t.seq) for t in found), default=None)
    first: dict[str, Total] = {}
    for t in found:
        if (t.layers, t.width, t.seq) == largest:
            first.setdefault(t.variant, t)
    return list(first.values())


def loopback(results: Sequence[Result]) -> Total | None:
    """The online total of the scenario `links` on loopback as it is."""
    return next(iter(totals(of_scenario(results, "links"), backend="privinf", phase="online", link=Link())), None)


def smallest(results: Sequence[Result]) -> Total | None:
    """The online total of SM+ScFuFFN_i6 at GPT-2 size where it was measured, otherwise the cheapest of the largest size."""
    found = totals(results, backend="privinf", phase="online", link=Link())
    at_size = [t for t in found if t.variant == SMALLEST and t.width >= 768]
    return min(at_size or found, key=lambda t: (-t.width, -t.seq, t.bytes_sent), default=None)


def rows_of(results: Iterable[Result], setting: Setting, **fields: Any) -> list[Row]:
    """The rows of a setting, from the first result that has it."""
    for result in results:
        if found := [r for r in result.rows if r.setting == setting and matches(r, **fields)]:
            return found
    return []


def predicted_of(results: Iterable[Result], setting: Setting) -> list[Predicted]:
    """What was predicted of a setting, from the first result that has it."""
    return next((found for result in results if (found := [p for p in result.predicted if p.setting == setting])), [])


def latency(rows: Iterable[Row], rtt_ms: float, mbit_s: float, compute_s: float) -> float:
    """Seconds by the model: rounds x RTT / 2 + bytes / rate + compute.

    A round here is one step of the chain of dependent messages, so half a round trip. In each operator the fuller direction of the
    client's link counts: the two do not wait for each other.
    """
    bytes_one_way = sum(max(row.bytes_sent, row.bytes_received) for row in rows)
    return sum(row.rounds for row in rows) * rtt_ms / 2000 + bytes_one_way / (mbit_s * 125_000) + compute_s


def quadratic(lengths: Sequence[int], amounts: Sequence[float]) -> tuple[float, float]:
    """(a, b) of a T(T + 1)/2 + b T, by least squares of relative errors: what each causal pair takes, and each row."""
    weights = 1 / np.array(amounts)
    pairs = np.array([[t * (t + 1) / 2, t] for t in lengths]) * weights[:, None]
    a, b = np.linalg.lstsq(pairs, np.ones(len(lengths)), rcond=None)[0]
    return float(a), float(b)


def split(rows: Iterable[Row]) -> tuple[int, int]:
    """Payload of attention and of the rest, both ways."""
    attention = rest = 0
    for row in rows:
        if row.op == ATTENTION:
            attention += row.payload or 0
        else:
            rest += row.payload or 0
    return attention, rest
