"""Llama's kind is trained by the same verb: each variant learns, resumes, and its private pass follows float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from privinf.lowering import convert
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.models.llama import LlamaModel
from privinf.training.families import built, first_weights, variant_config
from protocols.errors import ConfigError
from tests.support.families import learnt, pass_follows
from tests.support.ladder import IDS

VARIANTS = ("SM+RN+SwiGLU", "SM+RN+GLU", "SM+ScGLU", "SM+RN+FuFFN", "SM+ScFuFFN")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_as_float_does(tmp_path: Path, variant: str) -> None:
    """With scalars that are not 1; with a dealer and without, for what was predicted."""
    config = variant_config("llama", variant, n_layer=2, n_head=4, kv_heads=2, n_embd=24, vocab_size=201, n_positions=16)
    assert config.variant == variant
    model = built(config)
    first_weights(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.fill_(1.4 if name.endswith("alpha") else -0.8)
            elif parameter.dim() == 2:
                parameter.mul_(5 if config.norm == "rmsnorm" else 1.5)
    save_checkpoint(model, config, tmp_path / "checkpoint", torch.float32)
    lowered = convert(tmp_path / "checkpoint")
    ops = {node.op for node in lowered.graph.nodes}
    assert ({"rms_norm"} <= ops, {"silu"} <= ops, {"mul"} <= ops) == ("+RN" in variant, "SwiGLU" in variant, "GLU" in variant)
    exact = load_checkpoint(tmp_path / "checkpoint")[0].double()(torch.tensor([IDS]))[0, -1]

    pass_follows(lowered, exact)


@pytest.mark.parametrize("variant", ["SM+RN+SwiGLU", "SM+ScFuFFN"])
def test_it_learns_and_resumes_and_what_it_leaves_runs_privately(tmp_path: Path, variant: str) -> None:
    model, _ = learnt(tmp_path, "llama", variant, 4.5, "--variant", variant, "--kv-heads", "1")
    assert isinstance(model, LlamaModel)


@pytest.mark.parametrize(
    ("family", "variant", "sizes", "told"),
    [
        ("llama", "SM+LN+G", {}, "none of llama's; examples are SM"),
        ("aero", "SM+RN+SwiGLU", {}, "not on the ladder"),
        ("llama", "SM+RN+GLU", {"n_embd": 22}, "22 is not an even multiple of --heads, 4"),
        ("llama", "SM+RN+GLU", {"kv_heads": 3}, "4 heads cannot share 3"),
        ("aero", "SM+LN+G", {"kv_heads": 2}, "keys and values of their own"),
    ],
)
def test_what_is_no_variant_is_told(family: str, variant: str, sizes: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        variant_config(family, variant, **{"n_layer": 2, "n_head": 4, "n_embd": 24, "vocab_size": 201, "n_positions": 16, **sizes})  # type: ignore[arg-type]
