"""Weight and spectral normalisation of the FFN matrices: AERO's alternatives to the learnable scaling, gone once the model is exported.

Sources: Salimans and Kingma, "Weight Normalization" (arXiv 1602.07868); Miyato et al., "Spectral Normalization" (arXiv 1802.05957); both
as PyTorch has them.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Literal

import torch
from torch.nn.utils import parametrizations

from privinf.models.aero import AeroModel, Block
from privinf.models.recursive import RecursiveModel
from privinf.training.families import Trained
from protocols.errors import ConfigError


def normalise_ffns(model: Trained, kind: Literal["weight", "spectral"], seed: int) -> None:
    """Lets FFN matrices be learnt as length and direction per output (`weight`), or divided by the largest singular value (`spectral`)."""
    if not isinstance(model, AeroModel) or isinstance(model, RecursiveModel):
        raise ConfigError("--ffn-norm is for networks of the ladder", remedy="leave it out, or choose a scaled variant such as SM+ScGLU")
    for block in model.h:
        assert isinstance(block, Block)
        if block.mlp is None:
            continue
        for layer in (block.mlp.fused, block.mlp.c_fc, block.mlp.c_proj):
            if layer is None:
                continue
            if kind == "weight":
                parametrizations.weight_norm(layer, "weight", dim=1)  # matrices are laid (in, out)
            else:
                with torch.random.fork_rng(devices=[]):  # the first vector of the power iteration is drawn
                    torch.manual_seed(seed)
                    parametrizations.spectral_norm(layer, "weight")


@torch.no_grad()
def folded_norms(model: Trained) -> Trained:
    """The same function with plain matrices; the model itself if it has no normalised ones."""
    if not isinstance(model, AeroModel) or not any("parametrizations" in name for name, _ in model.named_parameters()):
        return model
    model.eval()  # the power iteration rests
    plain = type(model)(model.config)
    plain.load_state_dict({name: attrgetter(name)(model) for name in plain.state_dict()})
    return plain.eval()
