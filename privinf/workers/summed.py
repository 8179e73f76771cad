"""Metrics of several processes as those of one: counts are added up, and those of processes that are gone stay in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client.core import Metric

Packed = list[list[Any]]
"""What `worker.packed` makes of families."""
SHARED = {"privinf_peers_limit": max, "privinf_draining": min}
"""Gauges that are no sums: a limit is of all processes together, and a service drains once all of its processes do."""


def summed(parts: Iterable[Packed]) -> list[Metric]:
    """All of them as one."""
    found: dict[str, Metric] = {}
    values: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
    for part in parts:
        for name, about, kind, samples in part:
            found.setdefault(name, Metric(name, about, kind))
            for sample, labels, value in samples:
                place = name, sample, tuple(sorted(labels.items()))
                before = values.get(place)
                values[place] = value if before is None else SHARED.get(name, _add)(before, value)
    for (name, sample, labels), value in values.items():
        found[name].add_sample(sample, dict(labels), value)
    return list(found.values())


def counts(part: Packed) -> Packed:
    """What of it outlives its process."""
    return [family for family in part if family[2] == "counter"]


def _add(a: float, b: float) -> float:
    return a + b
