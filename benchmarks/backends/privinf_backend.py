"""Ours: three processes, or two, over mutual TLS on loopback, by the same code as over a network, bytes from their sockets' meters."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from benchmarks.backends import ALONE, OURS
from benchmarks.backends.base import Counted, Sample
from benchmarks.links import NAMED, link_of
from benchmarks.networks import Network
from benchmarks.schema import Link, Predicted, Row, Socket, median
from privinf.local.child import decode_tensor
from privinf.local.session import LocalSession
from privinf.lowering.explain import explain
from privinf.lowering.joint import PREPROCESS
from privinf.session.options import Options
from privinf.trust import DEALER, TWO_PARTY
from protocols.errors import ConfigError

PARTIES = ("client", "server", "dealer")
PREDICTED = {
    DEALER: (
        ("online", "online", "client", "server", "online_bytes"),
        ("offline between S and C", "offline", "client", "server", "peer_offline_bytes"),
        ("dealer's", "offline", "dealer", None, "dealer_bytes"),
        ("set-up", "setup", "client", "server", "setup_bytes"),
    ),
    TWO_PARTY: (
        ("online", "online", "client", "server", "online_bytes"),
        ("offline", "offline", "client", "server", "offline_bytes"),
        ("set-up", "setup", "client", "server", "setup_bytes"),
    ),
}
"""What payload is held against which prediction: its name, phase, party, peer, and the field of `privinf explain`."""
COSTS = ("layer", "op", "online_bytes", "rounds", "dealer_bytes", "peer_offline_bytes", "setup_bytes", "macs")


WAITED = frozenset({("setup", "server", ("", "")), ("offline", "dealer", ("", "")), ("offline", "server", PREPROCESS)})
"""Phase, peer and label of the cells that bear the client's seconds of a phase."""


def devices_of(text: str) -> dict[str, str]:
    """`cuda`, or `client=cpu,server=cuda`; who is not named computes on the CPU."""
    if "=" not in text:
        return dict.fromkeys(PARTIES, text)
    found = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    if unknown := sorted(set(found) - set(PARTIES)):
        raise ConfigError(f"there is no party {unknown[0]!r}", remedy=f"name devices of {', '.join(PARTIES)}")
    return found


class PrivinfBackend:
    """A local session with an empty cache: its first pass holds the set-up, and the rows are the first pass's."""

    name = OURS
    key = OURS  # among BACKENDS
    trust = "dealer: a third party trusted only not to collude"
    model = DEALER
    parties: tuple[str, ...] = PARTIES
    timeout = 600.0

    def __init__(self, network: Network, seq: int, *, link: str | None = None, device: str = "cpu", **options: Any) -> None:
        self.network, self.seq, self.link, self.devices = network, seq, NAMED.get(link or "", link), devices_of(device)
        self.kernel: Link | None = options.get("kernel")  # what shapes the loopback that the processes see
        self._stack = ExitStack()
        self._seconds: list[dict[str, float]] = []
        self._passes, self._timed = 0, list[int]()  # how many passes there were, and which of them are samples

    def __enter__(self) -> Self:
        cache = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="privinf-bench-")))
        options = Options(cache=cache, link=self.link, timeout=self.timeout, trust=self.model)
        self.session = self._stack.enter_context(LocalSession(self.network.directory, options, clock=True, devices=self.devices))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def needs(parameters: int, seq: int, vocab: int) -> int:
        """Three interpreters with torch, the float and the encoded weights at S, masked ones at C, masks at D, and their packing."""
        return 3 * 400 * 2**20 + 36 * parameters

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
        cost = explain(self.network.lowered, self.seq, trust=self.model)
        macs = {(op["layer"], op["op"]): op["macs"] for op in cost["ops"]}
        found = Counted(notes=["privinf: the first pass is the warm-up of the seconds, and its bytes are the rows"])
        found.predicted += [Predicted(**self.setting, **{name: op[name] for name in COSTS}) for op in cost["ops"]]
        found.memory |= {role: party["peak_rss_bytes"] for role, party in self.session.parties.items() if party}
        for party in self.parties:
            self._count(found, party, macs)
        total = cost["total"]
        for name, phase, party, peer, field in PREDICTED[self.model]:
            own = [r for r in found.rows if (r.phase, r.party) == (phase, party) and peer in (None, r.peer)]
            found.figures[f"{name} payload"] = (sum(r.payload or 0 for r in own),)
            found.figures[f"{name} payload, predicted"] = (total[field],)
        for phase, rounds in (("online", total["rounds"]), ("offline", total.get("offline_rounds"))):
            if rounds is not None:
                found.figures[f"{phase} rounds"] = (sum(r.rounds for r in found.rows if (r.phase, r.party) == (phase, "client")),)
                found.figures[f"{phase} rounds, predicted"] = (rounds,)
        return found

    def _count(self, found: Counted, party: str, macs: dict[tuple[str, str], int]) -> None:
        """Rows and sockets of the first connection to each peer."""
        details = self.session.details[party]
        if "passes" not in details:
            raise ConfigError(
                f"the {party} process was ended by force before it said what it had counted", remedy="is the machine overloaded?"
            )
        passes = details["passes"]
        timed = [passes[number] for number in (self._timed[1:] or self._timed)] if passes else []
        peaks = {(op["layer"], op["op"]): int(op["peak"]) for op in passes[0]} if passes else {}
        first: dict[str, dict[str, Any]] = {}
        for link in details["links"]:
            first.setdefault(link["peer"], link)
        for peer, link in first.items():
            raw = link["socket"]
            found.sockets.append(Socket(**self.setting, party=party, peer=peer, bytes_sent=raw["sent"], bytes_received=raw["received"]))
            for cell in link["labels"]:
                label, phase = (cell["layer"], cell["op"]), cell["phase"]
                own = [op for ops in timed for op in ops if (op["layer"], op["op"]) == label] if phase == "online" and any(label) else []
                wall = tuple(op["seconds"] for op in own)
                if party == "client" and (phase, peer, label) in WAITED:
                    wall = self.samples(phase)
                found.rows.append(
                    Row(
                        **self.setting,
                        trust=self.trust,
                        layer=label[0],
                        op=label[1],
                        phase=phase,
                        party=party,
                        peer=peer,
                        bytes_sent=cell["sent"],
                        bytes_received=cell["received"],
                        payload=cell["payload"],
                        rounds=cell["rounds"],
                        seconds=median(wall),
                        samples=wall,
                        compute_seconds=median(op["seconds"] - op["wait"] - op["wire"] for op in own),
                        wait_seconds=median(op["wait"] for op in own),
                        wire_seconds=median(op["wire"] for op in own),
                        peak_bytes=peaks.get(label) if own else None,
                        macs=macs.get(label) if own and party == "server" else None,
                    )
                )

    @property
    def setting(self) -> dict[str, Any]:
        """The fields that all rows share."""
        used = {role: self.devices.get(role, "cpu") for role in self.parties}
        device = used["client"] if len(set(used.values())) == 1 else ",".join(f"{role}={name}" for role, name in used.items())
        link = self.kernel or link_of(self.link)
        alone = self.model == TWO_PARTY
        return {**self.network.sizes, "seq": self.seq, "backend": self.name, "device": device, "link": link, "alone": alone}

    def samples(self, phase: str) -> tuple[float, ...]:
        """The client's seconds: the set-up happens in the first pass, which is the warm-up of the other phases."""
        used = self._seconds[:1] if phase == "setup" or len(self._seconds) == 1 else self._seconds[1:]
        return tuple(seconds[phase] for seconds in used)


class TwoPartyBackend(PrivinfBackend):
    """The two parties alone: what the dealer would deal they make themselves, offline."""

    key = ALONE
    trust = TWO_PARTY
    model = TWO_PARTY
    parties = ("client", "server")
    timeout = 3600.0  # for a message, while the peer makes a pass

    @staticmethod
    def needs(parameters: int, seq: int, vocab: int) -> int:
        """Two interpreters with torch and the kernels, the weights, encoded at S and encrypted at C, and what both make of a pass.

        By what was measured: 1.6 GB in all at a tenth of a million parameters and 32 tokens, 5.2 GB at 71 million and 128.
        """
        return 15 * 10**8 + (20 + seq // 3) * parameters
