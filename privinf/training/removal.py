"""Which FFNs a model can do without: each one's cost by ablation, the choice of k, and the model that is left.

AERO removes the FFNs of the deepest layers. Here the choice is made by the loss on training text, and theirs is one of the candidates.
Two others go by causal traces: the FFNs that have the least effect on the next token's probability, and on the attention's entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations

import torch
from torch import Tensor

from privinf.models.aero import AeroConfig, AeroModel, Block, FeedForward
from privinf.training.evaluation import token_loss
from protocols.errors import ConfigError

RULES = {
    "recommended": "recommended",
    "deepest": "the deepest, AERO's rule",
    "least_probability": "the least effect on the next token",
    "least_entropy": "the least effect on the entropy",
}
"""By which FFNs are chosen, and what each is called."""
MOST_SETS = 60  # of k layers that are all tried; beyond, one layer after the other is taken


def ffn_layers(config: AeroConfig) -> list[int]:
    """The layers that have an FFN."""
    return [layer for layer in range(config.n_layer) if config.has_ffn(layer)]


def check_removal(config: AeroConfig, count: int) -> None:
    """ConfigError unless the model has so many FFNs."""
    have = len(ffn_layers(config))
    if not have:
        raise ConfigError(f"--remove {count}: the model ({config.variant}) has no FFN", remedy="leave --remove out")
    if not 1 <= count <= have:
        raise ConfigError(f"--remove {count}: the model ({config.variant}) has {have} FFNs", remedy=f"give a number from 1 to {have}")


@contextmanager
def _lacking(folded: AeroModel, layers: Sequence[int]) -> Iterator[None]:
    blocks = [block for layer, block in enumerate(folded.h) if layer in layers and isinstance(block, Block)]
    kept = [block.mlp for block in blocks]
    try:
        for block in blocks:
            block.mlp = None
        yield
    finally:
        for block, mlp in zip(blocks, kept, strict=True):
            block.mlp = mlp


def loss_without(folded: AeroModel, ids: Tensor, layers: Sequence[int]) -> float:
    """ids (N, T + 1) -> nats per token of the folded model without these FFNs; what their betas did to the stream stays."""
    if not folded.is_folded:
        raise ValueError("a folded model is wanted")
    with _lacking(folded, layers):
        return token_loss(folded, ids)


def deepest(config: AeroConfig, count: int) -> tuple[int, ...]:
    """AERO's rule: the FFNs nearest to the output."""
    return tuple(ffn_layers(config)[-count:])


def least(effects: Mapping[int, float], count: int) -> tuple[int, ...]:
    """The `count` layers of the least effect by size: of what is traced, what the network would miss least."""
    return tuple(sorted(sorted(effects, key=lambda layer: abs(effects[layer]))[:count]))


def recommend(folded: AeroModel, ids: Tensor, count: int, told: Callable[[float], None] = lambda share: None) -> tuple[int, ...]:
    """The `count` FFNs whose absence costs least on this text: the best of all sets where they are few, else one layer after the other.

    `told` gets the share that is done.
    """
    config = folded.config
    check_removal(config, count)
    have = ffn_layers(config)
    every = math.comb(len(have), count) <= MOST_SETS
    most = math.comb(len(have), count) if every else 2 + sum(len(have) - done for done in range(count))
    tried = 0

    def cost(layers: tuple[int, ...]) -> float:
        nonlocal tried
        told(tried / most)
        tried += 1
        return loss_without(folded, ids, layers)

    if every:
        return min(combinations(have, count), key=cost)
    chosen: tuple[int, ...] = ()
    while len(chosen) < count:
        rest = [layer for layer in have if layer not in chosen]
        chosen = min((tuple(sorted((*chosen, layer))) for layer in rest), key=cost)
    return min(chosen, deepest(config, count), key=cost)


@torch.no_grad()
def without_ffns(model: AeroModel, layers: Sequence[int]) -> AeroModel:
    """An `aero` model that can be trained on: the same weights without these FFNs, alpha and beta one again.

    The betas go into the weights first, as in `folded`, so that removing an FFN does not rescale the stream; a tied head is untied where
    that needs it. GELU becomes GPT-2's tanh form, which `aero` has.
    """
    folded = model.folded()
    old = model.config
    fields = old.model_dump() | {"model_type": "aero", "activation_function": "gelu_new"}
    fields["ffn_removed"] = tuple(sorted({*old.ffn_removed, *layers}))
    fields["tie_word_embeddings"] = folded.lm_head.weight is folded.wte.weight
    config = AeroConfig.model_validate(fields)
    left = AeroModel(config)
    state = {name: value for name, value in folded.state_dict().items() if name in left.state_dict()}
    for layer, (block, source) in enumerate(zip(left.h, model.h, strict=True)):
        assert isinstance(block, Block) and isinstance(source, Block)
        if source.attn.temperature is not None:
            state[f"h.{layer}.attn.temperature"] = source.attn.temperature
        else:  # folding put 1 / sqrt(d_k) into the queries
            for name in ("weight", "bias"):
                part = state[f"h.{layer}.attn.c_attn.{name}"].clone()
                part[..., : config.n_embd] *= math.sqrt(config.head_width)
                state[f"h.{layer}.attn.c_attn.{name}"] = part
        if isinstance(block.mlp, FeedForward) and block.mlp.alpha is not None:
            state |= {f"h.{layer}.mlp.{name}": torch.ones(()) for name in ("alpha", "beta")}
    left.load_state_dict(state)
    return left.eval()
