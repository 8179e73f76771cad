"""First weights of a ladder model that is to be trained."""

from __future__ import annotations

import math
from typing import Literal

import torch

from privinf.models.aero import AeroModel


@torch.no_grad()
def initialise(model: AeroModel, seed: int, recipe: Literal["ours", "gpt2"] = "ours") -> None:
    """Draws the weights of a model that is to be trained.

    With LayerNorm: GPT-2's own recipe. Without it nothing rescales the stream, so the embeddings start larger, queries and keys at twice
    the size of what they read, so that attention is not flat, and what the branches add is small, so that depth does not multiply.
    `recipe="gpt2"` takes GPT-2's for every variant.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    normed = config.norm == "layernorm" or recipe == "gpt2"
    branch = 1 / math.sqrt(2 * config.n_layer)
    inward = 0.02 if normed else 1 / math.sqrt(config.n_embd)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith(("temperature", "row_offset.weight")):
            continue  # biases and offsets 0, LayerNorm weights, alpha, beta and temperature 1, as built
        if name in ("wte.weight", "wpe.weight"):
            tied = name == "wte.weight" and config.tie_word_embeddings
            std = (0.02 if name == "wte.weight" else 0.01) if normed else 0.1 if tied or name == "wpe.weight" else 0.2
        elif name == "lm_head.weight":
            std = 0.02
        elif name.endswith("c_proj.weight"):
            std = 0.02 * branch if normed else branch / math.sqrt(parameter.shape[0])
        elif name.endswith("fused.weight"):
            std = 0.02 * branch if normed else 0.2 * branch * inward
        else:
            std = inward
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        if name.endswith("c_attn.weight") and not normed:
            parameter[:, : 2 * config.n_embd] *= 2  # the stream starts small, so that queries and keys must not
