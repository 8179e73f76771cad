"""Max-plus products: private passes follow float, with a dealer and without, for what was predicted."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from privinf.lowering import convert
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.models.maxplus import MaxPlusModel
from privinf.training.families import built, first_weights, variant_config
from protocols.errors import ConfigError, RangeError
from tests.support.families import generation_follows, ladder_logits, learnt, pass_follows, refused, softmax_attention, two_alone_follow
from tests.support.ladder import IDS

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 201, "n_positions": 80}


def saved(directory: Path, variant: str, **fields: Any) -> Path:
    """A checkpoint with random weights."""
    config = variant_config("maxplus", variant, **{**SIZES, **fields})
    assert config.variant == variant
    model = built(config)
    first_weights(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.fill_(1.4 if name.endswith("alpha") else -0.8)
            elif parameter.dim() == 2:
                parameter.mul_(1.5)
    save_checkpoint(model, config, directory, torch.float32)
    return directory


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By its definition, one pair of positions after the other."""
    y = torch.full(v.shape, -math.inf, dtype=torch.float64)
    for i in range(len(q)):
        for j in range(i + 1):
            y[i] = torch.maximum(y[i], (q[i] + k[j]).max(-1).values[:, None] + v[j])
    return y


def reference(directory: Path, ids: list[int] | tuple[int, ...]) -> Tensor:
    """(T, V) in float64 from the file's tensors alone."""
    kind = json.loads((directory / "config.json").read_text())["attention"]
    return ladder_logits(directory, ids, attention if kind == "maxplus" else softmax_attention)


@pytest.mark.parametrize("variant", ["MP+MP", "SM+LN+MP", "MP+ScFuFFN"])
def test_a_private_pass_follows_float(tmp_path: Path, variant: str) -> None:
    """For what was predicted; the layer's own weight is in no set-up."""
    directory = saved(tmp_path, variant, n_positions=16)
    exact = reference(directory, IDS)
    with torch.no_grad():
        model = load_checkpoint(directory)[0]
        for found in (model(torch.tensor([IDS])), model.train()(torch.tensor([IDS])), model.folded()(torch.tensor([IDS]))):
            torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=1e-4)
    lowered = convert(directory)
    ops = {node.op for node in lowered.graph.nodes}
    assert ("max_plus" in ops, "max_plus_attention" in ops) == (variant.endswith("+MP"), variant.startswith("MP"))
    assert not any("max_plus" in name for name in lowered.setup.items)
    pass_follows(lowered, exact[-1])


@pytest.mark.parametrize("count", [20, pytest.param(64, marks=pytest.mark.slow)])
def test_cached_generation_follows_float(tmp_path: Path, count: int) -> None:
    directory = saved(tmp_path, "MP+MP", n_layer=1)
    generation_follows(convert(directory), partial(reference, directory), [5, 7, 2, 11, 3], count)


def test_two_parties_alone_generate_over_a_prompt_in_pieces(tmp_path: Path) -> None:
    directory = saved(tmp_path / "checkpoint", "MP+MP", n_layer=1)
    two_alone_follow(convert(directory), partial(reference, directory), [5, 7, 2, 11], tmp_path / "cache", chunk=3)


def test_it_learns_and_what_it_leaves_runs_privately(tmp_path: Path) -> None:
    model, _ = learnt(tmp_path, "maxplus", "MP+MP", 4.8)
    assert isinstance(model, MaxPlusModel)


def test_what_is_no_variant_is_told(tmp_path: Path) -> None:
    for variant, told in (("SM+LN", "none of maxplus's"), ("SM+FuFFN", "a network of the ladder"), ("MP(t)+MP", "none of maxplus's")):
        with pytest.raises(ConfigError, match=told):
            variant_config("maxplus", variant, **SIZES)
    directory = saved(tmp_path, "MP+MP", n_layer=1)
    refused(directory, "has none", attn_temperature=True)
    refused(directory, "ffn", ffn="gelu")
    refused(directory, "attention", attention="max")
    refused(directory, r"mlp\.tropical: shape \[16, 16\], expected \[7, 7\]", n_inner=7)


def test_sums_that_no_ring_compares_are_told(tmp_path: Path) -> None:
    directory = saved(tmp_path, "SM+MP", n_layer=1, n_positions=16)
    model, config, _ = load_checkpoint(directory)
    assert isinstance(model, MaxPlusModel)
    with torch.no_grad():
        model.get_parameter("h.0.mlp.tropical").mul_(1e5)
    save_checkpoint(model, config, directory, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="too large to be compared in 31 bits"):
        convert(directory)
