"""Causal tracing: which layer and token carry what decides the next token, and what keeps the attention's entropy as it is.

Source: Meng, Bau, Andonian, Belinkov, "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262), section 2. Three runs: a
clean one; a corrupted one, with Gaussian noise of three deviations on the embeddings of some tokens; and for each layer and token a
corrupted one in which one value is restored to the clean one. The indirect effect is what the restoration gives back.

They corrupt the subject of a sentence. Text in general has none, so here the corrupted span is the one, of `SPAN` tokens, whose noise
lowers the probability of the next token most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from privinf.models.aero import AeroModel, Block
from privinf.models.base import Activations

SPAN, NOISE, CONFIDENT = 3, 3.0, 0.3
KINDS = ("state", "attention", "FFN")
PLACES = ("first corrupted", "other corrupted", "next", "between", "last")


@dataclass
class Effects:
    """Means over prompts. `probability` and `entropy` have one number for each kind, layer and place; an FFN that is not there has 0.

    `whole` has of each of them, kind and layer the sum over a prompt's places: the mean over prompts and its standard error.
    """

    prompts: int
    clean_probability: float
    corrupted_probability: float
    total_entropy_change: float  # mean over heads of |E_corrupted - E_clean| of the last position's attention, nats
    probability: dict[str, list[list[float]]]
    entropy: dict[str, list[list[float]]]
    whole: dict[str, dict[str, list[tuple[float, float]]]]


@torch.no_grad()
def choose_prompts(model: AeroModel, windows: Tensor, count: int) -> Tensor:
    """windows (N, T + 1) -> up to `count` of them whose last token the model expects: those it is confident of first, in their order."""
    logits = torch.cat([model(part[:, :-1], last_only=True) for part in torch.split(windows, 16)])  # (N, V)
    expected = logits.softmax(dim=-1).gather(1, windows[:, -1:])[:, 0]  # (N,)
    right = (expected >= CONFIDENT) & (logits.argmax(dim=-1) == windows[:, -1])
    order = torch.argsort((~right).int() + (1 - expected) * (~right), stable=True)
    return windows[order[:count]]


@torch.no_grad()
def trace_prompts(
    model: AeroModel, prompts: Tensor, seed: int = 1, draws: int = 2, told: Callable[[float], None] = lambda done: None
) -> Effects:
    """prompts (N, T + 1), the last id being what should come next -> the mean indirect effects; `told` hears which part is done."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    deviation = NOISE * float(model.wte.weight.std())
    layers, tokens = model.config.n_layer, prompts.shape[1] - 1
    span = min(SPAN, tokens - 1)
    each = {name: torch.zeros(len(prompts), len(KINDS), layers, len(PLACES), dtype=torch.float64) for name in ("probability", "entropy")}
    seen = torch.zeros(len(PLACES), dtype=torch.float64)
    clean_p = corrupted_p = change = 0.0
    for number, row in enumerate(prompts):
        ids, target = row[:-1][None], int(row[-1])
        noise = torch.randn(draws, 1, span, model.config.n_embd, generator=generator) * deviation
        clean = _run(model, ids, target)
        start = _most_harmful(model, ids, target, noise[0, 0])
        noises = torch.zeros(draws, tokens, model.config.n_embd)  # (draws, T, d)
        noises[:, start : start + span] = noise[:, 0]
        broken = _run(model, ids.expand(draws, -1), target, noises)
        apart = (broken.entropy - clean.entropy).abs().mean(dim=(1, 2))  # (draws,)
        clean_p, corrupted_p = clean_p + float(clean.probability[0]), corrupted_p + float(broken.probability.mean())
        change += float(apart.mean())
        place = _places(tokens, start, span)  # (T,)
        members = torch.nn.functional.one_hot(place, len(PLACES)).double()  # (T, places)
        seen += (members.sum(dim=0) > 0).double()
        share = members / members.sum(dim=0).clamp_min(1)  # a mean over the tokens of a place
        everywhere = torch.arange(tokens).repeat(draws)  # (draws T,): the token that is restored
        for kind, name in enumerate(KINDS):
            for layer in range(layers):
                module = _module(model, name, layer)
                if module is None:
                    continue
                with _restoring(module, clean.outputs[name, layer], everywhere):
                    again = _run(model, ids.expand(draws * tokens, -1), target, noises.repeat_interleave(tokens, dim=0))
                gained = again.probability.reshape(draws, tokens) - broken.probability[:, None]
                nearer = apart[:, None] - (again.entropy - clean.entropy).abs().mean(dim=(1, 2)).reshape(draws, tokens)
                each["probability"][number, kind, layer] = gained.mean(dim=0).double() @ share
                each["entropy"][number, kind, layer] = nearer.mean(dim=0).double() @ share
        told((number + 1) / len(prompts))
    means = {
        name: {kind: (total / seen.clamp_min(1)).tolist() for kind, total in zip(KINDS, values.sum(dim=0), strict=True)}
        for name, values in each.items()
    }
    whole = {name: dict(zip(KINDS, mean_and_error(values.sum(dim=-1)), strict=True)) for name, values in each.items()}
    count = len(prompts)
    return Effects(count, clean_p / count, corrupted_p / count, change / count, means["probability"], means["entropy"], whole)


def mean_and_error(values: Tensor) -> list[list[tuple[float, float]]]:
    """values (N, kinds, layers) -> for each kind and layer the mean of N, and its standard error, 0 where N is 1."""
    count = len(values)
    error = values.std(dim=0) / count**0.5 if count > 1 else torch.zeros_like(values[0])
    return [list(zip(*rows, strict=True)) for rows in zip(values.mean(dim=0).tolist(), error.tolist(), strict=True)]


@dataclass
class _Run:
    probability: Tensor  # (B,), of the target
    entropy: Tensor  # (B, L, H), of the last position's attention
    outputs: dict[tuple[str, int], Tensor]  # (T, d) of the first row, by kind and layer


def _module(model: AeroModel, kind: str, layer: int) -> torch.nn.Module | None:
    block = model.h[layer]
    assert isinstance(block, Block)
    return {"state": block, "attention": block.attn, "FFN": block.mlp}[kind]


def _run(model: AeroModel, ids: Tensor, target: int, noise: Tensor | None = None) -> _Run:
    """ids (B, T), noise (B, T, d) on the token embeddings."""
    outputs: dict[tuple[str, int], Tensor] = {}
    hooks = []
    if noise is not None:
        hooks.append(model.wte.register_forward_hook(lambda module, args, output: output + noise))
    else:
        for layer in range(model.config.n_layer):
            for kind in KINDS:
                module = _module(model, kind, layer)
                if module is not None:
                    hooks.append(module.register_forward_hook(_keeper(outputs, (kind, layer))))
    trace = Activations(keep_attention=True)
    try:
        logits = model(ids, trace=trace)[:, -1]  # (B, V)
    finally:
        for hook in hooks:
            hook.remove()
    rows = torch.stack([attention[:, :, -1] for attention in trace.attention], dim=1)  # (B, L, H, T)
    entropy = -torch.special.xlogy(rows, rows.clamp_min(1e-30)).sum(dim=-1)
    return _Run(logits.softmax(dim=-1)[:, target], entropy, outputs)


def _keeper(outputs: dict[tuple[str, int], Tensor], key: tuple[str, int]) -> Callable[..., None]:
    def keep(module: Any, args: Any, output: Tensor) -> None:
        outputs[key] = output[0].clone()

    return keep


@contextmanager
def _restoring(module: torch.nn.Module, clean: Tensor, positions: Tensor) -> Iterator[None]:
    """While it lasts, row b of the module's output has the clean values at positions[b]."""

    def restore(_: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[torch.arange(len(positions)), positions] = clean[positions]
        return output

    hook = module.register_forward_hook(restore)
    try:
        yield
    finally:
        hook.remove()


def _most_harmful(model: AeroModel, ids: Tensor, target: int, noise: Tensor) -> int:
    """The start of the span whose corruption lowers the target most; the last token, where the prediction is read, is not in it."""
    starts = max(1, ids.shape[1] - len(noise))
    noises = torch.zeros(starts, ids.shape[1], noise.shape[1])
    for start in range(starts):
        noises[start, start : start + len(noise)] = noise
    return int(_run(model, ids.expand(starts, -1), target, noises).probability.argmin())


def _places(tokens: int, start: int, span: int) -> Tensor:
    """(T,): which of PLACES a token is; one before the span sees nothing of it, and counts as `between`, with no effect."""
    place = torch.full((tokens,), PLACES.index("between"))
    place[start : start + span] = PLACES.index("other corrupted")
    place[start] = PLACES.index("first corrupted")
    if start + span < tokens:
        place[start + span] = PLACES.index("next")
    place[tokens - 1] = PLACES.index("last")
    return place
