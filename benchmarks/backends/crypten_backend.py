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
from benchmarks.schema import Link, Row, median
from privinf.party.child import decode_tensor
from protocols.errors import ConfigError

SETTLE_S = 0.1  # for what is still between the two sockets after a pass
NAMES = ("server", "client")  # party 0 holds the weights, party 1 the ids


class CryptenBackend:
    """Its first pass is the warm-up of the seconds; the rows' bytes are those of the first pass."""

    name = "crypten"
    trust = "party 0 can read everything: it makes all correlations itself (provider TFP, the default)"

    def __init__(self, network: Network, seq: int, **options: Any) -> None:
        if options.get("link"):
            raise ConfigError("the link of the backend crypten cannot be emulated", remedy="leave --link out, or the backend")
        self.network, self.seq = network, seq
        self._stack = ExitStack()
        self._parties: list[subprocess.Popen[str]] = []
        self._passes: list[list[dict[str, Any]]] = []  # by pass, by party
        self._memory: dict[str, int] = {}

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
                self._say(
                    rank, {"rank": rank, "rendezvous": f"file://{work}/rendezvous", "directory": str(self.network.directory.resolve())}
                )
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
    def needs(network: Network, seq: int) -> int:
        """Two interpreters with torch, float weights and their shares, one-hot ids and the masks of their product."""
        return 2 * (400 * 2**20 + 28 * network.parameters + 48 * seq * network.lowered.info.vocab)

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
        """One pass to the last position's logits, which party 1 alone learns."""
        self._ask({}, "prepared")
        out = decode_tensor(self._ask({"ids": ids}, "done")[1]["logits"]).double().reshape(-1)
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
        rows = []
        for rank, party in enumerate(NAMES):
            peer = NAMES[1 - rank]
            setup, other = self._ready[rank]["setup"], self._ready[1 - rank]["setup"]
            rows.append(self._row("", "weights", "setup", party, peer, setup["sent"], other["sent"], 0, (setup["seconds"],), ()))
            for place, op in enumerate(self._passes[0][rank]["ops"]):
                received = self._passes[0][1 - rank]["ops"][place]["sent"]
                wall, cpu = (tuple(p[rank]["ops"][place][key] for p in self._passes[1:] or self._passes) for key in ("seconds", "cpu"))
                rows.append(self._row(op["layer"], op["op"], "online", party, peer, op["sent"], received, op["rounds"], wall, cpu))
        note = f"crypten: {self._ready[0]['connections']} TCP connections, rounds are calls of its communicator"
        return Counted(
            rows, dict(self._memory), [note, "crypten: no dealer; set-up is the encoding of the weights, without the masks of a pass"]
        )

    def _row(
        self, layer: str, op: str, phase: Any, party: str, peer: str, sent: int, received: int, rounds: int, wall: Any, cpu: Any
    ) -> Row:
        return Row(
            **self.network.sizes,
            seq=self.seq,
            backend=self.name,
            trust=self.trust,
            device="cpu",
            link=Link(),
            layer=layer,
            op=op,
            phase=phase,
            party=party,
            peer=peer,
            bytes_sent=sent,
            bytes_received=received,
            rounds=rounds,
            seconds=median(wall),
            samples=wall,
            cpu_seconds=median(cpu),
        )
