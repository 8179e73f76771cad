"""The nursery: a process that loads what all workers share, once, and forks them off as the front asks for them.

It computes nothing afterwards and has one thread, so that what it forks is whole: neither a lock that another thread held nor a pool of
threads that is not there. What was loaded stays the same pages of memory in all of them, as long as none writes to it. A worker gets its
service, its sockets, its threads and all its secrets after the fork; the library's random numbers come from the kernel, each time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from privinf.forking import Fork, fork, taken
from privinf.session.board import Board
from privinf.session.options import Options
from privinf.session.papers import Papers
from privinf.session.service import Service
from privinf.transport.handing import Handed
from privinf.workers.words import Line
from privinf.workers.worker import work
from protocols import kernels

Make = Callable[[Handed, Board], Service]


@dataclass(frozen=True)
class Nursed:
    """What a verb gives its workers: what it says about itself, how a service is made after the fork, and what holds while it serves."""

    about: dict[str, Any]
    make: Make
    within: Callable[[], AbstractContextManager[None]]
    threads: ClassVar[int] = 0
    """That torch had before it was held to one."""


def prepare(options: Options, keys: str, role: str, clients: Path | None = None) -> None:
    """What every service needs, before its own: its keys are looked at, so that a mistake is named once, and compiled loops are there."""
    import torch

    Nursed.threads = torch.get_num_threads()
    torch.set_num_threads(1)  # no pool of threads, which a fork would break: workers have theirs
    Papers(keys, role, clients)
    kernels.load(options.cache / "kernels")


def nurse(load: Callable[[], Nursed]) -> NoReturn:
    """Loads, says so, and forks until the front has gone; never returns. What `load` raises is the caller's to report."""
    channel = taken()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which the whole group gets: the front says what becomes of it
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries workers: the front sees that one is gone by its socket
    nursed = load()
    gc.collect()
    gc.freeze()  # a collection in a worker writes to none of it
    channel.send(json.dumps({"loaded": nursed.about}).encode())
    while (found := fork(channel)) is not None:
        if not found.pid:
            _live(nursed, found)
    os._exit(0)


def _live(nursed: Nursed, born: Fork) -> NoReturn:
    """A forked process becomes a worker."""
    code = 1
    try:
        line, end, keep = (socket.socket(fileno=descriptor) for descriptor in born.descriptors[:3])
        front = Line(line)
        board = Board(born.descriptors[3], born.order["part"], born.order["workers"], lambda hint: front.say(hint=hint))
        if nursed.threads:
            import torch

            torch.set_num_threads(nursed.threads)
        with nursed.within():
            work(lambda: nursed.make(Handed(end, born.order["address"], keep), board), front)
        code = 0
    except BaseException as error:
        logging.getLogger("privinf").error("a worker ends: %s", error if isinstance(error, Exception) else type(error).__name__)
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)
