"""Seconds from a cost: what a measurement of this machine says of rounds, bytes and multiply-adds, and where it is kept.

A pass takes what its parts take, one after the other (`Speeds`):

    t = pass_s + round_s rounds + weight_s bytes of the weights + online_s online bytes + dealer_s the dealer's bytes + mac_s macs.

There are speeds of a pass that is walked, a prompt's or one of its pieces, and of a token's that is replayed from a tape; a token's that
is walked takes `BESIDE` of what a prompt at its costs would, since much of the next one is done while this one's messages travel. The first
prompt of a process takes more by what it loads and writes, which has speeds of its own and `table_s` for each entry of the tables of
exponentials, which are computed for every kind of row. A link adds half a round trip a round, and the time that bytes take at its rate:
what the client sends ahead, and half of what is online, a direction's. The numbers are measured by `privinf.local.pace`, and this module
knows nothing of how.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from privinf.files import refusals, write_private
from privinf.lowering.explain import explain
from privinf.lowering.lowered import Lowered
from privinf.ops.attention.node import CausalAttention
from privinf.version import PROTOCOL, VERSION
from protocols.errors import ConfigError
from protocols.exponential import BELOW_MAXIMUM

if TYPE_CHECKING:  # `explain` without a link has no use for TLS
    from privinf.transport.shaper import Link

FORM = 2  # of what is measured, and of the formulas
BESIDE = 0.7  # of a walked token's seconds, of those of a prompt at its costs
TAPED = 7_000_000  # bytes of a token's pass, online and the dealer's, from which its tape would be too large to be kept, about
LONGEST = 1 << 16  # bytes of a kept measurement
NAMED = {"loopback": None, "lan": "lan", "wan": "wan", "4g": "50ms:30"}


@dataclass(frozen=True)
class Speeds:
    """Seconds of a pass and of each unit of its cost, see above."""

    pass_s: float
    round_s: float
    weight_s: float
    online_s: float
    dealer_s: float
    mac_s: float

    def of(self, total: Mapping[str, int], passes: int = 1) -> float:
        """Seconds of so many passes whose costs are these, `explain`'s `total`."""
        return float(sum(each * many for each, many in zip(astuple(self), units(total, passes), strict=True)))


def units(total: Mapping[str, int], passes: int = 1) -> tuple[float, ...]:
    """What `Speeds` are seconds of, in its order; weights are read in every pass."""
    moved = total["online_bytes"], total["dealer_bytes"]
    return passes, total["rounds"], total["setup_bytes"] * passes, *moved, total["macs"]


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine, see above; `cold` and `table_s`: what a process's first prompt takes more. `load`: of a core meanwhile."""

    walked: Speeds
    taped: Speeds
    cold: Speeds
    table_s: float
    load: float
    at: float  # seconds since the epoch

    def token(self, total: Mapping[str, int], batch: int = 1, *, tapes: bool = True) -> float:
        """Seconds of computing of one more token of each sequence, by a tape where the model's passes have any and it fits."""
        if tapes and total["online_bytes"] + total["dealer_bytes"] <= TAPED * batch:
            return self.taped.of(total)
        return BESIDE * self.walked.of(total)

    def speeds(self) -> str:
        """The numbers, for people."""
        rounds = f"a round {self.walked.round_s * 1e3:.2g} ms, replayed {self.taped.round_s * 1e3:.2g} ms"
        rates = ((self.walked.online_s, "B/s online"), (self.walked.mac_s, "multiply-adds/s"))
        return ", ".join([rounds, *(f"{1 / seconds:.2g} {unit}" for seconds, unit in rates if seconds), self.about()])

    def about(self) -> str:
        """When and under what load, for people."""
        age = max(0.0, time.time() - self.at) / 3600
        when = f"{age * 60:.0f} min" if age < 1 else f"{age:.0f} h" if age < 48 else f"{age / 24:.0f} days"
        return f"measured {when} ago at a load of {self.load:.1f} a core"

    @classmethod
    def checked(cls, found: Any) -> Self:
        """From JSON; ValueError unless it has these numbers, none of them negative."""
        named = _named(cls, found)
        parts = {name: Speeds(**_numbers(_named(Speeds, named.pop(name)))) for name in ("walked", "taped", "cold")}
        numbers = _numbers(named)
        return cls(**parts, table_s=numbers["table_s"], load=numbers["load"], at=numbers["at"])


def _named(of: type[Speeds | Pace], found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or sorted(found) != sorted(field.name for field in fields(of)):
        raise ValueError("other fields")
    return dict(found)


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    if not all(isinstance(each, int | float) and not isinstance(each, bool) and 0 <= each < math.inf for each in found.values()):
        raise ValueError("no lengths of time")
    return {name: float(each) for name, each in found.items()}


def link_of(text: str) -> Link | None:
    """None for `loopback`, else what `--link` means, and `4g`, a telephone's 50 ms and 30 Mbit/s; ConfigError."""
    from privinf.transport.shaper import parse_link

    name = text.strip().lower()
    found = NAMED.get(name, text)
    try:
        return parse_link(found) if found is not None else None
    except ConfigError as error:
        raise ConfigError(str(error).partition(";")[0], remedy="give loopback, lan, wan, 4g or RTTms:MBITS, for example 20ms:100") from None


def on_link(total: Mapping[str, int], link: Link | None) -> float:
    """Seconds that a link adds."""
    if link is None:
        return 0.0
    return total["rounds"] * link.rtt_ms / 2e3 + (total["online_bytes"] / 2 + total["peer_offline_bytes"]) / link.bytes_per_s


def machine(device: str, kernels: str) -> dict[str, Any]:
    """What a measurement holds for: processor and host, version, device, compiled loops or not. No secret, and not sent anywhere."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:  # no Linux
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = {"host": platform.node(), "processor": model, "cores": cores, "python": platform.python_version()}
    return {"form": FORM, **known, "version": VERSION, "protocol": PROTOCOL, "device": device, "kernels": kernels.partition(":")[0]}


def place(cache: Path, device: str) -> Path:
    """Where the measurement of this device is kept."""
    return cache / "pace" / f"{device}.json"


def kept(cache: Path, device: str, kernels: str) -> Pace | None:
    """The kept measurement of this machine as it is; None where there is none, it is of another machine or version, or broken."""
    try:
        with place(cache, device).open("rb") as file:
            found = json.loads(file.read(LONGEST))
        return Pace.checked(found["pace"]) if found["machine"] == machine(device, kernels) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def keep(cache: Path, device: str, kernels: str, pace: Pace) -> None:
    """Keeps it; ConfigError where the disk does not take it."""
    path = place(cache, device)
    with refusals(path):
        write_private(path, json.dumps({"machine": machine(device, kernels), "pace": asdict(pace)}, indent=1).encode())


def seconds(
    lowered: Lowered,
    pace: Pace,
    link: Link | None,
    seq: int = 1,
    *,
    logits: bool = False,
    scores: bool = False,
    chunk: int = 0,
    cached: int = 0,
    batch: int = 1,
) -> dict[str, float | None]:
    """{`prompt_s`, `first_prompt_s`, `token_s`}: from the question to the first token, set-up aside, and from that to the next one.

    The first prompt of a client's and a server's process takes longer than the later ones. With a dealer and one-hots, see `explain`;
    `token_s` is None where no token follows: the context is full, or the model is no language model. ConfigError as `explain`.
    """
    total = explain(lowered, seq, logits=logits, scores=scores, chunk=chunk, cached=cached, batch=batch)["total"]
    prompt_s = pace.walked.of(total, -(-seq // chunk) if chunk else 1) + on_link(total, link)
    first_s = prompt_s + pace.cold.of(total) + pace.table_s * entries(lowered)
    token_s = None
    if lowered.info.is_language_model and cached + seq < lowered.info.n_positions:
        further = explain(lowered, 1, logits=logits, cached=cached + seq, batch=batch)["total"]
        tapes = all(node.taped for node in lowered.graph.nodes if node.state)
        token_s = pace.token(further, batch, tapes=tapes) + on_link(further, link)
    return {"prompt_s": prompt_s, "first_prompt_s": first_s, "token_s": token_s}


def entries(lowered: Lowered) -> int:
    """Of the tables of exponentials that the attention of a process's first prompt computes, one for every kind of row."""
    plans = [node.plan for node in lowered.graph.nodes if isinstance(node, CausalAttention)]
    windows = {BELOW_MAXIMUM if plan.within is None else plan.within.window for plan in plans}
    return sum(len(window.digits) << window.places for window in windows)


def in_words(found: Mapping[str, float | None]) -> str:
    """What `seconds` says, for people."""
    further = f", a further token {found['token_s']:.2g} s" if found["token_s"] is not None else ""
    return f"prompt {found['prompt_s']:.2g} s, a process's first {found['first_prompt_s']:.2g} s{further}"
