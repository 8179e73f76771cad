"""Models of the ladder with random weights, small, and the shipped one's directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from privinf.models.aero import AeroModel
from privinf.training.ladder import ladder_config

SIZES: dict[str, Any] = {"vocab_size": 23, "n_positions": 12, "n_embd": 16, "n_layer": 3, "n_head": 4}
SHIPPED = Path(__file__).parents[2] / "models" / "pylib"
AERO: dict[str, Any] = SIZES | {"model_type": "aero", "norm": "none", "ffn": "fused", "ffn_scaled": True}
LADDER = [
    "SM+LN+G",
    "SM+LN+R",
    "SM+LN",
    "SM+G",
    "SM+R",
    "SM",
    "SM+ScFFN",
    "SM+ScFuFFN",
    "SM+ScFuFFN_i2",
    "SM(t)+ScFuFFN",
    "SM(t)+ScFuFFN_i3",
    "SM(t)+LN+ScG_i1",
]


def random_model(variant: str, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> AeroModel:
    """A model in which no weight is at its resting value."""
    torch.manual_seed(seed)
    model = AeroModel(ladder_config(variant, **(SIZES | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
            if name.endswith(("alpha", "temperature")):
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif name.endswith("beta") or (".ln_" in "." + name and name.endswith("weight")):
                parameter.copy_(0.7 + torch.rand_like(parameter) * 0.6)
    return model.to(dtype).requires_grad_(False).eval()


def some_ids(tokens: int = 9, batch: int = 2) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(5))
