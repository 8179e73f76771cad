"""The speed of our training step beside a plain PyTorch loop on the same model and batches, step by step in turn."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.machine import machine, versions
from benchmarks.training.rows import SHIPPED, SMALL, config_of
from privinf.models.aero import AeroModel
from privinf.models.checkpoint import write_atomically
from privinf.training.corpus import Tokens, batch_at
from privinf.training.initial import initialise
from privinf.training.objective import HELD_EVERY
from privinf.training.settings import Settings
from privinf.training.trainer import Trainer


def measure(target: Path, samples: int, threads: int) -> None:
    """Writes mean seconds a step and ratios of groups of steps; a ratio above 1 says that ours is the faster."""
    samples -= samples % HELD_EVERY
    torch.set_num_threads(threads)
    document: dict[str, Any] = {"threads": threads, "machine": machine(), "versions": versions(), "cases": []}
    for label, sizes, variant, extra in (
        ("shipped size", SHIPPED, "SM(t)+ScFuFFN", {}),
        ("shipped size, Muon", SHIPPED, "SM(t)+ScFuFFN", {"optimizer": "muon"}),
        ("shipped size, entropy regularisation", SHIPPED, "SM(t)+ScFuFFN", {"entropy_lambda": 1e-2}),
        ("small size", SMALL, "SM(t)+ScFuFFN", {}),
        ("small size", SMALL, "SM+LN+G", {}),
    ):
        config = config_of(variant, sizes)
        stream = np.random.default_rng(0).integers(0, config.vocab_size, 1 << 18).astype(np.uint16)
        settings = Settings(length=config.n_positions, **extra)
        with tempfile.TemporaryDirectory() as work:
            trainer = Trainer(config, settings, Tokens(stream, stream[:4096], 8192), Path(work))
            plain = _plain(config, stream, settings)
            ours, theirs = [], []
            for step in range(samples + HELD_EVERY):
                started = time.perf_counter()
                plain(step)
                between = time.perf_counter()
                trainer.train_step(0.1)
                theirs.append(between - started)
                ours.append(time.perf_counter() - between)
        groups = range(HELD_EVERY, samples + HELD_EVERY, HELD_EVERY)  # the first is the warm-up; one step of each has the penalty
        ratios = [sum(theirs[at : at + HELD_EVERY]) / sum(ours[at : at + HELD_EVERY]) for at in groups]
        case = {"case": label, "variant": variant, "ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}
        case |= {"plain_s": round(statistics.fmean(theirs[HELD_EVERY:]), 4), "ours_s": round(statistics.fmean(ours[HELD_EVERY:]), 4)}
        document["cases"].append(case)
        print(case, flush=True)
    write_atomically(target, (json.dumps(document, indent=1) + "\n").encode())


def _plain(config: Any, stream: Any, settings: Settings) -> Any:
    model = AeroModel(config)
    with torch.no_grad():
        initialise(model, settings.seed)
    model.train()
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("h.") and not name.endswith("temperature")]
    orthogonal = {id(p) for p in matrices} if settings.optimizer == "muon" else set()
    rest = [p for p in model.parameters() if id(p) not in orthogonal]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95))]
    if orthogonal:
        optimizers.append(torch.optim.Muon(matrices, lr=1e-3, adjust_lr_fn="match_rms_adamw"))

    def step(number: int) -> None:
        ids = torch.from_numpy(batch_at(stream, number, settings.batch, settings.length, settings.seed))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()

    return step
