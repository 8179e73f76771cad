"""The tables of docs/softmax-only.md and docs/architectures.md, from the files of results in the directory of the page's name.

What stands between two markers is written here, not by hand.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.output import size, table
from benchmarks.training import compared
from privinf.training.removal import RULES

MARKED = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, data: Path) -> str:
    """The page with each table written anew; a table whose file is not there says so."""

    def fill(match: re.Match[str]) -> str:
        make, file = TABLES[match["name"]]
        path = data / file
        body = make(json.loads(path.read_text("utf-8"))) if path.is_file() else f"(no {file} yet)\n"
        return f"{match[1]}\n{body}\n{match[3]}"

    return MARKED.sub(fill, text)


def _ladder(found: dict[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        runs = row["runs"]
        stopped = [run for run in runs if run["diverged"]]
        if "perplexity" in row:
            value = f"{row['perplexity']:.2f}" + (f" ± {row['spread']:.2f}" if row["spread"] is not None else "")
            value += f" ({len(stopped)} of {len(runs)} diverged)" if stopped else ""
        else:
            value = f"diverged, {len(runs)} of {len(runs)}"
        aero = "NaN" if row["diverges_at_aero"] else "" if row["aero"] is None else f"{row['aero']:.2f}"
        bands = [
            f"{100 * sum(run[key] for run in runs if key in run) / max(1, len(runs) - len(stopped)):.0f} %"
            for key in ("overload", "collapse")
        ]
        rows.append([f"`{row['name']}`", value, str(len(runs)), aero, *bands])
    return table(["network", "perplexity", "seeds", "AERO's", "overload", "collapse"], rows)


def _float(found: dict[str, Any], which: str) -> str:
    rows = []
    for name, row in found["sizes"].get(which, {"rows": {}})["rows"].items():
        speeds = []
        for what in ("eager_prompt", "compiled_prompt", "eager_token", "compiled_token"):
            speeds.append(f"{row[what]['tokens_per_s']:,.0f} ({row[what]['times_baseline']:.2f})" if what in row else "")
        memory = [size(row["weights_bytes"]), size(row["peak_bytes_above_libraries"])]
        rows.append([f"`{name}`", f"{row['macs'] / 1e9:.2f} G", f"{row['macs_without_head'] / 1e9:.2f} G", *memory, *speeds])
    head = [
        "network",
        "multiply-adds",
        "without the head",
        "weights",
        "peak memory",
        "prompt, tokens/s",
        "compiled",
        "one token, tokens/s",
        "compiled",
    ]
    return table(head, rows)


def _speed(found: dict[str, Any]) -> str:
    return table(
        ["case", "network", "ours, s a step", "plain loop, s a step", "speed of ours, part of the plain loop's"],
        [
            [
                case["case"],
                f"`{case['variant']}`",
                f"{case['ours_s']:.3f}",
                f"{case['plain_s']:.3f}",
                f"{case['ratio']:.2f}",
            ]
            for case in found["cases"]
        ],
    )


def _removal(found: dict[str, Any]) -> str:
    rows = []
    for entry in found["removals"]:
        for name, label in RULES.items():
            if name not in entry:
                continue
            rule = entry[name]
            after = f"{math.exp(rule['trained_held_out_loss']):.2f} ({entry['trained_steps']})" if "trained_held_out_loss" in rule else ""
            layers = ", ".join(map(str, rule["layers"]))
            before = [f"{math.exp(rule['loss']):.2f}", f"{math.exp(rule['held_out_loss']):.2f}"]
            rows.append([f"{entry['model']}, {entry['remove']} of {entry['ffns']}", label, layers, *before, after])
    return table(["model, FFNs removed", "rule", "layers", "training text", "held out", "held out after training (steps)"], rows)


def _ffn(found: dict[str, Any]) -> str:
    """Each layer of each model that was traced: what its FFN and its attention give back, with standard errors over prompts."""
    rows = []
    for model in found["layers"]:
        for row in model["ffn"]["ablation"]:
            layer, effects = row["layer"], model["effects"]
            cells = [effects[name][kind][layer] for name in ("probability", "entropy") for kind in ("FFN", "attention")]
            told = ["{:+.3f} ± {:.3f}".format(*cell) for cell in cells]
            rows.append([f"`{model['model']}`, {layer}", f"{row['increase']:+.3f}", *told])
    effects = [f"effect on the {name}: {kind}" for name in ("next token", "entropy") for kind in ("FFN", "attention")]
    return table(["model, layer", "nats added without its FFN", *effects], rows)


TABLES: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "ladder": (_ladder, "ladder.json"),
    "float_shipped": (lambda found: _float(found, "shipped"), "float.json"),
    "float_gpt2": (lambda found: _float(found, "gpt2"), "float.json"),
    "speed": (_speed, "speed.json"),
    "removal": (_removal, "removal.json"),
    "ffn": (_ffn, "removal.json"),
    "quality": (compared.quality, "architectures.json"),
    "cost": (compared.cost, "architectures.json"),
    "alone": (compared.alone, "architectures.json"),
    "times": (compared.times, "architectures.json"),
}
