"""What each network costs in private: bytes and rounds as `privinf explain` predicts them, seconds as a local session takes."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.rows import GPT2, STRUCTURES, Row, config_of
from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.models.aero import AeroModel, initialise
from privinf.models.checkpoint import save_checkpoint, write_atomically
from privinf.party.local import LocalSession

SEQ = 128


def cost_of(checkpoint: Path, samples: int) -> dict[str, Any]:
    """`samples` 0: nothing is run."""
    lowered = convert(checkpoint)
    cost: dict[str, Any] = {**explain(lowered, SEQ)["total"]}
    if samples:
        ids = [index % lowered.info.vocab for index in range(1, SEQ + 1)]
        seconds = []
        with tempfile.TemporaryDirectory(prefix="privinf-cost-") as work:
            lowered.save(Path(work) / "model")
            with LocalSession(Path(work) / "model") as session:
                for _ in range(samples + 1):
                    for _token in session.generate(ids=ids, max_new_tokens=1, ignore_eos=True):
                        pass
                    assert session.result is not None
                    seconds.append(session.result["timing"]["first_token_s"])
        cost["seconds"] = [round(value, 4) for value in seconds[1:]]  # the first is the warm-up
        cost["median_s"] = round(statistics.median(seconds[1:]), 4)
    return cost


def add_private(target: Path, out: Path, samples: int) -> None:
    """Adds to every row of the ladder the cost of its first seed's checkpoint; rows of one structure cost the same and are run once."""
    document = json.loads(target.read_text())
    known: dict[str, Any] = {}
    for row in document["rows"]:
        checkpoint = out / Row(row["name"], row["variant"]).slug / "seed-1" / "checkpoint"
        if row["variant"] not in known and (checkpoint / "config.json").is_file():
            known[row["variant"]] = cost_of(checkpoint, samples)
            print(row["variant"], known[row["variant"]], flush=True)
        if row["variant"] in known:
            row["private"] = known[row["variant"]]
    write_atomically(target, (json.dumps(document, indent=1) + "\n").encode())


def add_private_gpt2(target: Path) -> None:
    """Adds the predicted cost at GPT-2 size, of random weights, which cost what trained ones do."""
    document = json.loads(target.read_text())
    costs = {}
    for name in STRUCTURES:
        config = config_of(name, GPT2)
        with tempfile.TemporaryDirectory(prefix="privinf-cost-") as work:
            model = AeroModel(config)
            with torch.no_grad():
                initialise(model, 1)
            save_checkpoint(model, config, work)
            del model
            costs[config.variant] = cost_of(Path(work), 0)
        print(config.variant, costs[config.variant], flush=True)
    document["private_gpt2"] = costs
    write_atomically(target, (json.dumps(document, indent=1) + "\n").encode())
