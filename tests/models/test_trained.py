"""A network of each family, trained on real text for a minute or two: passes and 64 cached tokens stay near float."""

from __future__ import annotations

import argparse
import tarfile
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from privinf.lowering import convert
from privinf.models.checkpoint import load_checkpoint, load_tokenizer
from tests.support.families import generation_follows, trained, worst
from tests.support.ladder import walker

MODULES = (argparse, tarfile, typing)
SIZES = ["--layers", "3", "--heads", "4", "--width", "64", "--positions", "80", "--vocab", "300", "--batch", "8", "--steps", "400"]
RUN = [*SIZES, "--threads", "1", "--warmup", "30", "--json"]
WITHIN = 0.05
TOKENS = 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("aero", "SM(t)+ScFuFFN"),
        ("llama", "SM+RN+SwiGLU"),
        ("llama", "SM+ScFuFFN"),
        ("recursive", "SM+FuFFN"),
        ("relu", "RA+LN+R"),
        ("relu", "RA+ScFuFFN"),
        ("maxplus", "MP+MP"),
        ("mamba2", "M2(relu)"),
        ("mamba2", "M2(sp)+Conv+RN+SiLU"),
        ("ttt", "TTT+RN+SwiGLU"),
        ("ttt", "TTT"),
    ],
)
def test_a_trained_network_follows_float(tmp_path: Path, family: str, variant: str) -> None:
    """At every position of prompts of text, and token by token over what is kept."""
    text = tmp_path / "text"
    text.mkdir()
    for module in MODULES:
        (text / f"{module.__name__}.py").write_text(Path(str(module.__file__)).read_text())
    small = ["--width", "32"] if family == "maxplus" else []  # it takes ten times as long
    result = trained(tmp_path / "run", "--corpus", str(text), "--family", family, "--variant", variant, *RUN, *small)
    assert result["held_out_loss"] < 4.0  # guessing evenly: 5.7
    directory = tmp_path / "run" / "checkpoint"
    model, _, _ = load_checkpoint(directory)
    model.double()

    def exact(ids: list[int]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([ids]))[0]
        return logits

    lowered = convert(directory)
    assert lowered.tokenizer is not None
    ids = load_tokenizer(lowered.tokenizer).encode((text / "typing.py").read_text()[:2000]).ids
    pass_ = walker(lowered)
    for number, length in enumerate((1, 7, 33, 80)):
        prompt = ids[60 * number : 60 * number + length]
        assert worst(pass_(prompt, every=True).client, exact(prompt)) < WITHIN, length
    generation_follows(lowered, exact, ids[:12], TOKENS, within=WITHIN)
