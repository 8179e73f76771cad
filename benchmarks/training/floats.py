"""Ordinary inference with the networks of the ladder: tokens a second, memory and multiply-adds, in float32 on one thread."""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import machine, versions
from benchmarks.training.rows import GPT2, SHIPPED, STRUCTURES, config_of
from privinf.models.aero import AeroModel
from privinf.models.checkpoint import write_atomically
from privinf.training.initial import initialise

SIZES = {"shipped": SHIPPED, "gpt2": GPT2}
SEQ = 128
COMPILED = ("SM+LN+G", "SM+ScFuFFN")  # compiling takes half a minute each at GPT-2 size


def made(variant: str, size: str) -> AeroModel:
    """Folded, as it would be used; `train()` only chooses the fused attention kernel, for there is no dropout."""
    model = AeroModel(config_of(variant, SIZES[size]))
    with torch.no_grad():
        initialise(model, 1)
    return model.folded().requires_grad_(False).train()


def _static(variant: str, size: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = made(variant, size)
    ids = torch.zeros(1, SEQ, dtype=torch.long)
    with torch.no_grad():
        model(ids)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(ids)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = model.lm_head.weight.numel()
    macs = counter.get_total_flops() // 2
    return {
        "parameters": parameters,
        "weights_bytes": 4 * parameters,
        "peak_bytes_above_libraries": peak,
        "macs": macs,
        "macs_without_head": macs - SEQ * head,
    }


def _in_process(variant: str, size: str) -> dict[str, Any]:
    """In a process of its own, for the peak of memory is a process's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return dict(pool.apply(_static, (variant, size)))


def measure(target: Path, sizes: list[str], samples: int, compiled: bool) -> None:
    """All rows side by side, sample by sample, so that a busy moment of the machine falls on all of them."""
    torch.set_num_threads(1)
    document: dict[str, Any] = {"seq": SEQ, "threads": 1, "machine": machine(), "versions": versions(), "sizes": {}}
    for size in sizes:
        names = [name.format(half=SIZES[size]["n_layer"] // 2) for name in STRUCTURES]
        rows = {name: _in_process(name, size) for name in names}
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        for name in names:
            model = made(name, size)
            many = torch.arange(SEQ)[None] % model.config.vocab_size
            forms = {"eager": model} | ({"compiled": torch.compile(model)} if compiled and name in COMPILED else {})
            for form, function in forms.items():
                for what, ids in (("prompt", many), ("token", many[:, :1])):
                    calls[name, f"{form}_{what}"] = _call(function, ids)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        with torch.no_grad():
            for call in calls.values():
                call()
                call()
            for _ in range(samples):
                for key, call in calls.items():
                    repeats = 1 if key[1].endswith("prompt") else 8
                    started = time.perf_counter()
                    for _ in range(repeats):
                        call()
                    seconds[key].append((time.perf_counter() - started) / repeats)
        for (name, what), values in seconds.items():
            tokens = SEQ if what.endswith("prompt") else 1
            rows[name][what] = {"tokens_per_s": round(tokens / statistics.median(values), 1), "seconds": [round(v, 6) for v in values]}
            base = seconds[names[0], f"eager_{what.split('_')[1]}"]
            rows[name][what]["times_baseline"] = round(statistics.median(b / v for b, v in zip(base, values, strict=True)), 3)
        document["sizes"][size] = {"sizes": SIZES[size], "rows": rows}
        write_atomically(target, (json.dumps(document, indent=1) + "\n").encode())
        torch._dynamo.reset()
        print(size, json.dumps(rows, indent=None), flush=True)


def _call(function: Any, ids: torch.Tensor) -> Callable[[], Any]:
    return lambda: function(ids)
