"""Tasks that are many, done by processes here or by actors on a Ray cluster, each at one time by one of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from privinf.session.cluster import Fleet, Remote, Work, connect
from protocols.errors import ConfigError

ROOT = Path(__file__).parents[1]
ENGINES = ("here", "ray")
PATIENCE_S = 600.0
CONNECT_S = 10.0

Given = tuple[Any, ...]
Ended = tuple[int, Any]


class Doer(Work):
    """A worker."""

    def do(self, function: Callable[..., Any], given: Given) -> Any:
        """What a function of a module makes of its arguments."""
        return function(*given)

    def close(self) -> None:
        """It has nothing to end."""


def spread(
    function: Callable[..., Any], tasks: Sequence[Given], *, workers: int, engine: str = "here", address: str = "auto", alone: bool = False
) -> Iterator[Ended]:
    """The place of each task and what came of it, in the order in which they end; raises what a task raises, and the others end.

    On a cluster a task whose node is lost is done again by another worker, so it must bear that. `alone`: a task has a node to itself,
    for timings. ConfigError for a cluster that is not there, or has another version.
    """
    if engine not in ENGINES:
        raise ConfigError(f"there is no engine {engine!r}", remedy=f"give {' or '.join(ENGINES)}")
    if engine == "ray":
        yield from _on_cluster(function, tasks, workers, address, alone)
        return
    with ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(function, *given): place for place, given in enumerate(tasks)}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def _on_cluster(function: Callable[..., Any], tasks: Sequence[Given], workers: int, address: str, alone: bool) -> Iterator[Ended]:
    ray = connect(address, CONNECT_S)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *paths]))  # of the workers; each node has this at the same place
    cores = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not cores:
        raise ConfigError("the cluster has no processor", remedy="look at `ray status`")
    count, cpus = (len(cores), min(cores)) if alone else (workers, 1.0)
    fleet = Fleet[int, Ended](ray, partial(Remote, ray, Doer, (), cpus), min(count, len(tasks)), PATIENCE_S)
    ended = fleet.do(
        iter(range(len(tasks))),
        lambda worker, place: worker.begin("do", function, tasks[place]),
        lambda worker, place, result: (place, result),
    )
    with contextlib.closing(ended):
        yield from ended
