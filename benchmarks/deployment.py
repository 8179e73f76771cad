"""The parties as a user starts them: `privinf dealer`, `serve` and `gateway` as processes, and what the system says of each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

from privinf.transport.keys import init_keys
from privinf.trust import DEALER
from protocols.errors import PeerUnreachableError, TransportError

ROOT = Path(__file__).parents[1]
START_S, END_S = 120.0, 15.0
KEY = "sk-benchmark-key"
ALARM = re.compile(r"Traceback|internal error|Exception|Error:|Fatal")
"""What no log of a party may hold: faults of others are one readable line, and of its own it should have none."""


@dataclass(frozen=True)
class Footprint:
    """What the system says of a process: resident bytes, threads, open files of any kind, and sockets among them."""

    rss: int
    threads: int
    files: int
    sockets: int


def state_of(pid: int) -> Footprint:
    """TransportError where the process has ended."""
    base = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (base / "status").read_text().splitlines() if ":" in line)
        names = os.listdir(base / "fd")
        rss, threads = 1024 * int(status["VmRSS"].split()[0]), int(status["Threads"])
    except (OSError, KeyError, ValueError):
        raise TransportError(f"process {pid} has ended", remedy="its log says why") from None
    sockets = 0
    for name in names:
        with contextlib.suppress(OSError):  # it was closed meanwhile
            sockets += os.readlink(base / "fd" / name).startswith("socket:")
    return Footprint(rss, threads, len(names), sockets)


def alarms(text: str) -> list[str]:
    """Lines of a log that say of a fault of the party's own."""
    return [line for line in text.splitlines() if ALARM.search(line)]


class Verb:
    """A verb of the command line as a process; `about` is what it says with --json once it serves."""

    def __init__(self, role: str, work: Path, *words: object) -> None:
        self.role, self._out, self._err = role, work / f"{role}.out", work / f"{role}.err"
        command = [sys.executable, "-m", "privinf", *map(str, words), "--json"]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C reaches the harness, which ends it
            )
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        """All that it has written to stderr."""
        return self._err.read_text("utf-8", "replace")

    @property
    def about(self) -> dict[str, Any]:
        """Waits for the document; TransportError if the process ends or takes too long."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.alive:
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(self._out.read_text())
                return found
            time.sleep(0.05)
        raise TransportError(f"the {self.role} did not begin to serve; it says: {self.last_words}", party=self.role)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def state(self) -> Footprint:
        """As it is now; TransportError where it has ended."""
        if not self.alive:
            raise TransportError(f"the {self.role} has ended; it says: {self.last_words}", party=self.role)
        return state_of(self.pid)

    @property
    def last_words(self) -> str:
        """The last line of its log."""
        return (self.log.splitlines() or ["nothing"])[-1]

    def end(self) -> None:
        """By SIGTERM, and by force where that is not enough."""
        if self.alive:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        if self.alive:
            self.process.kill()
        self.process.wait()


class Deployment:
    """A dealer, where the trust model has one, and a server for a model directory, and a gateway if asked for; a context manager.

    Keys are made for it. `workers` of each, see `privinf serve --workers`.
    """

    def __init__(
        self, model: Path, work: Path, *, gateway: bool = False, timeout: float = 60.0, trust: str = DEALER, workers: int = 1
    ) -> None:
        self._workers = ("--workers", workers) if workers > 1 else ()
        self._model, self._gateway, self.work, self.timeout, self._trust = model, gateway, work, timeout, trust
        self.verbs: dict[str, Verb] = {}
        self._about: dict[str, dict[str, Any]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.work.mkdir(parents=True, exist_ok=True)
        init_keys(self.work / "keys", ("localhost", "127.0.0.1"), dealer=self._trust == DEALER)
        listen, dealer = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *self._workers), tuple[str, ...]()
        try:
            if self._trust == DEALER:
                self._start("dealer", *listen)
                dealer = ("--dealer", self.address("dealer"))
            trust = dealer or ("--trust", self._trust)
            self._start("server", self._model, *listen, "--setups", 0, *trust, verb="serve")
            if self._gateway:
                places = ("--server", self.address("server"), *dealer, "--http", "127.0.0.1:0", "--api-key", KEY)
                self._start("gateway", *places, "--keep", 5)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, role: str, *words: object, verb: str = "") -> None:
        keys, cache = self.work / "keys", self.work / "cache" / role
        made = Verb(role, self.work, verb or role, *words, "--keys", keys, "--cache", cache, "--timeout", self.timeout)
        self._stack.callback(made.end)
        self.verbs[role], self._about[role] = made, made.about

    def address(self, role: str) -> str:
        """HOST:PORT."""
        return str(self._about[role]["address"])

    @property
    def places(self) -> tuple[str, str, str]:
        """What a client is told: the server's and the dealer's address, if there is one, and the directory of the keys."""
        return self.address("server"), self.address("dealer") if "dealer" in self._about else "", str(self.work / "keys")

    @property
    def _serving(self) -> list[str]:
        return [role for role in ("server", "dealer") if role in self.verbs]

    def metrics(self, role: str) -> dict[str, float]:
        """Every counter and gauge by its name, summed over labels; PeerUnreachableError where nobody answers."""
        where = self.address(role) if role == "gateway" else self._about[role]["metrics"]
        try:
            asked = urllib.request.Request(f"http://{where}/metrics", headers={"Authorization": f"Bearer {KEY}"})  # the gateway wants it
            with urllib.request.urlopen(asked, timeout=self.timeout) as answer:
                text = answer.read().decode()
        except OSError as error:
            raise PeerUnreachableError(f"no metrics from the {role}: {error}", remedy="its log says why") from None
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def states(self) -> dict[str, Footprint]:
        """Of every process; TransportError where one has ended."""
        return {role: verb.state for role, verb in self.verbs.items()}

    def quiet(self, within: float) -> bool:
        """Waits until no peer is served any more, at the server and at a dealer; whether that came about in time."""
        deadline = time.monotonic() + within
        while any(self.metrics(role)["privinf_peers"] for role in self._serving):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True
