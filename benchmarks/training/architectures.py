"""Networks of all families, trained alike, and what each costs in private: what docs/architectures.md shows."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.backends.plain import one_thread
from benchmarks.training.ladder import trained, write_document
from benchmarks.training.rows import Row
from privinf.local.session import LocalSession
from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.lowering.lowered import Lowered
from privinf.models.base import Config, Decoder, families
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.session.options import Options
from privinf.trust import DEALER, TWO_PARTY
from protocols.errors import PrivinfError

POSITIONS = 144  # while training: no other size of these networks, so that what hangs on it is told by it
SIZES: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1024, "n_positions": POSITIONS}
LONG = 1024  # positions at which a network's costs are asked: as many as a Llama's are planned for
PROMPT, FURTHER, TOKENS = 128, (128, LONG - 1), 8
WIDER = {"n_embd": 184}  # as many parameters as GPT-2's, where an FFN is one matrix
DEEPER = {"n_layer": 7}  # the same, where a layer has half as many
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


def seconds(lowered: Lowered) -> dict[str, float]:
    """Of a prompt with its one token, and of a further token, the median of a session's; the dealer's part is included."""
    with tempfile.TemporaryDirectory() as cache, LocalSession(lowered, Options(cache=Path(cache))) as session:
        ids = list(range(1, PROMPT + 1))
        for _ in session.generate(ids=ids, max_new_tokens=2):
            pass  # set-up, and what is compiled
        times = [time.perf_counter()]
        for _ in session.generate(ids=ids, max_new_tokens=1 + TOKENS):
            times.append(time.perf_counter())
    steps = [later - earlier for earlier, later in pairwise(times)]
    return {"prompt": steps[0], "token": statistics.median(steps[1:])}


def float_rate(model: Decoder) -> float:
    """Tokens a second of a prompt in float32 on one thread."""
    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    with torch.no_grad(), one_thread():
        took = []
        for _ in range(8):
            started = time.perf_counter()
            model(ids)
            took.append(time.perf_counter() - started)
    return PROMPT / statistics.median(took[1:])


def private(checkpoint: Path, timed: bool) -> dict[str, Any]:
    """What a trained network costs, in seconds too if `timed`; what cannot be run in private says why instead."""
    model, config, _ = load_checkpoint(checkpoint)
    found: dict[str, Any] = {
        "parameters": sum(each.numel() for each in model.parameters()),
        "float_tokens_per_s": float_rate(model.folded()),
    }
    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint(*stretched(model, config, LONG), directory, torch.float32)
        try:
            lowered = convert(directory)
            return found | {"costs": costs(lowered)} | ({"seconds": seconds(lowered)} if timed else {})
        except PrivinfError as error:
            return found | {"refused": str(error)}


def gather(out: Path, target: Path, steps: int, timed: bool = True) -> None:
    """Everything that was trained so far with its costs, as one document."""
    rows = []
    for row in ROWS:
        found = trained(out, row)
        good = [run["seed"] for run in found.get("runs", ()) if run["diverged"] is None]
        if found:
            entry = {"name": row.name, "family": row.family, "variant": row.variant, "sizes": row.sizes, **found}
            rows.append(entry | (private(out / row.slug / f"seed-{good[0]}" / "checkpoint", timed) if good else {}))
            print(row.name, {name: value for name, value in rows[-1].items() if name not in ("runs", "costs")}, flush=True)
    write_document(out, target, steps, SIZES, rows)
