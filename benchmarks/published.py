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

SYSTEMS = (
    # name, what was run, online or total GB, offline GB (None: none or not said), rounds, whom it trusts
    ("AERO on BumbleBee", "SM+ScFuFFN_i6, published", 6.29, None, None, "no dealer"),
    ("AERO on BumbleBee", "SM+LN+G, published", 25.32, None, None, "no dealer"),
    ("SIGMA", "GPT-2, GELU and LayerNorm, published", 0.82 * 1.073741824, 14.29 * 1.073741824, 1128, "dealer"),
    ("SHAFT", "GPT-2, published", 11.27, None, 1500, "dealer"),
    ("CrypTen", "GPT-2, published by SHAFT", 8.34, None, None, "dealer"),
)
BASELINE, SMALLEST = "SM+LN+G", "SM+ScFuFFN_i6"
