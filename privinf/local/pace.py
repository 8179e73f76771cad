"""How fast this machine is: two small networks of irregular weights, answered by local parties, and what their times say of a unit's.

One network is narrow and deep, so that rounds take its time, the other wide, so that weights and products do; each is asked prompts of
three lengths. What times of a few prompts cannot tell apart is taken from `USUAL`, how the units of one machine compare, which was fitted
to twelve networks with prompts of 8 to 200 tokens: measured is how fast all units are and, as far as times show it, how each differs.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from privinf.local.session import LocalSession
from privinf.lowering.explain import explain
from privinf.lowering.from_checkpoint import convert
from privinf.lowering.lowered import Lowered
from privinf.session.options import Options
from privinf.session.pace import Pace, Speeds, entries, keep, kept, units
from protocols import kernels

NARROW = {"n_layer": 4, "n_head": 8, "n_embd": 128, "vocab_size": 512, "n_positions": 144}
WIDE = {"n_layer": 2, "n_head": 12, "n_embd": 768, "vocab_size": 2048, "n_positions": 144}
SHORT, LENGTHS, TOKENS = 16, (16, 64, 128), 6
ASKED = [SHORT, *LENGTHS * 3]  # the first, which loads what later ones find, counts apart; short ones get tokens, others one

USUAL = Pace(
    walked=Speeds(1.3e-2, 6.8e-4, 4.7e-10, 8.1e-9, 9.3e-10, 8.9e-11),
    taped=Speeds(6.6e-4, 1.6e-4, 3.2e-10, 1.6e-8, 1.7e-9, 0.0),
    cold=Speeds(4.5e-2, 1.9e-4, 7.0e-10, 2.1e-9, 2.1e-9, 0.0),
    table_s=6.3e-7,
    load=0.0,
    at=0.0,
)
"""Of one processor of 2026, two of whose cores had nothing else to do."""
PAUSE_S = 0.15  # until the parties are done with what they do after a reply
SWEEPS, NEAR = 1000, 1e-9
HELD = 0.35  # how far a unit is from where `USUAL` has it, as a part of that, weighs against this part of a time


@dataclass(frozen=True)
class Seen:
    """One network: costs and seconds of its prompts and of a token, and of the first prompt of all, and the entries of its tables."""

    prompts: tuple[tuple[dict[str, int], float], ...]
    token: tuple[dict[str, int], float]
    first: tuple[dict[str, int], float]
    entries: int


def pace_of(cache: Path, device: str = "cpu", *, anew: bool = False) -> Pace:
    """What is kept of this machine, or else, or if it is to be `anew`, a measurement of some seconds, which is then kept.

    Loads the compiled loops first, or waits until they are compiled. PrivinfError if the parties cannot be started.
    """
    kernels.load(cache / "kernels")
    status = kernels.status()
    found = None if anew else kept(cache, device, status)
    if found is None:
        found = measured(cache, device)
        keep(cache, device, status, found)
    return found


def measured(cache: Path, device: str) -> Pace:
    """Runs both networks; what their parties keep is not the user's, and goes with them."""
    with tempfile.TemporaryDirectory(prefix="privinf-pace-") as directory:
        root = Path(directory)
        if (cache / "kernels").is_dir():
            shutil.copytree(cache / "kernels", root / "cache" / "kernels")
        options = Options(cache=root / "cache", device=device)
        seen = [_seen(_random(root / name, sizes), options) for name, sizes in (("narrow", NARROW), ("wide", WIDE))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return fitted(seen, load=os.getloadavg()[0] / cores, at=time.time())


def fitted(seen: Sequence[Seen], *, load: float, at: float) -> Pace:
    """The numbers of `privinf.session.pace` from the networks' times."""
    walked = speeds([prompt for each in seen for prompt in each.prompts], USUAL.walked)
    taped = speeds([each.token for each in seen], USUAL.taped)
    more = [max(0.0, seconds - walked.of(total)) for total, seconds in (each.first for each in seen)]
    usual = [USUAL.cold.of(each.first[0]) + USUAL.table_s * each.entries for each in seen]
    slower = sum(more) / sum(usual)
    cold = Speeds(*(each * slower for each in astuple(USUAL.cold)))
    return Pace(walked, taped, cold, USUAL.table_s * slower, load=load, at=at)


def speeds(seen: Sequence[tuple[dict[str, int], float]], usual: Speeds) -> Speeds:
    """From costs of passes and their seconds t: the x >= 0 with the least sum of squares of (x . units / t - 1) and `HELD` (x / u - 1).

    u is `usual` as often as fits the times best. Where times say nothing of a unit, or of two the same, it is as `usual`.
    """
    times = np.array([units(total) for total, _ in seen]) * astuple(usual) / np.array([[seconds] for _, seconds in seen])
    sums = times.sum(1)
    slower = sums.sum() / (sums @ sums)
    count = times.shape[1]
    rows = np.concatenate([times * slower, HELD * np.eye(count)])
    parts = least(rows, np.concatenate([np.ones(len(times)), np.full(count, HELD)]))
    return Speeds(*(float(each * slower * part) for each, part in zip(astuple(usual), parts, strict=True)))


def least(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """x >= 0 with the least |A x - b|, A `rows` of independent columns, b `wanted`: one x after the other, the others held.

    That comes as close as one likes to the one minimum there is (Luo and Tseng, 1992).
    """
    products, aims = (rows.T @ rows).tolist(), (rows.T @ wanted).tolist()
    found = [0.0] * len(aims)
    for _ in range(SWEEPS):
        before = list(found)
        for n, row in enumerate(products):
            found[n] = max(0.0, found[n] + (aims[n] - sum(a * x for a, x in zip(row, found, strict=True))) / row[n])
        if max(abs(x - y) for x, y in zip(found, before, strict=True)) < NEAR:
            break
    return np.array(found)


def _random(directory: Path, sizes: dict[str, Any]) -> Lowered:
    """Fused FFNs and no LayerNorm, weights so small that no value grows."""
    import torch

    from privinf.models.aero import AeroConfig, AeroModel
    from privinf.models.checkpoint import save_checkpoint

    config = AeroConfig.checked({"model_type": "aero", "norm": "none", "ffn": "fused", "ffn_scaled": True, **sizes}, "the measurement")
    model = AeroModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:  # a chirp: as irregular as is needed here, and the same everywhere
                size = 0.1 if name.startswith("w") else 0.5 / parameter.shape[0] ** 0.5
                chirp = torch.arange(parameter.numel(), dtype=torch.float64).square_().mul_(0.7548776662).sin_()
                parameter.copy_(size * chirp.reshape(parameter.shape))
    save_checkpoint(model, config, directory)
    return convert(directory)


def _seen(lowered: Lowered, options: Options) -> Seen:
    """Asks each prompt several times; a prompt's time is the median, and so is a token's of all but each reply's first two."""
    prompts: dict[int, list[float]] = {count: [] for count in LENGTHS}
    tokens: list[float] = []
    firsts: list[float] = []
    with LocalSession(lowered, options) as session:
        for count in ASKED:
            time.sleep(PAUSE_S)
            first, gaps = asked(session, [1 + n % 100 for n in range(count)], TOKENS if count == SHORT else 1)
            if firsts:
                prompts[count].append(first)
                tokens += gaps[1:]
            else:  # which also writes tapes
                firsts.append(first)
    costs = {count: explain(lowered, count)["total"] for count in LENGTHS}
    token = explain(lowered, 1, cached=SHORT + TOKENS // 2)["total"]
    seen = tuple((costs[count], statistics.median(took)) for count, took in prompts.items())
    return Seen(seen, (token, statistics.median(tokens)), (costs[SHORT], firsts[0]), entries(lowered))


def asked(session: LocalSession, ids: list[int], count: int) -> tuple[float, list[float]]:
    """Seconds from the question to the first token, set-up aside, and from each token to the next."""
    came = [time.perf_counter()]
    for _ in session.generate(ids=ids, max_new_tokens=count, ignore_eos=True):
        came.append(time.perf_counter())
    assert session.result is not None
    gaps = [after - before for before, after in itertools.pairwise(came)]
    return max(0.0, gaps[0] - session.result["timing"]["setup_s"]), gaps[1:]
