"""Logits of every position: each family's private pass follows float at all of them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.models.checkpoint import save_checkpoint
from privinf.training.families import USUAL, FamilyName, built, first_weights, variant_config
from tests.support.ladder import LOGIT_ERROR, walker

IDS = (5, 7, 200, 11, 3, 3, 9)


@pytest.mark.parametrize("family", get_args(FamilyName))
def test_every_position_follows_float(tmp_path: Path, family: FamilyName) -> None:
    layers = 3 if family == "recursive" else 2  # one block, three times
    config = variant_config(family, USUAL[family], n_layer=layers, n_head=2, n_embd=16, vocab_size=201, n_positions=32)
    model = built(config)
    first_weights(model, 3)
    save_checkpoint(model, config, tmp_path, torch.float32)
    lowered = convert(tmp_path)
    found = walker(lowered)(IDS, every=True).client
    with torch.no_grad():
        want = model.eval().double()(torch.tensor([list(IDS)]))[0]
    assert found.shape == want.shape == (len(IDS), 201) and float((found - want).abs().max()) < LOGIT_ERROR
    last = walker(lowered)(IDS).client
    assert float((last - found[-1:]).abs().max()) < LOGIT_ERROR
    all_of_them, one = (explain(lowered, len(IDS), logits=True, scores=scores)["total"] for scores in (True, False))
    assert all_of_them["online_bytes"] > one["online_bytes"] and all_of_them["macs"] > one["macs"]
