"""Rows of scores that an affine function of the layer's input brings into a range: the same function, without a maximum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.lowering.lowered import Lowered
from privinf.models.aero import AeroModel
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config
from privinf.training.rows import fit_offsets
from tests.support.alone import Alone
from tests.support.batches import Batches
from tests.support.ladder import IDS, LOGIT_ERROR, float_logits, run
from tests.support.two_party import Dealt

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 24, "vocab_size": 201, "n_positions": 16}


def far_apart(directory: Path, variant: str, *, offsets: bool) -> AeroModel:
    """A checkpoint whose keys have a large part in common, so that scores depend on their query more than on their key."""
    config = ladder_config(variant, **SIZES, attn_row_offset=offsets)
    model = AeroModel(config)
    initialise(model, 3)
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.bias[24:48] += (80 if config.norm == "layernorm" else 12) * torch.sign(torch.arange(24) % 5 - 1.5)  # type: ignore[union-attr, operator, index]
    if offsets:
        texts = torch.randint(201, (200, 16), generator=torch.Generator().manual_seed(1))
        fit_offsets(model, [texts], 0.0)
    save_checkpoint(model, config, directory, torch.float32)
    return model.eval()


def bounded(lowered: Lowered) -> list[bool]:
    return [node.plan.within is not None for node in lowered.graph.nodes if node.op == "attention"]


@pytest.mark.parametrize("variant", ["SM+LN+G", "SM(t)+ScFuFFN"])
def test_offsets_spare_the_maximum_and_change_no_logit(tmp_path: Path, variant: str) -> None:
    model, other = (far_apart(tmp_path / str(offsets), variant, offsets=offsets) for offsets in (False, True))
    plain, shifted = convert(tmp_path / "False"), convert(tmp_path / "True")
    assert bounded(plain) == [False, False] and bounded(shifted) == [True, True]
    expected = float_logits(model, IDS)
    assert (float_logits(other, IDS) - expected).abs().max() < 1e-9
    assert (float_logits(other.folded(), IDS) - expected).abs().max() < 1e-9
    outcome = run(shifted, IDS)
    assert float((outcome.client.reshape(-1) - expected).abs().max()) < LOGIT_ERROR
    online = outcome.counted["online"]
    assert (online["payload"], online["rounds"]) == (outcome.predicted.online_bytes, outcome.predicted.rounds)
    assert explain(shifted, 12)["total"]["rounds"] < explain(plain, 12)["total"]["rounds"]


@pytest.mark.parametrize("source", [Dealt, Alone])
def test_cached_tokens_pieces_and_batches_have_offsets(tmp_path: Path, source: type[Dealt] | type[Alone]) -> None:
    model = far_apart(tmp_path, "SM(t)+ScFuFFN", offsets=True)
    lowered = convert(tmp_path)
    batches, so_far = Batches(lowered, source=source), {0: [5, 7, 200, 11, 3], 1: [9]}
    steps = [so_far, {0: [4], 1: [8, 3, 3]}, {1: [2]}, {0: [1], 1: [6]}]
    for number, step in enumerate(steps):
        found = batches.step(step, logits=True)
        if number:
            so_far = {each: so_far[each] + step.get(each, []) for each in so_far}
        assert found.predicted.online_bytes == found.counted["online"]["payload"]
        expected = torch.stack([float_logits(model, so_far[each]) for each in step])
        assert float((found.client - expected).abs().max()) < LOGIT_ERROR


def test_a_layer_that_keeps_its_maximum_has_no_offsets(tmp_path: Path) -> None:
    """Where they do not bring the rows into a range their columns are left out, and the function is the same."""
    model = far_apart(tmp_path / "checkpoint", "SM(t)+ScFuFFN", offsets=True)
    with torch.no_grad():
        model.float().h[1].attn.row_offset.weight.mul_(-1)  # type: ignore[union-attr, operator]
    save_checkpoint(model, model.config, tmp_path / "other", torch.float32)
    lowered = convert(tmp_path / "other")
    assert bounded(lowered) == [True, False]
    kept = [node.row_offsets for node in lowered.graph.nodes if node.op == "attention"]
    widths = [lowered.graph.node(f"h.{layer}.attn.c_attn.linear").value("weight").shape[1] for layer in range(2)]
    assert kept == [True, False] and widths == [74, 72]
    assert float((run(lowered, IDS).client.reshape(-1) - float_logits(model, IDS)).abs().max()) < LOGIT_ERROR


def test_a_checkpoint_keeps_its_offsets_and_older_ones_have_none(tmp_path: Path) -> None:
    model = far_apart(tmp_path / "new", "SM(t)+ScFuFFN", offsets=True)
    loaded, config, _ = load_checkpoint(tmp_path / "new")
    assert torch.equal(loaded.get_parameter("h.1.attn.row_offset.weight"), model.get_parameter("h.1.attn.row_offset.weight"))
    assert '"attn_row_offset": true' in config.to_json()
    far_apart(tmp_path / "old", "SM(t)+ScFuFFN", offsets=False)
    assert "row_offset" not in (tmp_path / "old" / "config.json").read_text()
