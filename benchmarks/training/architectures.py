"""Networks of all families, trained alike, and what each costs in private: what docs/architectures.md shows."""

from __future__ import annotations

import copy
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.backends.plain import one_thread
from benchmarks.machine import machine
from benchmarks.training.ladder import trained, write_document
from benchmarks.training.rows import Row
from privinf.local.pace import pace_of
from privinf.local.session import LocalSession
from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.lowering.lowered import Lowered
from privinf.models.base import Config, Decoder, families
from privinf.models.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from privinf.session.options import Options, default_cache
from privinf.trust import DEALER, TWO_PARTY
from protocols import kernels
from protocols.errors import PrivinfError

POSITIONS = 144  # while training: no other size of these networks, so that what hangs on it is told by it
SIZES: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1024, "n_positions": POSITIONS}
LONG = 1024  # positions at which a network's costs are asked: as many as a Llama's are planned for
PROMPT, FURTHER, TOKENS, ASKED = 128, (128, LONG - 1), 4, 2
PIECES = {"maxplus": 32}  # positions of a prompt at a time, where all at once take gigabytes
WIDER = {"n_embd": 184}  # as many parameters as GPT-2's, where an FFN is one matrix
DEEPER = {"n_layer": 7}  # the same, where a layer has half as many
SHORT, LONGER = 100, 1200  # steps: of what takes many times as long to train, and where it is asked what more tokens change
ROWS = (
    Row("GPT-2: `SM+LN+G`", "SM+LN+G"),
    Row("AERO: `SM+ScFFN`", "SM+ScFFN"),
    Row("AERO: `SM(t)+ScFuFFN`", "SM(t)+ScFuFFN"),
    Row("AERO: `SM(t)+ScFuFFN`, wider", "SM(t)+ScFuFFN", sizes=WIDER),
    Row("AERO: `SM(t)+ScFuFFN_i2`", "SM(t)+ScFuFFN_i2"),
    Row("Llama: `SM+RN+SwiGLU`", "SM+RN+SwiGLU", family="llama"),
    Row("Llama: `SM+RN+GLU`", "SM+RN+GLU", family="llama"),
    Row("Llama, softmax only: `SM+ScGLU`", "SM+ScGLU", family="llama"),
    Row("Llama, softmax only: `SM+ScFuFFN`", "SM+ScFuFFN", family="llama"),
    Row("Llama, softmax only: `SM+ScFuFFN`, wider", "SM+ScFuFFN", family="llama", sizes=WIDER),
    Row("Recursive: `SM+FuFFN`, 2 blocks 3 times", "SM+FuFFN", family="recursive", sizes={"n_layer": 6}),
    Row("Recursive: the same, rank 8, wider", "SM+FuFFN", family="recursive", sizes={"n_layer": 6, "rank": 8, "n_embd": 224}),
    Row("ReLU: `RA+LN+R`", "RA+LN+R", family="relu"),
    Row("ReLU: `RA+ScFuFFN`", "RA+ScFuFFN", family="relu"),
    Row("ReLU: `RA+ScFuFFN`, wider", "RA+ScFuFFN", family="relu", sizes=WIDER),
    Row("Mamba-2: `M2(sp)+Conv+RN+SiLU`", "M2(sp)+Conv+RN+SiLU", family="mamba2", sizes=DEEPER),
    Row("Mamba-2: `M2(relu)+RN+GLU`", "M2(relu)+RN+GLU", family="mamba2", sizes=DEEPER),
    Row("Mamba-2: `M2(relu)`", "M2(relu)", family="mamba2", sizes=DEEPER),
    Row("Mamba-2: `M2(fix)`", "M2(fix)", family="mamba2", sizes=DEEPER),
    Row("TTT: `TTT+RN+SwiGLU`", "TTT+RN+SwiGLU", family="ttt"),
    Row("TTT: `TTT+RN`", "TTT+RN", family="ttt"),
    Row("TTT: `TTT`", "TTT", family="ttt"),
    Row("GPT-2: `SM+LN+G`, 100 steps", "SM+LN+G", steps=SHORT),
    Row("AERO: `SM(t)+ScFuFFN`, 100 steps", "SM(t)+ScFuFFN", steps=SHORT),
    Row("Max-plus: `SM+ScMP`, 100 steps", "SM+ScMP", family="maxplus", steps=SHORT),
    Row("Max-plus: `MP+ScFuFFN`, 100 steps", "MP+ScFuFFN", family="maxplus", steps=SHORT),
    Row("Llama: `SM+RN+SwiGLU`, 1200 steps", "SM+RN+SwiGLU", family="llama", steps=LONGER),
    Row("Llama, softmax only: `SM+ScFuFFN`, wider, 1200 steps", "SM+ScFuFFN", family="llama", sizes=WIDER, steps=LONGER),
)


def stretched(model: Decoder, config: Config, positions: int) -> tuple[Decoder, Config]:
    """The same network for longer texts: what is learned for each position is repeated. Its costs are what is asked of it."""
    longer = config.model_copy(update={"n_positions": positions})
    new = families()[config.model_type]().build(longer)
    state = copy.copy(model.state_dict())
    for name, tensor in state.items():
        for axis, length in enumerate(tensor.shape):
            if length == config.n_positions:
                tensor = torch.cat([tensor] * -(-positions // length), dim=axis).narrow(axis, 0, positions)
        state[name] = tensor
    new.load_state_dict(state)
    return new.eval(), longer


def costs(lowered: Lowered) -> dict[str, Any]:
    """By `explain`: of a prompt, and of one more token after it and after many."""
    found: dict[str, Any] = {}
    for trust in (DEALER, TWO_PARTY):
        made = {"prompt": explain(lowered, PROMPT, trust=trust)["total"]}
        for cached in FURTHER:
            made[f"token at {cached}"] = explain(lowered, 1, cached=cached, trust=trust)["total"]
        found[trust] = made
    return found


def seconds(lowered: Lowered, chunk: int = 0) -> dict[str, float]:
    """Of a prompt, by passes of `chunk`, with its one token, and of a further token, medians of a session's; the dealer's part is in it."""
    kernels.load(default_cache() / "kernels")
    steps: list[list[float]] = []
    with tempfile.TemporaryDirectory() as cache:
        if (default_cache() / "kernels").is_dir():
            shutil.copytree(default_cache() / "kernels", Path(cache) / "kernels")
        with LocalSession(lowered, Options(cache=Path(cache), chunk=chunk)) as session:
            for _ in range(1 + ASKED):
                times = [time.perf_counter()]
                for _ in session.generate(ids=list(range(1, PROMPT + 1)), max_new_tokens=1 + TOKENS, ignore_eos=True):
                    times.append(time.perf_counter())
                steps.append([later - earlier for earlier, later in pairwise(times)])
    again = steps[1:]  # the first has set-up in it, and writes tapes
    return {"prompt": statistics.median(each[0] for each in again), "token": statistics.median(step for each in again for step in each[1:])}


def float_speed(model: Decoder, first: Decoder) -> dict[str, float]:
    """Tokens a second of a prompt in float32 on one thread, and as a multiple of the `first` row's.

    Both in turn, by the thread's own time: what else runs here is not in it.
    """
    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    took: list[list[float]] = [[], []]
    with torch.no_grad(), one_thread():
        for _ in range(65):
            for which, each in enumerate((first, model)):
                started = time.thread_time()
                each(ids)
                took[which].append(time.thread_time() - started)
    theirs, mine = (statistics.median(each[1:]) for each in took)
    return {"float_tokens_per_s": PROMPT / mine, "float_times_first": theirs / mine}


@contextmanager
def long(checkpoint: Path) -> Iterator[Lowered]:
    """A trained network as it is asked: stretched, and converted."""
    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint(*stretched(*load_checkpoint(checkpoint)[:2], LONG), directory, torch.float32)
        yield convert(directory)


def private(checkpoint: Path, first: Path) -> dict[str, Any]:
    """What a trained network costs; what cannot be run in private says why instead. `first` row's beside."""
    model = load_checkpoint(checkpoint)[0]
    parameters = sum(each.numel() for each in model.parameters())
    found: dict[str, Any] = {"parameters": parameters, **float_speed(model.folded(), load_checkpoint(first)[0].folded())}
    try:
        with long(checkpoint) as lowered:
            return found | {"costs": costs(lowered)}
    except PrivinfError as error:
        return found | {"refused": str(error)}


def gather(out: Path, target: Path, steps: int) -> None:
    """Everything that was trained so far with its costs, as one document."""
    rows: list[dict[str, Any]] = []
    first: Path | None = None
    for row in ROWS:
        found = trained(out, row)
        if found:
            about = {"name": row.name, "family": row.family, "variant": row.variant, "sizes": row.sizes}
            rows.append(about | {"settings": row.settings, "steps": row.steps or steps, **found})
            if checkpoint := _priced(out, row, found):
                first = first or checkpoint
                rows[-1] |= private(checkpoint, first)
            print(row.name, {name: value for name, value in rows[-1].items() if name not in ("runs", "costs")}, flush=True)
    write_document(out, target, steps, SIZES, rows, {"pace": asdict(pace_of(default_cache()))})


def _priced(out: Path, row: Row, found: dict[str, Any]) -> Path | None:
    """The checkpoint that is asked for a row's costs: of its first run that did not diverge."""
    good = [run["seed"] for run in found["runs"] if run["diverged"] is None]
    return out / row.slug / f"seed-{good[0]}" / "checkpoint" if good else None


def time_rows(out: Path, target: Path) -> None:
    """Adds to a document of `gather` the seconds of a session of each network, and this machine's pace; written after each.

    A network that stands there with another number of steps too is timed once.
    """
    document = json.loads(target.read_text("utf-8"))
    document |= {"pace": asdict(pace_of(default_cache(), anew=True)), "machine": machine()}
    rows = {row.name: row for row in ROWS}
    usual = {(entry["variant"], str(entry["sizes"])) for entry in document["rows"] if entry["steps"] == document["steps"]}
    for entry in document["rows"]:
        again = entry["steps"] != document["steps"] and (entry["variant"], str(entry["sizes"])) in usual
        checkpoint = _priced(out, rows[entry["name"]], entry) if "costs" in entry and not again else None
        if checkpoint is not None:
            with long(checkpoint) as lowered:
                entry["seconds"] = seconds(lowered, PIECES.get(entry["family"], 0))
            print(time.strftime("%H:%M:%S"), entry["name"], entry["seconds"], flush=True)
            write_atomically(target, (json.dumps(document, indent=1) + "\n").encode())
