"""Dealer, server and client for tests: a tiny model, the three in threads, and the command line's verbs as processes.

Processes are forked by a fork server that has loaded the libraries once, so that many of them can be started and killed. They
run `privinf.cli.app.main` as the console script does.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from prometheus_client.parser import text_string_to_metric_families

from privinf.client.client import Client
from privinf.dealer.dealer import DealerService
from privinf.lowering.lowered import Lowered
from privinf.server.server import Server
from privinf.session.options import Options
from privinf.transport.keys import init_keys
from privinf.transport.listener import parse_address
from tests.support.faults import Fault, Relay
from tests.support.ladder import LOGIT_ERROR as LOGIT_ERROR
from tests.support.tiny import CLEAR as CLEAR
from tests.support.tiny import END as END
from tests.support.tiny import POSITIONS as POSITIONS
from tests.support.tiny import VOCAB as VOCAB
from tests.support.tiny import changed as changed
from tests.support.tiny import checkpoint as checkpoint
from tests.support.tiny import float_logits as float_logits
from tests.support.tiny import float_model as float_model
from tests.support.tiny import is_greedy as is_greedy
from tests.support.tiny import lowered as lowered
from tests.support.tiny import lowered_directory as lowered_directory
from tests.support.tiny import scratch as scratch
from tests.support.tiny import tokenizer as tokenizer
from tests.support.waiting import PATIENCE
from tests.support.waiting import wait_for as wait_for

WAITS = re.compile(r"(?!privinf: ).*, \d+ s")
"""A line that tells how long something takes, which comes on a slow machine."""


# ---- keys


@functools.cache
def keys() -> Path:
    """A CA and a bundle for each role."""
    init_keys(scratch() / "keys")
    return scratch() / "keys"


def second_client() -> Path:
    """Another client's bundle, of the same CA."""
    return _renewed("second", 30)


@functools.cache
def _renewed(name: str, days: int) -> Path:
    from privinf.transport.keys import renew_keys

    copy = scratch() / name
    shutil.copytree(keys(), copy)
    renew_keys(copy, days=days)
    return copy


@functools.cache
def other_ca() -> Path:
    """A stranger's."""
    init_keys(scratch() / "stranger")
    return scratch() / "stranger"


# ---- in threads


@dataclass
class Trio:
    """A dealer and a server in threads of this process, and clients at will."""

    dealer: DealerService
    server: Server
    cache: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def client(self, *, fresh: bool = False, keys: Path | None = None, **options: Any) -> Client:
        """A client; with `fresh` nothing is in its cache."""
        options.setdefault("cache", self.cache / f"fresh-{next(self._numbers)}" if fresh else self.cache)
        made = Options(**{"timeout": PATIENCE, **options})
        return Client(self.server.address, dealer=self.dealer.address, keys=str(keys or globals()["keys"]()), options=made)

    def forget(self) -> Trio:
        """The same, with nothing prepared, and without marks."""
        for kind in ("prepared", "spent"):
            shutil.rmtree(self.cache / kind, ignore_errors=True)
        return self


@contextlib.contextmanager
def trio(model: Lowered | None = None, *, allow_logits: bool = True, **options: Any) -> Iterator[Trio]:
    """Dealer and server, which end with the block."""
    torch.set_num_threads(1)
    made, bundle = Options(**{"timeout": PATIENCE, "cache": scratch() / "cache", **options}), str(keys())
    with (
        DealerService(listen="127.0.0.1:0", keys=bundle, options=made) as dealer,
        Server(
            model or lowered(), listen="127.0.0.1:0", dealer=dealer.address, keys=bundle, allow_logits=allow_logits, options=made
        ) as server,
    ):
        yield Trio(dealer, server, Path(made.cache))


# ---- as processes


def listens(address: str) -> bool:
    """Whether somebody takes connections there."""
    try:
        socket.create_connection(parse_address(address), 5).close()
        return True
    except ConnectionRefusedError:
        return False


@functools.cache
def _context() -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    return context


Hook = Callable[[], None]


@dataclass(frozen=True)
class OtherRelease:
    """A hook that makes a process speak the next version of the protocol."""

    def __call__(self) -> None:

        from privinf import version
        from privinf.session import messages

        later = version.PROTOCOL + 1
        fields = [("protocol", int, later), ("version", str, "9.9.9")]
        hello = msgspec.defstruct("Hello", fields, frozen=True)
        vars(messages).update(Hello=hello, PROTOCOL=later, VERSION="9.9.9")


def _enter(words: list[str], out: str, err: str, hook: Hook | None) -> None:
    """In the new process."""
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    torch.set_num_threads(1)
    if hook is not None:
        hook()
    from privinf.cli.app import main

    sys.exit(main(words))


class Process:
    """A verb of the command line, as a process."""

    def __init__(self, *words: object, hook: Hook | None = None) -> None:
        self.words = [str(word) for word in words]
        self._base = Path(tempfile.mkdtemp(prefix="process-", dir=scratch()))
        self._out, self._err = self._base / "out", self._base / "err"
        self._process = _context().Process(target=_enter, args=(self.words, str(self._out), str(self._err), hook), daemon=True)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    @property
    def lines(self) -> list[str]:
        """Of stderr."""
        return self.err.splitlines()

    @property
    def said(self) -> list[str]:
        """Of them those of a failure: not those that tell how far it is, or what it waits for, which come with time."""
        return [line for line in self.lines if " %, " not in line and "trying again" not in line and not WAITS.fullmatch(line)]

    def document(self) -> Any:
        """What it has written with --json, once all of it is there, though it goes on."""
        return json.loads(wait_for(lambda: self.out if self.out.endswith("\n") else "", about=lambda: f"{self.words[0]} says {self.err!r}"))

    def until(self, text: str, seconds: float = PATIENCE) -> str:
        """Waits until stderr holds a text; all of stderr."""
        return wait_for(lambda: self.err if text in self.err else "", seconds, lambda: f"{self.words[0]} says {self.err!r}")

    def until_lines(self, count: int, seconds: float = PATIENCE) -> list[str]:
        """Waits until stderr holds this many whole lines."""
        return wait_for(lambda: self.lines if self.err.count("\n") >= count else [], seconds, lambda: f"{self.words[0]} says {self.err!r}")

    @property
    def alive(self) -> bool:
        return bool(self._process.is_alive())

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code; that of a signal is negative."""
        self._process.join(seconds)
        assert not self.alive, f"{self.words} goes on: {self.err!r}"
        return int(self._process.exitcode)

    def end(self) -> None:
        """By force."""
        if self.alive:
            self.send(signal.SIGCONT)
            self._process.kill()
        self._process.join(PATIENCE)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def address_of(process: Process) -> str:
    """Where a service listens."""
    process.until("listens on")
    return next(line for line in process.lines if "listens on" in line).split(" listens on ")[1].split()[0]


@dataclass
class Services:
    """`privinf dealer` and `privinf serve`, as processes."""

    dealer: Process
    server: Process
    dealer_address: str
    server_address: str
    fault: Fault | None = None

    @contextlib.contextmanager
    def faulty(self, fault: Fault) -> Iterator[Services]:
        """The same to a client, with a fault on one of its links; a client that it strikes is the next one."""
        with (
            _reached(fault, "client", "server", self.server_address) as server,
            _reached(fault, "client", "dealer", self.dealer_address) as dealer,
        ):
            for role, process in (("server", self.server), ("dealer", self.dealer)):
                if fault.role == role and not fault.victim.done():
                    fault.victim.set_result(process)
            yield replace(self, server_address=server, dealer_address=dealer, fault=fault)

    def generate(self, *words: object, hook: Hook | None = None, timeout: float = PATIENCE, verb: str = "generate") -> Process:
        """`privinf generate`, or another verb of the client's."""
        common = ("--server", self.server_address, "--dealer", self.dealer_address, "--keys", keys())
        if verb == "generate" and not any(str(word).startswith("--prompt") for word in words):
            words = (*words, "--prompt-ids", "1,2,3")
        if "--cache" not in words:
            words = (*words, "--cache", scratch() / "cache")
        client = Process(verb, *common, "--timeout", timeout, *words, hook=hook)
        if self.fault is not None and not self.fault.victim.done():
            self.fault.victim.set_result(client)
        return client


@contextlib.contextmanager
def _reached(fault: Fault | None, dials: str, listens: str, address: str) -> Iterator[str]:
    """The address at which one party reaches another: a relay's where the fault is on that link."""
    if fault is None or fault.link != (dials, listens):
        yield address
        return
    with Relay(address, fault.link, keys(), fault) as relay:
        yield relay.address


def start_dealer(
    hook: Hook | None = None,
    timeout: float = PATIENCE,
    listen: str = "127.0.0.1:0",
    cache: Path | None = None,
    more: Sequence[object] = (),
) -> tuple[Process, str]:
    """`privinf dealer`, and its address."""
    common = ("--keys", keys(), "--timeout", timeout, "--cache", cache or scratch() / "cache")
    process = Process("dealer", "--listen", listen, "--log", "warning", *common, *more, hook=hook)
    return process, address_of(process)


def start_server(dealer: str, *words: object, hook: Hook | None = None, timeout: float = PATIENCE) -> tuple[Process, str]:
    """`privinf serve`, and its address."""
    common = ("--listen", "127.0.0.1:0", "--dealer", dealer, "--keys", keys(), "--timeout", timeout, "--cache", scratch() / "cache")
    process = Process("serve", lowered_directory(), "--log", "warning", *common, *words, hook=hook)
    return process, address_of(process)


@contextlib.contextmanager
def serving(
    dealer: Process, address: str, *words: object, fault: Fault | None = None, hook: Hook | None = None, timeout: float = PATIENCE
) -> Iterator[Services]:
    """A server of a dealer that runs, which ends with the block; with a fault on one of the links."""
    with _reached(fault, "server", "dealer", address) as way, contextlib.ExitStack() as stack:
        server, at = start_server(way, *words, hook=hook, timeout=timeout)
        stack.callback(server.end)
        made = Services(dealer, server, address, at)
        yield made if fault is None else stack.enter_context(made.faulty(fault))


@contextlib.contextmanager
def services(*words: object, fault: Fault | None = None, server_hook: Hook | None = None, timeout: float = PATIENCE) -> Iterator[Services]:
    """A dealer and a server, which end with the block."""
    dealer, address = start_dealer(timeout=timeout)
    with dealer, serving(dealer, address, *words, fault=fault, hook=server_hook, timeout=timeout) as made:
        yield made


def scraped(address: str) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {(sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples}


# ---- processes of others


def children_of(pid: int) -> set[int]:
    """Processes that this one has started and that have not ended."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == pid and state != "Z":
                    found.add(int(entry.name))
    return found


def parties_of(pid: int) -> set[int]:
    """Of a local session that this process has started: the one process that forks, and those that it has forked."""
    (forks,) = children_of(pid)
    return {forks, *children_of(forks)}


def running(pids: set[int]) -> set[int]:
    """Those of them that have not ended."""
    left = set()
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                left.add(pid)
    return left
