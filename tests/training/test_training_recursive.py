"""Blocks in loops are trained by the same verb: they learn, resume, and what is left runs privately."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from privinf.models.recursive import RecursiveModel
from privinf.training.families import built, first_weights, variant_config
from protocols.errors import ConfigError
from tests.support.families import learnt

SIZES: dict[str, Any] = {"n_layer": 6, "n_head": 2, "n_embd": 24, "vocab_size": 201, "n_positions": 16}


def test_they_learn_and_resume_and_what_is_left_runs_privately(tmp_path: Path) -> None:
    model, config = learnt(tmp_path, "recursive", "SM+FuFFN_x3_r2", 4.8, "--layers", "3", "--rank", "2")
    assert isinstance(model, RecursiveModel) and (config.n_layer, model.config.blocks) == (3, 1)
    ups = [parameter for name, parameter in model.named_parameters() if name.endswith(".up")]
    assert len(ups) == 9 and all(float(up.abs().max()) > 0 for up in ups)  # every loop has become another


def test_all_loops_begin_alike() -> None:
    """A drawn network is what it would be without its differences."""
    models = []
    for rank in (0, 2):
        models.append(built(variant_config("recursive", "SM+FuFFN", loops=3, rank=rank, **SIZES)))
        first_weights(models[-1], 3)
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(models[0](ids), models[1](ids))


@pytest.mark.parametrize(
    ("family", "variant", "sizes", "told"),
    [
        ("recursive", "SM+RN+SwiGLU", {}, "not on the ladder"),
        ("recursive", "SM+ScFuFFN", {}, "ffn_scaled: a scale of the residual"),
        ("recursive", "SM+LN", {}, "loops take 'gelu', 'relu' or 'fused'"),
        ("recursive", "SM+FuFFN_i1", {}, "in every block"),
        ("recursive", "SM+FuFFN", {"loops": 4}, "6 layers are not 4 times"),
        ("recursive", "SM+FuFFN", {"kv_heads": 2}, "keys and values of their own"),
        ("aero", "SM+FuFFN", {"loops": 3}, "--loops and --rank: blocks of this family run once"),
        ("llama", "SM+RN+GLU", {"rank": 0}, "--loops and --rank"),
    ],
)
def test_what_is_no_variant_is_told(family: Any, variant: str, sizes: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        variant_config(family, variant, **{**SIZES, **sizes})
