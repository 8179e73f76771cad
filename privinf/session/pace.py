"""Seconds from a cost: what a measurement of this machine says of rounds, bytes and multiply-adds, and where it is kept.

A pass takes what its parts take, one after the other. Where it is walked (a prompt's),

    t = round_s (rounds + PASS) + byte_s (online + dealer's bytes) + mac_s macs + weight_s bytes of the weights,

and a further token, which is replayed from a tape, t = taped_round_s rounds + taped_weight_s bytes of the weights. A link adds half a
round trip a round, and the time that the bytes of the busier direction, half of all, take at its rate. The six numbers are measured
by `privinf.local.pace`; this module knows nothing of how.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from privinf.files import refusals, write_private
from privinf.lowering.explain import explain
from privinf.lowering.lowered import Lowered
from privinf.version import PROTOCOL, VERSION
from protocols.errors import ConfigError

if TYPE_CHECKING:  # `explain` without a link has no use for TLS
    from privinf.transport.shaper import Link

FORM = 1  # of what is measured, and of the formulas
PASS = 8  # rounds that a walked pass costs beyond its own
TAPED = 5_000_000  # bytes of a token's pass, online and the dealer's, from which its tape would be too large to be kept, about
LONGEST = 1 << 16  # bytes of a kept measurement
NAMED = {"loopback": None, "lan": "lan", "wan": "wan", "4g": "50ms:30"}


@dataclass(frozen=True)
class Pace:
    """Seconds a unit on this machine, see above; `cold_s` more for a process's first prompt. `load`: of each core while it was measured."""

    round_s: float
    byte_s: float
    mac_s: float
    weight_s: float
    taped_round_s: float
    taped_weight_s: float
    cold_s: float
    load: float
    at: float  # seconds since the epoch

    def walked(self, total: Mapping[str, int], passes: int = 1) -> float:
        """Seconds of computing of so many passes whose costs are these, `explain`'s `total`."""
        moved = self.byte_s * (total["online_bytes"] + total["dealer_bytes"])
        return (
            self.round_s * (total["rounds"] + PASS * passes)
            + moved
            + self.mac_s * total["macs"]
            + self.weight_s * total["setup_bytes"] * passes
        )

    def token(self, total: Mapping[str, int], batch: int = 1) -> float:
        """Seconds of computing of one more token of each sequence, by a tape where that fits."""
        if total["online_bytes"] + total["dealer_bytes"] > TAPED * batch:
            return self.walked(total)
        return self.taped_round_s * total["rounds"] + self.taped_weight_s * total["setup_bytes"]

    def speeds(self) -> str:
        """The numbers, for people."""
        rounds = f"a round {self.round_s * 1e3:.2g} ms, replayed {self.taped_round_s * 1e3:.2g} ms"
        rates = ((self.byte_s, "B/s moved"), (self.mac_s, "multiply-adds/s"))
        return ", ".join([rounds, *(f"{1 / seconds:.2g} {unit}" for seconds, unit in rates if seconds), self.about()])

    def about(self) -> str:
        """When and under what load, for people."""
        age = max(0.0, time.time() - self.at) / 3600
        when = f"{age * 60:.0f} min" if age < 1 else f"{age:.0f} h" if age < 48 else f"{age / 24:.0f} days"
        return f"measured {when} ago at a load of {self.load:.1f} a core"

    @classmethod
    def checked(cls, found: Any) -> Self:
        """From JSON; ValueError unless it has these numbers, none of them negative."""
        names = [field.name for field in fields(cls)]
        if not isinstance(found, dict) or sorted(found) != sorted(names):
            raise ValueError("other fields")
        if not all(isinstance(each, int | float) and not isinstance(each, bool) and 0 <= each < math.inf for each in found.values()):
            raise ValueError("no lengths of time")
        return cls(**{name: float(found[name]) for name in names})


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
    return total["rounds"] * link.rtt_ms / 2e3 + total["online_bytes"] / 2 / link.bytes_per_s


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
    prompt_s = pace.walked(total, -(-seq // chunk) if chunk else 1) + on_link(total, link)
    token_s = None
    if lowered.info.is_language_model and cached + seq < lowered.info.n_positions:
        further = explain(lowered, 1, logits=logits, cached=cached + seq, batch=batch)["total"]
        token_s = pace.token(further, batch) + on_link(further, link)
    return {"prompt_s": prompt_s, "first_prompt_s": prompt_s + pace.cold_s, "token_s": token_s}


def in_words(found: Mapping[str, float | None]) -> str:
    """What `seconds` says, for people."""
    further = f", a further token {found['token_s']:.2g} s" if found["token_s"] is not None else ""
    return f"prompt {found['prompt_s']:.2g} s, a process's first {found['first_prompt_s']:.2g} s{further}"
