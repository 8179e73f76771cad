"""Thousands of private passes of small random networks in one process, each against float64: how far off the worst logit is.

The parties are those of a session, over the in-memory twin of the transport; their protocols, rings and dealer are the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import Run
from benchmarks.schema import Goal
from privinf.lowering import Lowered, convert
from privinf.models.aero import AeroModel
from privinf.models.base import Decoder
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.training.ladder import ladder_config
from protocols.errors import ConfigError, RangeError
from tests.support.ladder import LADDER, float_logits, walker

LOGITS = 30.0
"""The largest logit of every network, on the prompts that choose its head's scale."""


def drawn(seed: int, variant: str, directory: Path) -> tuple[Lowered, Decoder]:
    """A network of one to three layers and 16 to 48 columns; matrices of gain 0.5 to 1.5, and a head of its own that makes logits of 30.

    Where the residual stream grows so much that no attention score fits, the next gain is smaller.
    """
    generator = torch.Generator().manual_seed(seed)

    def choice(values: Sequence[int]) -> int:
        return values[int(torch.randint(len(values), (), generator=generator))]

    heads = choice((1, 2, 4))
    sizes = {"n_head": heads, "n_embd": heads * choice((4, 8, 12)) * (4 if heads == 1 else 1), "n_layer": choice((1, 2, 3))}
    config = ladder_config(variant, vocab_size=choice((50, 97, 201)), n_positions=24, tie_word_embeddings=False, **sizes)
    gain = 0.5 + float(torch.rand((), generator=generator))
    while True:
        model = AeroModel(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                normal = torch.randn(weight.shape, generator=generator)
                if name.endswith(("alpha", "beta", "temperature")):
                    weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
                elif "ln_" in name:
                    weight.copy_(name.endswith("weight") + 0.2 * normal)
                else:
                    weight.copy_(normal * (gain / math.sqrt(weight.shape[0]) if name.startswith("h.") and weight.dim() == 2 else 0.5))
            largest = max(float(float_logits(model, ids).abs().max()) for ids in prompts(seed, model, 20))
            model.float().lm_head.weight.mul_(LOGITS / largest)
        save_checkpoint(model, config, directory, torch.float32)
        try:
            return convert(directory), load_checkpoint(directory)[0].double()
        except RangeError:
            gain /= 2


def prompts(seed: int, model: Decoder, count: int) -> list[list[int]]:
    """Random tokens, of all lengths up to the context's."""
    generator = torch.Generator().manual_seed(seed + 1)
    config = model.config
    lengths = torch.randint(1, config.n_positions + 1, (count,), generator=generator).tolist()
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def errors(run: Run, work: Path, *, networks: int, count: int, first: int = 0, variants: Sequence[str] = LADDER) -> None:
    """`count` passes of each network, the ladder's variants in turn.

    Adds the worst logit error of each pass, of all networks and of each variant, with quantiles.
    """
    if unknown := [name for name in variants if name not in LADDER]:
        raise ConfigError(f"no variants of the ladder: {', '.join(unknown)}", remedy=f"choose among {', '.join(LADDER)}")
    worst: dict[str, list[float]] = {variant: [] for variant in variants}
    try:
        for number in range(networks):
            variant, seed = variants[number % len(variants)], first + number
            lowered, model = drawn(seed, variant, work / "checkpoint")
            pass_ = walker(lowered)
            for ids in prompts(seed + 1, model, count):
                found = pass_(ids).client.reshape(-1)
                worst[variant].append(float((found - float_logits(model, ids)).abs().max()))
    finally:
        run.note(f"networks of seeds {first} to {first + networks - 1}; logits up to about {LOGITS:g}, revealed in units of 2^-10")
        every = [error for part in worst.values() for error in part]
        if every:
            run.budget.append(Goal(f"worst logit error of {len(every)} passes of random networks", "", "", 0.03, 0.01, max(every)))
        for name, found in {"all variants": every, **worst}.items():
            if found:
                _add(run, name, found)


def _add(run: Run, name: str, worst: list[float]) -> None:
    of = f"{name}, {len(worst)} passes"
    run.measure("worst logit error", max(worst), "", of=of)
    for share in (0.5, 0.99, 0.999):
        value = float(torch.tensor(worst, dtype=torch.float64).quantile(share))
        run.measure(f"{share * 100:g} % of the passes' worst errors are below", value, "", of=of)
