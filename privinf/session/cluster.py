"""Work on the machines of a Ray cluster: workers that are started, asked, and replaced where they are lost.

Ray moves what is asked and answered between its own processes, by its own means, neither encrypted nor authenticated unless it is told to
(`RAY_USE_TLS`): a cluster is the party's whose work it does, as a machine of it is. Each node needs this program in this version, and the
party's keys at the same place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TextIO, TypeVar

from privinf.transport.listener import parse_address
from privinf.version import VERSION
from protocols.errors import ConfigError, PrivinfError

MOST_LOST = 100
"""Workers that may be lost before a job gives up."""
CLOSING_S = 5.0
"""How long workers may take to end what they have with others, before they are ended."""
CARRIED = ("PYTHONPATH", "XDG_CACHE_HOME", "PRIVINF_KERNELS")
"""What a worker's environment has of this one's."""

Task = TypeVar("Task")
Found = TypeVar("Found")


class Lost(Exception):
    """A worker is no more, or the node that it was on."""


def connect(address: str, seconds: float) -> Any:
    """The `ray` module, connected to the cluster; ConfigError where there is none."""
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed", remedy="pip install 'privinf[ray]'") from None
    if ray.is_initialized():
        return ray
    try:
        if address != "auto" and "://" not in address:  # or Ray tries for minutes
            socket.create_connection(parse_address(address), seconds).close()
        with _own_signals():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except PrivinfError:
        raise
    except Exception as error:  # Ray has no common base of what it raises here
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        remedy = "give --ray-address, or start one with `ray start --head`"
        raise ConfigError(f"no Ray cluster answers at {address}: {why}", remedy=remedy) from None
    return ray


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """What a signal does stays as it was: with Ray's handler, a service that is told to end would end by an abort."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(number, handler)


@contextlib.contextmanager
def aside() -> Iterator[TextIO]:
    """For a process whose standard output is a document: what Ray prints goes to standard error, and in the end Ray is left.

    It gives the standard output as it was.
    """
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield out
        finally:
            if "ray" in sys.modules:
                sys.modules["ray"].shutdown()


class Work:
    """What a worker on the cluster is an object of. It has a `close` besides."""

    def version(self) -> str:
        """This program's, where the worker runs."""
        return VERSION


class Remote:
    """One worker on the cluster: an object of `kind`, a `Work`, made there of what is given."""

    def __init__(self, ray: Any, kind: type, given: tuple[Any, ...], cpus: float = 1.0, at_a_time: int = 1) -> None:
        self._ray = ray
        environment = {"env_vars": {name: os.environ[name] for name in CARRIED if name in os.environ}}
        options = {"num_cpus": cpus, "max_restarts": 0, "max_concurrency": at_a_time, "runtime_env": environment}
        self._actor = ray.remote(kind).options(**options).remote(*given)

    def begin(self, method: str, *given: Any) -> Any:
        """Asks; what `ray.wait` waits for and `take` takes."""
        return getattr(self._actor, method).remote(*given)

    def take(self, ref: Any) -> Any:
        """The answer; Lost, the PrivinfError that was raised there, or ConfigError where the worker cannot even be made."""
        with self._sensibly():
            return self._ray.get(ref)

    @contextlib.contextmanager
    def _sensibly(self) -> Iterator[None]:
        """What Ray raises, in words of ours."""
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayActorError as error:
            if error.actor_init_failed:
                last = str(error).strip().splitlines()[-1][:300]
                remedy = "each node needs this version of privinf, and the keys at the same place"
                raise ConfigError(f"a worker of the cluster cannot start: {last}", remedy=remedy) from None
            raise Lost from None
        except (errors.ObjectLostError, errors.OwnerDiedError, errors.NodeDiedError, errors.WorkerCrashedError):
            raise Lost from None
        except errors.RuntimeEnvSetupError as error:
            raise ConfigError(f"a node of the cluster cannot start a worker: {str(error).splitlines()[-1][:300]}") from None
        except errors.RayTaskError as error:
            if isinstance(error.cause, PrivinfError):
                raise error.cause from None
            raise

    def ask(self, method: str, *given: Any) -> Any:
        """Asks, and waits for the answer."""
        return self.take(self.begin(method, *given))

    def stream(self, method: str, *given: Any, ahead: int = 8) -> Iterator[Any]:
        """What a generator there yields, made ahead by a few pieces; Lost and errors as `take` says."""
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": ahead}
        refs, ended = getattr(self._actor, method).options(**options).remote(*given), object()
        while True:
            with self._sensibly():
                found = next(refs, ended)
                if found is ended:
                    return
                piece = self._ray.get(found)
            yield piece

    def end(self) -> None:
        """By force."""
        self._ray.kill(self._actor)


def same_version(found: str) -> None:
    """ConfigError where a worker is of another version."""
    if found != VERSION:
        raise ConfigError(f"a worker of the cluster has privinf {found}, and here it is {VERSION}", remedy="install the same on all")


class Fleet(Generic[Task, Found]):
    """`count` workers that do tasks, each `at_a_time` of them, whatever becomes of single ones; fewer than asked for go on alone."""

    def __init__(self, ray: Any, make: Callable[[], Remote], count: int, patience: float, at_a_time: int = 1) -> None:
        self._ray, self._make, self._count, self._patience, self._lost = ray, make, count, patience, 0
        self._at_a_time = at_a_time
        self._starting: dict[Any, Remote] = {}  # the answer that is awaited, and whose it is
        self._asked: dict[Any, tuple[Remote, Task]] = {}
        self._idle: list[Remote] = []  # as often as it could do a task more
        self._left: list[Task] = []  # what lost workers were doing

    def _start(self) -> None:
        """One more worker, which is at work once it has said that it is of this version."""
        worker = self._make()
        self._starting[worker.begin("version")] = worker

    def do(
        self, tasks: Iterator[Task], ask: Callable[[Remote, Task], Any], end: Callable[[Remote, Task, Any], Found]
    ) -> Generator[Found, None, None]:
        """What comes of the tasks, in the order in which they end; raises what a worker raises.

        `ask` begins one, and `end` makes of the answer what it comes to; where that asks the worker for more and it is lost, another
        worker does the task from its start.
        """
        for _ in range(self._count):
            self._start()
        try:
            while True:
                while self._idle and (task := self._left.pop() if self._left else next(tasks, None)) is not None:
                    worker = self._idle.pop()
                    self._asked[ask(worker, task)] = worker, task
                if self._idle and not self._asked:
                    closing = [worker.begin("close") for worker in set(self._idle)]
                    self._ray.wait(closing, num_returns=len(closing), timeout=CLOSING_S)
                    return
                yield from self._next(end)
        finally:
            for worker in {*self._idle, *self._starting.values(), *(worker for worker, _ in self._asked.values())}:
                worker.end()

    def _next(self, end: Callable[[Remote, Task, Any], Found]) -> Iterator[Found]:
        """Waits for one worker: what it has found, if anything; ConfigError where none was found a place for as long as patience lasts."""
        timeout = None if self._asked else self._patience
        ready, _ = self._ray.wait([*self._asked, *self._starting], num_returns=1, timeout=timeout)
        if not ready:
            raise ConfigError("the cluster has no room for a worker", remedy="look at `ray status`; what was done is kept")
        (ref,) = ready
        if (started := self._starting.pop(ref, None)) is not None:
            try:
                same_version(started.take(ref))
            except Lost:
                self._replace()
            else:
                self._idle += [started] * self._at_a_time
            return
        worker, task = self._asked.pop(ref)
        try:
            found = end(worker, task, worker.take(ref))
        except Lost:
            self._lose(worker, task)
            return
        self._idle.append(worker)
        yield found

    def _lose(self, worker: Remote, task: Task) -> None:
        """What it was doing besides is left with this task, and another takes its place."""
        besides = [ref for ref, (each, _) in self._asked.items() if each is worker]
        self._left += [task, *(self._asked.pop(ref)[1] for ref in besides)]
        self._idle = [each for each in self._idle if each is not worker]
        worker.end()
        self._replace()

    def _replace(self) -> None:
        self._lost += 1
        if self._lost > MOST_LOST:
            raise ConfigError(f"{MOST_LOST} workers of the cluster were lost", remedy="look at its nodes; what was done is kept")
        self._start()


__all__ = ["Fleet", "Lost", "Remote", "aside", "connect", "same_version"]
