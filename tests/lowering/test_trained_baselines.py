"""The ladder's baselines, trained for a minute: weights of a trained model's kind, with sharp attention, against float."""

from __future__ import annotations

import argparse
import tarfile
import typing
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from privinf.lowering import convert
from privinf.models.aero import AeroModel
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config
from tests.support.ladder import logit_error

LENGTH, STEPS, BATCH = 48, 300, 16
WITHIN = 0.05


def text() -> torch.Tensor:
    """Bytes of some modules of the standard library, as ids."""
    data = b"".join(Path(module.__file__).read_bytes() for module in (argparse, tarfile, typing))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long() % 127


def trained(directory: Path, variant: str) -> tuple[float, float]:
    """Writes a checkpoint of a byte model; the loss before and after, on what it was not trained on."""
    torch.set_num_threads(1)  # small products: threads would wait for each other
    config = ladder_config(variant, vocab_size=127, n_positions=LENGTH, n_embd=64, n_layer=3, n_head=4)
    model = AeroModel(config)
    initialise(model, 0)
    ids, generator = text(), torch.Generator().manual_seed(0)
    split = len(ids) * 9 // 10
    held_out = ids[split : split + LENGTH * 40].reshape(40, LENGTH)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    with torch.no_grad():
        before = float(loss(held_out))
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 30, 2 * (STEPS - step) / STEPS)
        starts = torch.randint(split - LENGTH, (BATCH, 1), generator=generator)
        optimiser.zero_grad()
        loss(ids[starts + torch.arange(LENGTH)]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        after = float(loss(held_out))
    save_checkpoint(model, config, directory, torch.float32)
    return before, after


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["SM+LN+G", "SM+LN+R"])
def test_a_trained_baseline(tmp_path: Path, variant: str) -> None:
    """As it is, and with what trained GPT-2s have in the residual stream: values of thousands in a few places of the first position."""
    before, after = trained(tmp_path, variant)
    assert after < before - 1.5, (before, after)
    ids, at = text(), 9 * len(text()) // 10
    for outlier in (0.0, 3000.0, -3000.0):
        model, config, _ = load_checkpoint(tmp_path)
        with torch.no_grad():
            model.wpe.weight[0, 5] += outlier
            model.wpe.weight[0, 40] += outlier / 4
        directory = tmp_path / f"outlier {outlier}"
        save_checkpoint(model, config, directory, torch.float32)
        lowered = convert(directory)
        for number, length in enumerate((1, 2, 7, 16, 33, LENGTH)):
            prompt = ids[at + 100 * number : at + 100 * number + length]
            error = logit_error(lowered, model, prompt.tolist())
            assert error < WITHIN, (variant, outlier, length, error)
