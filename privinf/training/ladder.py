"""The ladder by its names: the configuration that `SM(t)+ScFuFFN_i2` and the like stand for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from privinf.models.aero import AeroConfig, AeroModel
from privinf.models.checkpoint import load_checkpoint
from protocols.errors import ConfigError

VARIANT = re.compile(r"SM(?P<t>\(t\))?(?P<ln>\+LN)?(?:\+(?P<ffn>G|R|ScFFN|ScFuFFN|FuFFN|ScG|ScR))?(?:_i(?P<removed>\d+))?")


def ladder_config(variant: str, **sizes: Any) -> AeroConfig:
    """The configuration of a ladder name: `ladder_config("SM(t)+ScFuFFN_i2", n_layer=6, n_embd=256, ...)`.

    `_i{k}` removes the FFNs of the k deepest layers.
    """
    match = VARIANT.fullmatch(variant)
    if match is None:
        raise ConfigError(
            f"variant {variant!r} is not on the ladder",
            remedy="examples are SM+LN+G, SM+LN+R, SM+LN, SM+ScFFN, SM+ScFuFFN, SM(t)+ScFuFFN_i2",
        )
    ffn = match["ffn"] or ""
    kind = "fused" if ffn.endswith("FuFFN") else {"G": "gelu", "R": "relu"}.get(ffn[-1:], "identity")
    layers, removed = sizes.get("n_layer", 0), int(match["removed"] or 0)
    if removed > layers:
        raise ConfigError(f"variant {variant!r} removes {removed} FFNs from a model of {layers} layers")
    return AeroConfig.checked(
        {
            "model_type": "aero",
            "norm": "layernorm" if match["ln"] else "none",
            "ffn": kind,
            "ffn_scaled": ffn.startswith("Sc"),
            "ffn_removed": list(range(layers - removed, layers)),
            "attn_temperature": bool(match["t"]),
            **sizes,
        },
        "variant " + variant,
    )


def load_ladder(directory: str | Path) -> tuple[AeroModel, AeroConfig, bytes | None]:
    """`load_checkpoint` for what knows the ladder's parts: ConfigError for a checkpoint of another family."""
    model, config, tokenizer = load_checkpoint(directory)
    if type(model) is not AeroModel or not isinstance(config, AeroConfig):
        raise ConfigError(f"{directory}: {config.model_type!r} is no model of the ladder", remedy="this takes 'gpt2' and 'aero'")
    return model, config, tokenizer
