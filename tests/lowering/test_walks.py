"""Walks on shapes: torch's own functions of shapes, whose first use loads a compiler and a computer algebra system, are not called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from privinf.lowering import convert
from privinf.models.checkpoint import save_checkpoint
from privinf.training.families import USUAL, built, first_weights, variant_config
from tests.support import trio as t
from tests.support.ladder import make

WALKED = """
import sys
from privinf.lowering.explain import explain
from privinf.lowering.lowered import Lowered
from privinf.trust import TRUSTS

for place in sys.argv[1:]:
    lowered = Lowered.load(place)
    several = all(node.batches or node.rowwise for node in lowered.graph.nodes)
    scored, token = {"seq": 7, "logits": True, "scores": True}, {"seq": 1, "cached": 9}
    for more in ({"seq": 7}, {"seq": 40}, scored, token, {**token, "batch": 3}):
        fits = (several or "batch" not in more) and more["seq"] <= lowered.info.n_positions
        for trust in TRUSTS if fits else ():
            explain(lowered, trust=trust, **more)
            found = sorted({"sympy", "torch._dynamo"} & set(sys.modules))
            assert not found, (trust, found)
"""


def test_torch_loads_nothing_for_a_walk_on_shapes(tmp_path: Path) -> None:
    """Seventy megabytes and more than half a second of every process that computes a pass."""
    made = [make(tmp_path / "of-norms", "SM+LN+G")[0]]
    for family in ("mamba2", "ttt"):  # of several blocks
        config = variant_config(family, USUAL[family], n_layer=1, n_head=2, n_embd=16, vocab_size=31, n_positions=48)
        model = built(config)
        first_weights(model, 3)
        save_checkpoint(model, config, tmp_path / family)
        made.append(convert(tmp_path / family))
    places = [t.lowered_directory()]
    for lowered in made:
        places.append(tmp_path / lowered.id)
        lowered.save(places[-1])
    done = subprocess.run([sys.executable, "-c", WALKED, *map(str, places)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
