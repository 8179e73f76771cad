"""What may be trained: networks of the ladder, with ReLU, or in loops, of Llama's, Mamba-2's or TTT's kind, by their variants' names."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import torch

from privinf.models.aero import AeroConfig, AeroModel, Block
from privinf.models.base import families
from privinf.models.checkpoint import load_checkpoint
from privinf.models.llama import LlamaConfig, LlamaModel
from privinf.models.mamba2 import Mamba2Model
from privinf.models.maxplus import MaxPlusAttention, MaxPlusConfig, MaxPlusModel
from privinf.models.recurrent import RecurrentConfig, RecurrentModel
from privinf.models.recursive import RecursiveConfig
from privinf.models.relu import ReluConfig
from privinf.models.ttt import TttModel
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config
from privinf.training.recurrent import first_of_mamba2, first_of_ttt, mamba2_config, ttt_config
from protocols.errors import ConfigError
from protocols.rotary import Rotation

Trained = AeroModel | LlamaModel | RecurrentModel
TrainedConfig = AeroConfig | LlamaConfig | RecurrentConfig
FamilyName = Literal["aero", "llama", "recursive", "relu", "maxplus", "mamba2", "ttt"]
USUAL: dict[FamilyName, str] = {
    "aero": "SM(t)+ScFuFFN",
    "llama": "SM+RN+SwiGLU",
    "recursive": "SM+FuFFN",
    "relu": "RA+ScFuFFN",
    "maxplus": "MP+MP",
    "mamba2": "M2(sp)+Conv+RN+SiLU",
    "ttt": "TTT+RN+SwiGLU",
}
"""The variant of each that is trained where none is named."""
TAKEN = "'gpt2', 'aero', 'recursive', 'relu', 'maxplus', 'llama', 'qwen2', 'mamba2' and 'ttt'"
OF_MAX_PLUS = re.compile(r"(?P<attention>MP|SM)(?P<norm>\+LN)?\+(?P<scaled>Sc)?(?P<ffn>MP|FuFFN)")
OF_LLAMA = re.compile(r"SM(?P<norm>\+RN)?\+(?P<scaled>Sc)?(?P<ffn>SwiGLU|GLU|FuFFN)")


def variant_config(
    family: FamilyName, variant: str, *, kv_heads: int | None = None, loops: int | None = None, rank: int | None = None, **sizes: Any
) -> TrainedConfig:
    """The configuration that a variant's name stands for in its family; ConfigError for no such name, or sizes that do not fit."""
    if family != "recursive" and (loops, rank) != (None, None):
        raise ConfigError("--loops and --rank: blocks of this family run once", remedy="give them with --family recursive")
    if family != "llama":
        if kv_heads is not None:
            told = (
                "these heads have no keys and values"
                if family in ("mamba2", "ttt")
                else "heads of the ladder have keys and values of their own"
            )
            raise ConfigError(f"--kv-heads: {told}", remedy="give it with --family llama")
        if family == "mamba2":
            return mamba2_config(variant, **sizes)
        if family == "ttt":
            return ttt_config(variant, **sizes)
        if family == "maxplus":
            return _max_plus_config(variant, sizes)
        if family == "relu" and not variant.startswith("RA"):
            raise ConfigError(f"variant {variant!r} is none of relu's", remedy="examples are RA+LN+R, RA+LN, RA+R, RA+FuFFN, RA+ScFuFFN_i2")
        config = ladder_config("SM" + variant[2:] if family == "relu" else variant, **sizes)
        if family == "aero":
            return config
        if family == "relu":
            return ReluConfig.checked(config.model_dump() | {"model_type": "relu"}, "variant " + variant)
        fields = config.model_dump() | {"model_type": "recursive", "loops": 3 if loops is None else loops, "rank": rank or 0}
        return RecursiveConfig.checked(fields, "variant " + variant)
    match = OF_LLAMA.fullmatch(variant)
    if match is None:
        raise ConfigError(
            f"variant {variant!r} is none of llama's", remedy="examples are SM+RN+SwiGLU, SM+RN+GLU, SM+RN+FuFFN, SM+ScGLU, SM+ScFuFFN"
        )
    width, heads = sizes["n_embd"], sizes["n_head"]
    if width % heads or width // heads % 2:
        raise ConfigError(f"--width: {width} is not an even multiple of --heads, {heads}")
    return LlamaConfig.checked(
        {
            "model_type": "llama",
            "n_kv_head": kv_heads or heads,
            "head_width": width // heads,
            "n_inner": 8 * math.ceil(width / 3),
            "rotation": Rotation(width // heads),
            "norm": "rmsnorm" if match["norm"] else "none",
            "ffn": match["ffn"].lower().replace("fuffn", "fused"),
            "ffn_scaled": bool(match["scaled"]),
            **sizes,
        },
        "variant " + variant,
    )


def _max_plus_config(variant: str, sizes: dict[str, Any]) -> MaxPlusConfig:
    match = OF_MAX_PLUS.fullmatch(variant)
    if match is None:
        raise ConfigError(f"variant {variant!r} is none of maxplus's", remedy="examples are MP+MP, MP+LN+MP, SM+MP, MP+FuFFN, MP+ScFuFFN")
    fields = {
        "model_type": "maxplus",
        "attention": {"MP": "maxplus", "SM": "softmax"}[match["attention"]],
        "norm": "layernorm" if match["norm"] else "none",
        "ffn": {"MP": "maxplus", "FuFFN": "fused"}[match["ffn"]],
        "ffn_scaled": bool(match["scaled"]),
    }
    return MaxPlusConfig.checked(fields | sizes, "variant " + variant)


def load_trained(directory: str | Path) -> tuple[Trained, TrainedConfig, bytes | None]:
    """`load_checkpoint` of what may be trained further."""
    model, config, tokenizer = load_checkpoint(directory)
    if not isinstance(model, Trained) or not isinstance(config, TrainedConfig):
        raise ConfigError(f"{directory}: {config.model_type!r} cannot be trained", remedy=f"this takes {TAKEN}")
    return model, config, tokenizer


def with_offsets(config: TrainedConfig) -> TrainedConfig:
    """The same with an affine function that is added to each row of scores, in the families that have one."""
    if type(config) is not AeroConfig or config.activation_function != "gelu_new":  # also of a family that is built on it
        return config
    return config.model_copy(update={"model_type": "aero", "attn_row_offset": True})


def built(config: TrainedConfig) -> Trained:
    """The float module, its weights not yet drawn."""
    model = families()[config.model_type]().build(config)
    assert isinstance(model, Trained)
    return model


def first_weights(model: Trained, seed: int, recipe: Literal["ours", "gpt2"] = "ours") -> None:
    """Draws the weights of a model that is to be trained: of Llama's kind as `initialise` does it for the ladder."""
    if isinstance(model, LlamaModel):
        _first_of_llama(model, seed, recipe)
    elif isinstance(model, Mamba2Model):
        first_of_mamba2(model, seed)
    elif isinstance(model, TttModel):
        first_of_ttt(model, seed)
    elif isinstance(model, AeroModel):
        initialise(model, seed, recipe)
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                torch.nn.init.zeros_(parameter)  # at first all loops are the same
        if isinstance(model, MaxPlusModel) and model.config.norm == "none":
            _smaller_attention(model)


@torch.no_grad()
def _smaller_attention(model: MaxPlusModel) -> None:
    """Max-plus attention gives the largest of q + k + v, where a softmax averages v: by the ladder's recipe a layer doubles the stream."""
    for block in model.h:
        if isinstance(block, Block) and isinstance(block.attn, MaxPlusAttention):
            for linear in (block.attn.c_attn, block.attn.c_proj):
                linear.weight.mul_(0.5)


@torch.no_grad()
def _first_of_llama(model: LlamaModel, seed: int, recipe: Literal["ours", "gpt2"]) -> None:
    config, generator = model.config, torch.Generator().manual_seed(seed)
    normed = config.norm == "rmsnorm" or recipe == "gpt2"
    branch, inward = 1 / math.sqrt(2 * config.n_layer), 0.02 if normed else 1 / math.sqrt(config.n_embd)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue  # scales, alpha and beta 1, as built; there are no biases
        if name.endswith("embed_tokens.weight"):
            std = 0.02 if normed else 0.1 if config.tie_word_embeddings else 0.2
        elif name == "lm_head.weight":
            std = 0.02
        elif name.endswith("down_proj.weight") and config.ffn == "fused":
            std = 0.02 * branch if normed else 0.2 * branch * inward
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std = 0.02 * branch if normed else branch / math.sqrt(parameter.shape[1])
        else:
            std = inward
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        if name.endswith(("q_proj.weight", "k_proj.weight")) and not normed:
            parameter.mul_(2)  # the stream starts small, so that queries and keys must not
