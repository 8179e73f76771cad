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
    """Writes `target` and, of the first model, analysis.json and the pictures beside it. What `out` has already is not made again."""
    document: dict[str, Any] = {"trained_steps": steps, "versions": versions(), "removals": [], "layers": []}
    for model in models:
        for count in counts:
            directory, trained = out / f"{model.name}-{count}", count == TRAINED
            whole = trained and model == models[0]
            found = _analysed(model, directory, count, steps if trained else 0, PROMPTS if trained else 0)
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


def _analysed(model: Path, directory: Path, count: int, steps: int, prompts: int) -> dict[str, Any]:
    """By `privinf analyze` into this directory, unless the same was."""
    path = directory / "analysis.json"
    if not path.is_file() or json.loads(path.read_text("utf-8"))["removal"]["trained_steps"] != steps:
        options = ["--remove", str(count), "--train-steps", str(steps), "--prompts", str(prompts), "--threads", "1"]
        subprocess.run([sys.executable, "-m", "privinf", "analyze", str(model), "-o", str(directory), *options], check=True)
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found
