"""Figures that others published, as published, and where. Bytes in GB of 10^9 unless a unit is given."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Aero:
    """A line of AERO's table (arXiv 2410.13060v2): GPT-2, L = 12, T = 128, two parties without a dealer, 32 threads each."""

    network: str
    perplexity: float
    gigabytes: float
    minutes: float


AERO = (
    Aero("SM+LN+G", 2.69, 25.32, 8.21),
    Aero("SM+LN+R", 2.76, 9.44, 6.06),
    Aero("SM+ScFFN", 3.50, 6.95, 5.68),
    Aero("SM+ScFuFFN", 3.48, 6.43, 4.76),
    Aero("SM+ScFuFFN_i6", 3.54, 6.29, 4.23),
)
AERO_BEST = {"communication": 4.23, "latency": 1.94}
"""The paper's best ratios, SM+LN+G to the smallest network; the latency's of the table above, the communication's of its L = 18."""


@dataclass(frozen=True)
class System:
    """One pass at GPT-2 size, 128 tokens: `kind` is the network of the ladder that it is to be compared with."""

    name: str
    kind: str
    gigabytes: float  # online, or all where a system has no offline phase
    rounds: int | None
    trust: str
    source: str


BASELINE, SMALLEST = "SM+LN+G", "SM+ScFuFFN_i6"
SYSTEMS = (
    System("AERO", BASELINE, 25.32, None, "no dealer", "published, on BumbleBee"),
    System("SHAFT", BASELINE, 11.27, 1500, "dealer", "published"),
    System("CrypTen, by SHAFT", BASELINE, 8.34, None, "dealer", "published"),
    System("SIGMA", BASELINE, 0.82 * 1.073741824, 1128, "dealer", "published"),
    System("AERO", SMALLEST, 6.29, None, "no dealer", "published, on BumbleBee"),
    System("SPU CHEETAH", SMALLEST, 4.65, None, "no dealer", "SPU 0.9.5, measured once, before this harness"),
    System("SPU SEMI2K", SMALLEST, 3.37, None, "party 0 can read everything", "SPU 0.9.5, measured once, before this harness"),
)
