"""Which FFNs to remove, by `privinf analyze`, from each of several models and in several numbers, beside AERO's rule."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import versions
from privinf.models.checkpoint import write_atomically

TRAINED = 2  # so many removed FFNs are followed by a second training, of each choice
PROMPTS = 16  # to trace
PICTURES = ("entropy", "ffn", "tracing_probability", "tracing_entropy")


def measure(target: Path, out: Path, models: Sequence[Path], counts: Sequence[int], steps: int) -> None:
    """Writes `target` and, of the first model, analysis.json and the pictures beside it."""
    document: dict[str, Any] = {"trained_steps": steps, "versions": versions(), "removals": [], "layers": []}
    for model in models:
        for count in counts:
            directory, trained = out / f"{model.name}-{count}", count == TRAINED
            whole = trained and model == models[0]
            options = ["--remove", str(count), "--train-steps", str(steps if trained else 0), "--threads", "1"]
            options += ["--prompts", str(PROMPTS if trained else 0)]
            command = [sys.executable, "-m", "privinf", "analyze", str(model), "-o", str(directory), *options]
            subprocess.run(command, check=True)
            found = json.loads((directory / "analysis.json").read_text("utf-8"))
            facts = {"model": found["model"]["variant"], "ffns": len(found["ffn"]["ablation"])}
            document["removals"].append(facts | found["removal"])
            if trained:
                traced = found["tracing"]
                told = {"entropy": found["entropy"], "ffn": found["ffn"], "prompts": traced["prompts"], "effects": traced["whole"]}
                document["layers"].append({"model": facts["model"], "change": traced["total_entropy_change"]} | told)
            if whole:
                write_atomically(target.with_name("analysis.json"), (json.dumps(found | {"removal": None}, indent=1) + "\n").encode())
                for name in PICTURES:
                    shutil.copyfile(directory / f"{name}.png", target.with_name(f"{name}.png"))
    write_atomically(target, (json.dumps(document, indent=1) + "\n").encode())
