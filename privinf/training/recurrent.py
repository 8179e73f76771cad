"""What may be trained of the families with a state that does not grow: Mamba-2, TTT-Linear, and what is left of both."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from privinf.models.base import Activations
from privinf.models.mamba2 import Mamba2Config, Mamba2Model
from privinf.models.ttt import SIZED, Block, TttConfig, TttModel
from protocols.errors import ConfigError

OF_MAMBA2 = re.compile(r"M2\((?P<decay>sp|relu|fix)\)(?P<conv>\+Conv)?(?P<norm>\+RN)?(?:\+(?P<gate>SiLU|R|GLU))?")
DECAYS = {"sp": "softplus", "relu": "relu", "fix": "fixed"}
GATES = {"SiLU": "silu", "R": "relu", "GLU": "linear", None: "none"}
TAPS = 4


def mamba2_config(variant: str, **sizes: Any) -> Mamba2Config:
    """The configuration that a variant's name stands for; ConfigError for no such name, or sizes that do not fit."""
    match = OF_MAMBA2.fullmatch(variant)
    if match is None:
        raise ConfigError(
            f"variant {variant!r} is none of mamba2's",
            remedy="examples are M2(sp)+Conv+RN+SiLU, M2(sp)+RN+R, M2(relu)+RN+GLU, M2(relu), M2(fix)",
        )
    inner = 2 * sizes["n_embd"]
    if inner % sizes["n_head"]:
        raise ConfigError(f"--width: twice {sizes['n_embd']} is not a multiple of --heads, {sizes['n_head']}")
    return Mamba2Config.checked(
        {
            "model_type": "mamba2",
            "n_inner": inner,
            "decay": DECAYS[match["decay"]],
            "conv": TAPS if match["conv"] else 0,
            "norm": "rmsnorm" if match["norm"] else "none",
            "gate": GATES[match["gate"]],
            **sizes,
        },
        "variant " + variant,
    )


@torch.no_grad()
def first_of_mamba2(model: Mamba2Model, seed: int) -> None:
    """Draws the weights of a model that is to be trained: decays of memories from a few positions to many, what branches add small."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    normed = config.norm == "rmsnorm"
    branch = 1 / math.sqrt(2 * config.n_layer)
    for name, parameter in model.named_parameters():
        inward = 1 / math.sqrt(parameter.shape[-1])
        if name.endswith("dt_proj.bias"):
            steps = torch.logspace(-3, -1, config.n_head) if config.decay == "softplus" else 2.0 ** -torch.linspace(1, 6, config.n_head)
            parameter.copy_(steps.expm1().log() if config.decay == "softplus" else steps)
        elif name.endswith("A_log"):
            parameter.copy_(torch.linspace(1, 16, config.n_head).log())
        elif name.endswith("conv_weight"):
            drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(drawn / math.sqrt(config.conv))
            if config.gate in ("linear", "none"):
                parameter[-1].add_(1.0)
        elif parameter.dim() < 2:
            continue  # scales and D 1, biases 0, as built
        elif name in ("embeddings.weight", "lm_head.weight"):
            std = 0.02 if normed or name == "lm_head.weight" else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        elif name.endswith("dt_proj.weight"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * inward * (0.3 if normed else 1))
        else:
            std = inward * (branch if name.endswith("out_proj.weight") else 1.0)
            # an output is a product of three maps of the stream: one that starts small, and no map larger, or seven layers run away
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


SETTLED = 0.5  # of the norm of a mini-batch's K^T K: half of what lowering plans for, a quarter of where the inner descent runs away


@torch.no_grad()
def settle_keys(model: TttModel, ids: Tensor) -> None:
    """ids (B, T): keys of a head with which a mini-batch's step is larger than `SETTLED` are made smaller, so that none is.

    A penalty does not do it: without FFNs or at a high rate what the loss gains by larger steps outweighs it, until the descent runs away.
    """
    trace, heads = Activations(), model.config.n_head
    model(ids, trace=trace)
    for block, sized in zip(model.layers, trace.keys, strict=True):
        assert isinstance(block, Block)
        k = sized.float() / math.sqrt(SIZED * model.config.mini_batch)  # (B, H, T, P)
        steps = [torch.linalg.matrix_norm(part.mT @ part, 2) for part in torch.split(k, model.config.mini_batch, 2)]  # (B, H) each
        steepest = torch.stack(steps).amax(dim=(0, 1))  # (H,)
        factor = (SETTLED / steepest.clamp_min(SETTLED)).sqrt()
        block.learner.k_proj.weight.mul_(factor.repeat_interleave(model.config.n_embd // heads)[:, None])


OF_TTT = re.compile(r"TTT(?P<norm>\+RN)?(?:\+(?P<ffn>SwiGLU|R))?")


def ttt_config(variant: str, **sizes: Any) -> TttConfig:
    """The configuration that a variant's name stands for; ConfigError for no such name, or sizes that do not fit."""
    match = OF_TTT.fullmatch(variant)
    if match is None:
        raise ConfigError(f"variant {variant!r} is none of ttt's", remedy="examples are TTT+RN+SwiGLU, TTT+RN+R, TTT+RN, TTT+R, TTT")
    if sizes["n_embd"] % sizes["n_head"]:
        raise ConfigError(f"--width: {sizes['n_embd']} is not a multiple of --heads, {sizes['n_head']}")
    ffn = {"SwiGLU": "swiglu", "R": "relu", None: "none"}[match["ffn"]]
    inner = 8 * math.ceil(sizes["n_embd"] / 3) if ffn == "swiglu" else 4 * sizes["n_embd"]
    fields = {"model_type": "ttt", "n_inner": inner, "norm": "rmsnorm" if match["norm"] else "none", "ffn": ffn, **sizes}
    return TttConfig.checked(fields, "variant " + variant)


@torch.no_grad()
def first_of_ttt(model: TttModel, seed: int) -> None:
    """Draws the weights of a model that is to be trained: keys so small that a mini-batch's step is an eighth of the largest stable one."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    normed, width = config.norm == "rmsnorm", config.n_embd // config.n_head
    stream = 1.0 if normed else 0.2  # the size of what layers read
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue  # scales, as built
        std = 1 / math.sqrt(parameter.shape[-1])
        if name in ("embeddings.weight", "lm_head.weight"):
            std = 0.02 if normed or name == "lm_head.weight" else stream
        elif name.endswith("k_proj.weight"):
            std *= 0.5 / (stream * math.sqrt(config.mini_batch * width))  # a mini-batch's K^T K has trace 1/4
        elif name.endswith("learner.weight"):
            std *= 0.5
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.n_layer)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
