"""Stock CrypTen 0.4.1: two processes over gloo on loopback, the same lowered graph, its default provider."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from benchmarks.backends.base import Counted, Sample
from benchmarks.networks import Network
from benchmarks.schema import Link, Row, Socket, median
from privinf.local.child import decode_tensor
from protocols.errors import ConfigError

SETTLE_S = 0.1  # for what is still between the two sockets after a pass
NAMES = ("server", "client")  # party 0 holds the weights, party 1 the ids


class CryptenBackend:
    """Its first pass is the warm-up of the seconds; the rows' bytes are those of the first pass."""

    name = "crypten"
    trust = "party 0 can read everything: it makes all correlations itself (provider TFP, the default)"

    def __init__(self, network: Network, seq: int, **options: Any) -> None:
        if options.get("link") not in (None, "loopback"):
            raise ConfigError("the link of the backend crypten cannot be emulated", remedy="leave --link out, or the backend")
        self.network, self.seq = network, seq
        self._stack = ExitStack()
        self._parties: list[subprocess.Popen[str]] = []
        self._passes: list[list[dict[str, Any]]] = []  # by pass, by party
        self._memory: dict[str, int] = {}
        self._audits: list[dict[str, float]] = []

    def __enter__(self) -> Self:
        try:
            work = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="privinf-bench-"))
            for rank in range(2):
                party = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.backends.crypten_party"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    cwd=Path(__file__).parents[2],
                    start_new_session=True,
                )
                self._parties.append(party)
                self._say(rank, {"rank": rank, "work": work, "directory": str(self.network.directory.resolve())})
            for rank in range(2):
                self._hear(rank, "connected")
            self._ready = self._ask({}, "ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for rank, party in enumerate(self._parties):
            assert party.stdin is not None
            try:
                party.stdin.close()
                self._memory[NAMES[rank]] = self._hear(rank, "ended")["peak_rss_bytes"]
                party.wait(10)
            except (OSError, ConfigError, subprocess.TimeoutExpired):
                party.kill()
                party.wait()
        self._parties.clear()
        self._stack.close()

    @staticmethod
    def needs(parameters: int, seq: int, vocab: int) -> int:
        """Two interpreters with torch, float weights and their shares, one-hot ids and the masks of their product."""
        return 2 * (400 * 2**20 + 28 * parameters + 48 * seq * vocab)

    def _say(self, rank: int, message: dict[str, Any]) -> None:
        stream = self._parties[rank].stdin
        assert stream is not None
        try:
            stream.write(json.dumps(message) + "\n")
            stream.flush()
        except BrokenPipeError:
            raise ConfigError(f"party {rank} of CrypTen has ended") from None

    def _hear(self, rank: int, event: str) -> dict[str, Any]:
        stream = self._parties[rank].stdout
        assert stream is not None
        for line in stream:
            if line.startswith("{") and (found := json.loads(line))["event"] == event:
                return dict(found)
        raise ConfigError(f"party {rank} of CrypTen has ended before it was {event}", remedy="is there enough memory?")

    def once(self, ids: list[int], *, logits: bool = False) -> Sample:
        """One pass to the last position's logits, which party 1 alone learns; one for `logits` is audited, not timed."""
        self._ask({}, "prepared")
        done = self._ask({"ids": ids, "audit": logits}, "done")
        out = decode_tensor(done[1]["logits"]).double().reshape(-1)
        if logits:
            self._audits.append(done[1]["audit"])
        time.sleep(SETTLE_S)
        found = self._ask({}, "pass")
        if (found[0]["sent"], found[1]["sent"]) != (found[1]["received"], found[0]["received"]):
            raise ConfigError("CrypTen's sockets disagree on what was sent and what was received")
        if not logits:
            self._passes.append(found)
        return Sample({"online": found[1]["seconds"]}, out, int(out.argmax()))

    def _ask(self, message: dict[str, Any], event: str) -> list[dict[str, Any]]:
        for rank in range(2):
            self._say(rank, message)
        return [self._hear(rank, event) for rank in range(2)]

    def samples(self, phase: str) -> tuple[float, ...]:
        """Party 1's seconds without the warm-up."""
        if phase == "setup":
            return (self._ready[1]["setup"]["seconds"],)
        used = self._passes[1:] or self._passes
        return tuple(parties[1]["seconds"] for parties in used) if phase == "online" else ()

    def counted(self) -> Counted:
        """Rows of the first pass; a party has received in an operator what the other has sent in it."""
        found = Counted(memory=dict(self._memory))
        first, timed = self._passes[0], self._passes[1:] or self._passes
        for rank, party in enumerate(NAMES):
            both = {**self._setting, "party": party, "peer": NAMES[1 - rank]}
            setup, other = self._ready[rank]["setup"], self._ready[1 - rank]["setup"]
            received = other["sent"] + first[rank]["received"]
            found.sockets.append(Socket(**both, bytes_sent=setup["sent"] + first[rank]["sent"], bytes_received=received))
            both["trust"] = self.trust
            wall: tuple[float, ...] = (setup["seconds"],)
            found.rows.append(
                Row(
                    **both,
                    layer="",
                    op="weights",
                    phase="setup",
                    bytes_sent=setup["sent"],
                    bytes_received=other["sent"],
                    rounds=0,
                    seconds=wall[0],
                    samples=wall,
                )
            )
            for place, op in enumerate(first[rank]["ops"]):
                wall, cpu = (tuple(p[rank]["ops"][place][key] for p in timed) for key in ("seconds", "cpu"))
                found.rows.append(
                    Row(
                        **both,
                        layer=op["layer"],
                        op=op["op"],
                        phase="online",
                        bytes_sent=op["sent"],
                        bytes_received=first[1 - rank]["ops"][place]["sent"],
                        rounds=op["rounds"],
                        seconds=median(wall),
                        samples=wall,
                        compute_seconds=median(cpu),
                        wait_seconds=median(w - c for w, c in zip(wall, cpu, strict=True)),  # gloo's threads are the wire
                        peak_bytes=op["peak"],
                    )
                )
        found.notes += [
            f"crypten: {self._ready[0]['connections']} TCP connections, rounds are calls of its communicator",
            "crypten: no dealer; set-up is the encoding of the weights, without the masks of a pass",
            "crypten: compute is its main thread's; wait holds the wire, which is the work of gloo's threads",
        ]
        for name in ("truncations", "truncation failures", "truncation failures, expected"):
            if self._audits:
                found.figures[f"{name} a pass"] = tuple(audit[name] for audit in self._audits)
        return found

    @property
    def _setting(self) -> dict[str, Any]:
        return {**self.network.sizes, "seq": self.seq, "backend": self.name, "device": "cpu", "link": Link()}
