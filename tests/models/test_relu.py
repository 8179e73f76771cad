"""Attention with ReLU in place of the softmax: private passes follow float, for what was predicted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from privinf.lowering import convert
from privinf.lowering.calibrate import beyond
from privinf.lowering.explain import explain
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.models.relu import ReluModel
from privinf.training.families import built, first_weights, variant_config
from privinf.training.ladder import load_ladder
from protocols.errors import ConfigError, RangeError
from tests.support.alone import Alone
from tests.support.batches import Batches
from tests.support.families import generation_follows, ladder_logits, learnt, pass_follows, refused, two_alone_follow, worst
from tests.support.ladder import IDS, LOGIT_ERROR, run
from tests.support.two_party import Dealt

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 24, "vocab_size": 201, "n_positions": 80}


def saved(directory: Path, variant: str, **fields: Any) -> Path:
    """A checkpoint with random weights that are large enough for every ReLU to matter."""
    config = variant_config("relu", variant, **{**SIZES, **fields})
    assert config.variant == variant
    model = built(config)
    first_weights(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.fill_(1.4 if name.endswith("alpha") else -0.8)
            elif parameter.dim() == 2:
                parameter.mul_(2.5 if config.norm == "layernorm" else 1.5)
    save_checkpoint(model, config, directory, torch.float32)
    return directory


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By its definition, one pair of positions after the other."""
    y = torch.zeros_like(v)
    for i in range(len(q)):
        for j in range(i + 1):
            y[i] += (q[i] * k[j]).sum(-1).relu()[:, None] * v[j] / (i + 1)
    return y


def reference(directory: Path, ids: list[int] | tuple[int, ...]) -> Tensor:
    """(T, V) in float64 from the file's tensors alone."""
    return ladder_logits(directory, ids, attention)


@pytest.mark.parametrize("variant", ["RA+FuFFN", "RA+ScFuFFN", "RA+R", "RA+LN+R"])
def test_a_private_pass_follows_float(tmp_path: Path, variant: str) -> None:
    """For what was predicted, with a dealer and without."""
    directory = saved(tmp_path, variant, n_positions=16)
    exact = reference(directory, IDS)
    with torch.no_grad():
        model = load_checkpoint(directory)[0]
        for found in (model(torch.tensor([IDS])), model.train()(torch.tensor([IDS])), model.folded()(torch.tensor([IDS]))):
            torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=1e-4)
    lowered = convert(directory)
    ops = {node.op for node in lowered.graph.nodes}
    assert ops.isdisjoint({"attention", "softmax"}) and ops >= {"relu_attention"} and ("relu" in ops) == variant.endswith("+R")
    pass_follows(lowered, exact[-1])


@pytest.mark.parametrize("count", [20, pytest.param(64, marks=pytest.mark.slow)])
def test_cached_generation_follows_float(tmp_path: Path, count: int) -> None:
    """Token by token, rows filled up and replayed ones among them: each is divided by its real length."""
    directory = saved(tmp_path, "RA+ScFuFFN")
    generation_follows(convert(directory), partial(reference, directory), [5, 7, 2, 11, 3], count)


def test_several_sequences_in_a_pass(tmp_path: Path) -> None:
    directory = saved(tmp_path, "RA+FuFFN", n_positions=16)
    lowered = convert(directory)
    for source, fills in ((Dealt, 0), (Alone, 0), (Dealt, 16)):
        batches, so_far = Batches(lowered, source=source, fills=fills), dict[int, list[int]]()
        for new in ({0: [5, 7, 2, 11, 3], 1: [9]}, {1: [4, 1], 0: [8]}, *([{0: [1], 1: [2]}, {0: [3], 1: [6]}] if fills else [])):
            found = batches.step(new, logits=True)
            so_far = {number: so_far.get(number, []) + ids for number, ids in new.items()}
            assert found.predicted.online_bytes == found.counted["online"]["payload"]
            exact = torch.stack([reference(directory, so_far[number])[-1] for number in new])
            assert float((found.client - exact).abs().max()) < LOGIT_ERROR


def test_small_weights_have_rings_too(tmp_path: Path) -> None:
    """Scores far below one, as those of a network before its first step or of a layer that does nothing."""
    directory = saved(tmp_path, "RA+LN+R", n_layer=1)
    model, config, _ = load_checkpoint(directory)
    for parameter in model.parameters():
        parameter.mul_(1e-3)
    save_checkpoint(model, config, directory, torch.float32)
    assert worst(run(convert(directory), IDS).client, reference(directory, IDS)[-1]) < LOGIT_ERROR


def test_one_token_again_and_again(tmp_path: Path) -> None:
    """An end token, of which no text has two in a row and a padded prompt has many: what it adds stays, and is planned for."""
    directory = saved(tmp_path, "RA+FuFFN", eos_token_id=9)
    model, config, _ = load_checkpoint(directory)
    assert isinstance(model, ReluModel)
    model.wte.weight[9].mul_(4)
    save_checkpoint(model, config, directory, torch.float32)
    lowered, ids = convert(directory), [9] * 40
    assert not beyond(lowered.graph, lowered.ranges, [torch.tensor([ids])])
    exact = reference(directory, ids)[-1]
    assert worst(run(lowered, ids).client, exact) < LOGIT_ERROR * max(1.0, float(exact.abs().max()) / 30)


def test_two_parties_alone_generate(tmp_path: Path) -> None:
    directory = saved(tmp_path / "checkpoint", "RA+FuFFN", n_layer=1)
    two_alone_follow(convert(directory), partial(reference, directory), [5, 7, 2], tmp_path / "cache")


def test_it_takes_fewer_bytes_than_a_softmax(tmp_path: Path) -> None:
    """The same weights in both."""
    lowered = convert(saved(tmp_path / "relu", "RA+FuFFN", n_positions=64))
    config = variant_config("aero", "SM+FuFFN", **{**SIZES, "n_positions": 64})
    model = built(config)
    model.load_state_dict(load_checkpoint(tmp_path / "relu")[0].state_dict())
    save_checkpoint(model, config, tmp_path / "softmax", torch.float32)
    mine, theirs = (explain(each, 64)["total"] for each in (lowered, convert(tmp_path / "softmax")))
    for name in ("online_bytes", "dealer_bytes"):
        assert mine[name] < theirs[name]


def test_it_learns_and_what_it_leaves_runs_privately(tmp_path: Path) -> None:
    model, _ = learnt(tmp_path, "relu", "RA+ScFuFFN", 4.8)
    assert isinstance(model, ReluModel)
    with pytest.raises(ConfigError, match="'relu' is no model of the ladder"):
        load_ladder(tmp_path / "run" / "checkpoint")


def test_what_is_no_variant_is_told(tmp_path: Path) -> None:
    for variant, told in (
        ("SM+LN", "none of relu's; examples are RA"),
        ("RA(t)+FuFFN", "attn_temperature: .* has none"),
        ("RA+X", "not on"),
    ):
        with pytest.raises(ConfigError, match=told):
            variant_config("relu", variant, **SIZES)
    directory = saved(tmp_path, "RA+FuFFN", n_layer=1)
    refused(directory, "has none", attn_temperature=True)
    refused(directory, "ffn", ffn="maybe")
    refused(directory, "did you mean n_head", n_heads=2)


def test_scores_that_no_ring_compares_are_told(tmp_path: Path) -> None:
    directory = saved(tmp_path, "RA+LN+R", n_layer=1, n_positions=16)
    model, config, _ = load_checkpoint(directory)
    assert isinstance(model, ReluModel)
    with torch.no_grad():
        model.get_parameter("h.0.attn.c_attn.weight").mul_(3e4)
    save_checkpoint(model, config, directory, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match=r"attention scores up to .* too large to be compared|do not fit a ring"):
        convert(directory)
