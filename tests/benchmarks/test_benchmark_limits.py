"""Bytes and rounds of small networks and of single protocols: exact, and none may grow unnoticed. What has shrunk may be entered here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.micro import Case, cases
from benchmarks.networks import made
from privinf.lowering.explain import explain
from protocols.correlations import Role
from tests.support.two_party import Session

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 64, "n_positions": 32}
SEQ = 16
# online bytes, rounds, the dealer's bytes, with which argmax and maxima buy rounds; `explain` is what is counted, see test_benchmarks
NETWORKS = {
    "SM+LN+G": (81204, 104, 269246),
    "SM+LN+R": (51148, 100, 201382),
    "SM+ScFuFFN_i1": (30712, 24, 128492),
    "SM(t)+ScFuFFN": (31260, 24, 132022),
}
# an element: online bytes, the dealer's bytes; rounds
PROTOCOLS = {
    "linear 128 x 256 x 256, per input": (5.0, 5.0, 0),
    "look-up of 128 rows of 3072 x 256, per row": (9216.0, 768.0, 0),
    "truncate-reduce, 44 to 30 bits": (0.0, 0.0, 0),
    "exact truncation, 44 to 44 bits": (0.25, 1.75, 1),
    "comparison, 21 bits, opening included": (7.0, 17.88, 3),
    "maximum of causal rows, 10 bits, opening included": (4.59, 66.13, 8),
    "argmax of 3072, opening included": (13.25, 407.14, 12),
    "exponentials of causal rows (4, 128, 128)": (17.09, 81.38, 10),
    "softmax, causal (4, 128, 128), scores of deviation 2": (28.49, 93.14, 14),
    "softmax, causal (4, 128, 128), scores of deviation 10": (28.49, 93.14, 14),
    "ReLU, opening included": (7.0, 23.38, 4),
    "GELU, opening included": (36.0, 91.25, 6),
    "LayerNorm of 128 x 256, opening included": (12.98, 13.51, 12),
}


@pytest.mark.parametrize("variant", NETWORKS)
def test_no_network_costs_more(variant: str, tmp_path: Path) -> None:
    total = explain(made(variant, tmp_path, **SIZES).lowered, SEQ)["total"]
    found = (total["online_bytes"], total["rounds"], total["dealer_bytes"])
    assert all(now <= limit for now, limit in zip(found, NETWORKS[variant], strict=True)), found


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_no_protocol_costs_more(case: Case) -> None:
    trace = Session(case.weights).trace(Role.CLIENT, lambda party: party.run(case.program(party)))
    costs = list(trace.costs.values())
    each = [sum(getattr(c, name) for c in costs) / case.elements for name in ("online_bytes", "dealer_bytes")]
    found = (*(round(cost, 2) for cost in each), sum(c.rounds for c in costs))
    assert all(now <= limit for now, limit in zip(found, PROTOCOLS[case.name], strict=True)), found
