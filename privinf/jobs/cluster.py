"""A job's workers as actors on a Ray cluster: what a lost node was answering, others answer.

Ray moves lines and replies between its own processes, by its own means, so the cluster is the client's, as its memory is: its nodes learn
prompts and replies. Each needs this program in this version and the client's keys at the same place.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

from privinf.jobs.worker import Reply, Terms, Worker
from privinf.transport.listener import parse_address
from privinf.version import VERSION
from protocols.errors import ConfigError, PrivinfError

MOST_LOST = 100
"""Workers that may be lost before a job gives up."""

Line = tuple[int, str]


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed", remedy="pip install 'privinf[ray]'") from None
    return ray


def connect(address: str, seconds: float) -> Any:
    """The `ray` module, connected to the cluster; ConfigError where there is none."""
    ray = _ray()
    if ray.is_initialized():
        return ray
    try:
        if address != "auto" and "://" not in address:  # or Ray tries for minutes
            socket.create_connection(parse_address(address), seconds).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except PrivinfError:
        raise
    except Exception as error:  # Ray has no common base of what it raises here
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        remedy = "give --ray-address, or start one with `ray start --head`"
        raise ConfigError(f"no Ray cluster answers at {address}: {why}", remedy=remedy) from None
    return ray


class Actors:
    """`replies` yields as they come, whatever becomes of single workers; fewer of them than asked for go on alone."""

    def __init__(self, terms: Terms, count: int, address: str = "auto", cpus: float = 1.0) -> None:
        self._ray = connect(address, terms.options.connect_s)
        self._terms, self._count, self._lost = terms, count, 0
        environment = {"env_vars": {name: os.environ[name] for name in ("PYTHONPATH", "XDG_CACHE_HOME") if name in os.environ}}
        self._kind = self._ray.remote(Worker).options(num_cpus=cpus, max_restarts=0, runtime_env=environment)
        self._starting: dict[Any, Any] = {}  # the answer that is awaited, and whose it is
        self._asked: dict[Any, tuple[Any, Line]] = {}
        self._idle: list[Any] = []
        self._left: list[Line] = []  # what lost workers were answering

    def _start(self) -> None:
        """One more worker, which is at work once it has said that it is of this version."""
        actor = self._kind.remote(self._terms)
        self._starting[actor.version.remote()] = actor

    def replies(self, pending: Iterator[Line]) -> Iterator[Reply]:
        """The replies to these lines, in the order in which they end; raises what a worker raises."""
        for _ in range(self._count):
            self._start()
        try:
            while True:
                while self._idle and (line := self._left.pop() if self._left else next(pending, None)) is not None:
                    actor = self._idle.pop()
                    self._asked[actor.answer.remote(*line)] = actor, line
                if self._idle and not self._asked:
                    return
                yield from self._next()
        finally:
            for actor in (*self._idle, *self._starting.values(), *(actor for actor, _ in self._asked.values())):
                self._ray.kill(actor)

    def _next(self) -> Iterator[Reply]:
        """Waits for one worker: its reply, if it has one; ConfigError where none was found a place for as long as patience lasts."""
        ray = self._ray
        ready, _ = ray.wait([*self._asked, *self._starting], num_returns=1, timeout=None if self._asked else self._terms.patience)
        if not ready:
            raise ConfigError("the cluster has no room for a worker", remedy="look at `ray status`; what was answered is kept")
        started, asked = self._starting.pop(ready[0], None), self._asked.pop(ready[0], None)
        try:
            found = ray.get(ready[0])
        except ray.exceptions.RayActorError:
            if asked is not None:
                self._left.append(asked[1])
            self._lost += 1
            if self._lost > MOST_LOST:
                raise ConfigError(
                    f"{MOST_LOST} workers of the cluster were lost", remedy="look at its nodes; what was answered is kept"
                ) from None
            self._start()
            return
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PrivinfError):
                raise error.cause from None
            raise
        if started is not None and found != VERSION:
            raise ConfigError(f"a worker of the cluster has privinf {found}, and here it is {VERSION}", remedy="install the same on all")
        self._idle.append(started if asked is None else asked[0])
        if asked is not None:
            yield found
