"""Every protocol with pytest-benchmark: `python -m pytest benchmarks/test_micro.py --benchmark-autosave`, then `--benchmark-compare`.

One round is dealing, the offline walk and the online walk of three roles in one process; bytes and rounds go to `extra_info`.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.micro import Case, cases, run_case


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_protocol(benchmark: Any, case: Case) -> None:
    """A protocol's time, with its bytes and rounds beside it."""
    found = benchmark.pedantic(run_case, args=(case,), rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {
        "elements": case.elements,
        "online_bytes_per_element": found.online_bytes,
        "dealer_bytes_per_element": found.dealer_bytes,
        "rounds": found.rounds,
    }
