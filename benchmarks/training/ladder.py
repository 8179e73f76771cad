"""Trains every row of the ladder with the same steps, data and rate, over several seeds, and gathers what came of it."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine, versions
from benchmarks.spread import spread
from benchmarks.training.rows import ROWS, SMALL, Row
from privinf.models.checkpoint import load_tokenizer, write_atomically
from privinf.training import corpus
from privinf.training.corpus import Tokens
from privinf.training.divergence import Diverged
from privinf.training.metrics import METRICS
from privinf.training.settings import Limits, Settings
from privinf.training.trainer import Trainer
from protocols.errors import ConfigError

BASE: dict[str, Any] = {"batch": 16, "length": 128, "learning_rate": 3e-3, "warmup_steps": 50}
RESULT = "result.json"
WINDOWS = 800  # of the held-out text, spread evenly: the same ones for every row


def prepare(out: Path) -> None:
    """The tokenizer and the corpus as ids, once for all rows."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "corpus.json").is_file():
        return
    documents = corpus.read_corpus()
    corpus.save_tokenizer(corpus.train_tokenizer(documents, SMALL["vocab_size"]), out / "tokenizer.json")
    tokens = corpus.encode_corpus(documents, load_tokenizer(out / "tokenizer.json"))
    np.save(out / "training.npy", tokens.training)
    np.save(out / "held_out.npy", tokens.held_out)
    facts = {"held_out_bytes": tokens.held_out_bytes, "sha256": corpus.fingerprint(documents), "files": len(documents)}
    write_atomically(out / "corpus.json", json.dumps(facts).encode())


def read_tokens(out: Path) -> tuple[Tokens, dict[str, Any]]:
    """What `prepare` left; ConfigError where it is not on this machine."""
    if not (out / "corpus.json").is_file():
        raise ConfigError(f"{out} has no corpus on this machine", remedy="give --out a directory that all nodes share")
    facts = json.loads((out / "corpus.json").read_text())
    training, held_out = (np.load(out / name, mmap_mode="r") for name in ("training.npy", "held_out.npy"))
    return Tokens(training, held_out, facts["held_out_bytes"]), facts


def train_row(out: Path, row: Row, seed: int, steps: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """One run; a finished one is not repeated, and one that was interrupted goes on."""
    import torch

    torch.set_num_threads(1)
    directory = out / row.slug / f"seed-{seed}"
    if (directory / RESULT).is_file():
        found: dict[str, Any] = json.loads((directory / RESULT).read_text())
        return found
    tokens, facts = read_tokens(out)
    extra = dict(row.settings)
    if "limits" in extra:
        extra["limits"] = Limits(**extra["limits"])
    settings = Settings.checked(**(BASE | extra | {"seed": seed}))
    trainer = Trainer(row.config(sizes), settings, tokens, directory, facts["sha256"])
    trainer.resume()
    result: dict[str, Any] = {"seed": seed, "diverged": None}
    started = time.process_time()
    try:
        result |= trainer.run(
            steps, None, save_every_s=60.0, validate_every_s=1e9, entropy_every=max(1, steps // 20), final_windows=WINDOWS
        )
    except Diverged as error:
        result["diverged"] = str(error)
    else:
        trainer.export(directory / "checkpoint")
        rows = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
        for last in [row for row in rows if "entropy" in row][-1:]:  # a network without attention has none
            result |= {"overload": last["overload"], "collapse": last["collapse"]}
        result["training_loss"] = statistics.fmean([row["loss"] for row in rows if "loss" in row][-5:])
    result |= {"steps": trainer.step, "cpu_seconds": round(time.process_time() - started, 1)}
    write_atomically(directory / RESULT, (json.dumps(result) + "\n").encode())
    return result


def train_rows(
    out: Path,
    rows: Sequence[Row],
    steps: int,
    seeds: int,
    workers: int,
    only: str | None = None,
    sizes: dict[str, Any] = SMALL,
    **where: Any,
) -> None:
    """All rows, seed by seed, so that what is there when it is interrupted is comparable; `where` is for `benchmarks.spread`."""
    prepare(out)
    tasks = [(row, seed) for seed in range(1, seeds + 1) for row in rows if only is None or only in row.name]
    given = [(out.absolute(), row, seed, row.steps or steps, sizes) for row, seed in tasks]
    for place, result in spread(train_row, given, workers=workers, **where):
        row, seed = tasks[place]
        text = result["diverged"] or f"perplexity {result['held_out_perplexity']:.3f}"
        print(f"{time.strftime('%H:%M:%S')} {row.name}, seed {seed}: {text} ({result['cpu_seconds']:.0f} s)", flush=True)


def trained(out: Path, row: Row) -> dict[str, Any]:
    """What came of a row so far: its runs, and the mean perplexity of those that did not diverge; empty if there is none."""
    runs = [json.loads(path.read_text()) for path in sorted((out / row.slug).glob(f"seed-*/{RESULT}"))]
    perplexities = [math.exp(run["held_out_loss"]) for run in runs if run["diverged"] is None]
    entry: dict[str, Any] = {}
    if perplexities:
        entry["perplexity"] = round(statistics.fmean(perplexities), 4)
        entry["spread"] = round(statistics.stdev(perplexities), 4) if len(perplexities) > 1 else None
    return entry | {"runs": runs} if runs else {}


def gather(out: Path, target: Path, steps: int) -> None:
    """Everything of the ladder that was trained so far, as one document."""
    rows = []
    for row in ROWS:
        if found := trained(out, row):
            told = {"name": row.name, "variant": row.variant, "settings": row.settings, "aero": row.aero}
            rows.append({**told, "diverges_at_aero": row.diverges_at_aero, **found})
    write_document(out, target, steps, SMALL, rows)


def write_document(
    out: Path, target: Path, steps: int, sizes: dict[str, Any], rows: list[dict[str, Any]], more: dict[str, Any] | None = None
) -> None:
    """Rows of results, under what they were trained, and what `more` is known."""
    tokens, facts = read_tokens(out)
    document = {
        "size": sizes,
        "settings": BASE,
        "steps": steps,
        "training_tokens_seen": steps * BASE["batch"] * BASE["length"],
        "corpus": facts | {"training_tokens": len(tokens.training), "held_out_tokens": len(tokens.held_out)},
        "machine": machine(),
        "versions": versions(),
        **(more or {}),
        "rows": rows,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, (json.dumps(document, indent=1) + "\n").encode())
