"""How fast this machine is: two small networks of irregular weights, answered by local parties, and what their times say of a unit's.

One network is narrow and deep, so that rounds take its time, and the other wide, so that weights and products do; each is asked a short and
a long prompt. The differences between prompts are bytes and products, what is left of the short ones rounds and weights.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privinf.local.session import LocalSession
from privinf.lowering.explain import explain
from privinf.lowering.from_checkpoint import convert
from privinf.lowering.lowered import Lowered
from privinf.session.options import Options
from privinf.session.pace import PASS, Pace, keep, kept
from protocols import kernels

NARROW = {"n_layer": 4, "n_head": 8, "n_embd": 128, "vocab_size": 512, "n_positions": 144}
WIDE = {"n_layer": 1, "n_head": 8, "n_embd": 768, "vocab_size": 512, "n_positions": 144}
SHORT, LONG, TOKENS = 8, 64, 5
ASKED = [SHORT] * 3 + [LONG] * 3  # the first of each length, which also writes tapes, does not count; long ones get one token


@dataclass(frozen=True)
class Seen:
    """Costs and seconds of one network: the short prompt, the long one, and a token after the short one; `cold_s` of the first of all."""

    short: dict[str, int]
    long: dict[str, int]
    token: dict[str, int]
    short_s: float
    long_s: float
    token_s: float
    cold_s: float


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
    """The numbers of `privinf.session.pace` from the two networks' times."""
    more = [_moved(each.long) - _moved(each.short) for each in seen]
    byte_s, mac_s = solved(
        [(more, each.long["macs"] - each.short["macs"]) for more, each in zip(more, seen, strict=True)],
        [each.long_s - each.short_s for each in seen],
    )
    left = [each.short_s - byte_s * _moved(each.short) - mac_s * each.short["macs"] for each in seen]
    round_s, weight_s = solved([(each.short["rounds"] + PASS, each.short["setup_bytes"]) for each in seen], left)
    taped = solved([(each.token["rounds"], each.token["setup_bytes"]) for each in seen], [each.token_s for each in seen])
    cold_s = max(0.0, statistics.mean(each.cold_s - each.short_s for each in seen))
    return Pace(round_s, byte_s, mac_s, weight_s, *taped, cold_s=cold_s, load=load, at=at)


def solved(rows: Sequence[tuple[float, float]], times: Sequence[float]) -> tuple[float, float]:
    """(x, y) >= 0 with a x + b y closest to t, for two rows (a, b), which are not negative, and their times t, in least squares."""
    (a, b), (c, d) = rows
    s, t = times
    if determinant := a * d - b * c:
        x, y = (s * d - b * t) / determinant, (a * t - s * c) / determinant
        if x >= 0 and y >= 0:
            return x, y
    alone = [
        (max(0.0, (a * s + c * t) / (a * a + c * c)) if a or c else 0.0, 0.0),
        (0.0, max(0.0, (b * s + d * t) / (b * b + d * d)) if b or d else 0.0),
    ]
    return min(alone, key=lambda found: (a * found[0] + b * found[1] - s) ** 2 + (c * found[0] + d * found[1] - t) ** 2)


def _moved(total: dict[str, int]) -> int:
    return total["online_bytes"] + total["dealer_bytes"]


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
    prompts: dict[int, list[float]] = {SHORT: [], LONG: []}
    tokens: list[float] = []
    cold_s = 0.0
    with LocalSession(lowered, options) as session:
        for number, count in enumerate(ASKED):
            first, gaps = asked(session, [1 + n % 100 for n in range(count)], TOKENS if count == SHORT else 1)
            if number == 0:
                cold_s = first
            elif ASKED[number - 1] == count:
                prompts[count].append(first)
                tokens += gaps[1:] if count == SHORT else []
    short, long, token = (
        explain(lowered, count, cached=cached)["total"] for count, cached in ((SHORT, 0), (LONG, 0), (1, SHORT + TOKENS // 2))
    )
    short_s, long_s, token_s = (statistics.median(each) for each in (*prompts.values(), tokens))
    return Seen(short, long, token, short_s, long_s, token_s, cold_s)


def asked(session: LocalSession, ids: list[int], count: int) -> tuple[float, list[float]]:
    """Seconds from the question to the first token, set-up aside, and from each token to the next."""
    came = [time.perf_counter()]
    for _ in session.generate(ids=ids, max_new_tokens=count, ignore_eos=True):
        came.append(time.perf_counter())
    assert session.result is not None
    gaps = [after - before for before, after in itertools.pairwise(came)]
    return max(0.0, gaps[0] - session.result["timing"]["setup_s"]), gaps[1:]
