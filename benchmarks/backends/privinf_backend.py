"""Ours: three processes over mutual TLS on loopback, by the same code as over a network, bytes from the meters of their sockets."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from benchmarks.backends.base import Counted, Sample
from benchmarks.networks import Network
from benchmarks.schema import Link, Row, median
from privinf.party.child import decode_tensor
from privinf.party.local import LocalSession
from privinf.party.options import Options

PARTIES = ("client", "server", "dealer")


class PrivinfBackend:
    """A local session with an empty cache: its first pass holds the set-up, and the rows are the first pass's."""

    name = "privinf"
    trust = "dealer: a third party trusted only not to collude"

    def __init__(self, network: Network, seq: int, *, link: str | None = None, device: str = "cpu", **options: Any) -> None:
        self.network, self.seq, self.link, self.device = network, seq, link, device
        self._stack = ExitStack()
        self._seconds: list[dict[str, float]] = []
        self._passes, self._timed = 0, list[int]()  # how many passes there were, and which of them are samples

    def __enter__(self) -> Self:
        cache = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="privinf-bench-")))
        options = Options(cache=cache, link=self.link, device=self.device, timeout=600.0)
        self.session = self._stack.enter_context(LocalSession(self.network.directory, options, clock=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def needs(network: Network, seq: int) -> int:
        """Three interpreters with torch, the float and the encoded weights at S, masked ones at C, masks at D, and their packing."""
        return 3 * 400 * 2**20 + 36 * network.parameters

    def once(self, ids: list[int], *, logits: bool = False) -> Sample:
        """One pass; a session of its own, so that no cached key is reused."""
        (token,) = self.generate(ids, 1, logits=logits)
        timing = self.session.result["timing"]  # type: ignore[index]
        seconds = {"setup": timing["setup_s"], "offline": timing["offline_s"], "online": timing["first_token_s"]}
        if not logits:
            self._seconds.append(seconds)
            self._timed.append(self._passes - 1)
        found = decode_tensor(self.session.logits[0]).double().reshape(-1) if logits else None
        return Sample(seconds, found, token)

    def generate(self, ids: list[int], count: int, *, logits: bool = False) -> list[int]:
        """`count` new tokens; the fields of the contract are then in `session.result`."""
        tokens = [t.id for t in self.session.generate(ids=ids, max_new_tokens=count, ignore_eos=True, logits=logits)]
        assert len(tokens) == count
        self._passes += count
        return tokens

    def counted(self) -> Counted:
        """Rows of the first pass; the seconds of the set-up are its own, those of each operator come from the passes after it."""
        notes = ["privinf: the first pass is the warm-up of the seconds, and its bytes are the rows"]
        memory = {role: party["peak_rss_bytes"] for role, party in self.session.parties.items() if party}
        rows = [row for party in PARTIES for row in self._rows(party)]
        return Counted(rows, memory, notes)

    def _rows(self, party: str) -> list[Row]:
        details = self.session.details[party]
        clock = self._clock(details["passes"])
        first: dict[str, dict[str, Any]] = {}
        for link in details["links"]:
            first.setdefault(link["peer"], link)
        rows = []
        for peer, link in first.items():
            for cell in link["labels"]:
                label, phase = (cell["layer"], cell["op"]), cell["phase"]
                wall, cpu = clock.get(label, ((), ())) if phase == "online" and any(label) else ((), ())
                if party == "client" and not any(label) and (phase, peer) in (("setup", "server"), ("offline", "dealer")):
                    wall = self.samples(phase)
                rows.append(self._row(label, phase, party, peer, cell, wall, cpu))
        return rows

    def _row(
        self,
        label: tuple[str, str],
        phase: Any,
        party: str,
        peer: str,
        cell: dict[str, Any],
        wall: tuple[float, ...],
        cpu: tuple[float, ...],
    ) -> Row:
        options = Options(link=self.link).emulated
        link = Link(options.rtt_ms, options.mbit_s, True) if options else Link()
        return Row(
            **self.network.sizes,
            seq=self.seq,
            backend=self.name,
            trust=self.trust,
            device=self.device,
            link=link,
            layer=label[0],
            op=label[1],
            phase=phase,
            party=party,
            peer=peer,
            bytes_sent=cell["sent"],
            bytes_received=cell["received"],
            rounds=cell["rounds"],
            seconds=median(wall),
            samples=wall,
            cpu_seconds=median(cpu),
        )

    def samples(self, phase: str) -> tuple[float, ...]:
        """The client's seconds: the set-up happens in the first pass, which is the warm-up of the other phases."""
        used = self._seconds[:1] if phase == "setup" or len(self._seconds) == 1 else self._seconds[1:]
        return tuple(seconds[phase] for seconds in used)

    def _clock(self, passes: list[list[dict[str, Any]]]) -> dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]]:
        found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
        for number in (self._timed[1:] or self._timed) if passes else ():
            for op in passes[number]:
                wall, cpu = found.setdefault((op["layer"], op["op"]), ([], []))
                wall.append(op["seconds"])
                cpu.append(op["cpu"])
        return {label: (tuple(wall), tuple(cpu)) for label, (wall, cpu) in found.items()}
