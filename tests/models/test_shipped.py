"""The models that stand in the repository: together they stay small, and a private pass of the newest answers as float does."""

from __future__ import annotations

from pathlib import Path

import torch

from privinf.lowering import convert
from privinf.models.checkpoint import load_checkpoint, load_tokenizer
from tests.support.ladder import float_logits, walker

ROOT = Path(__file__).parents[2] / "models"
TEXT = "def main(argv=None):\n    parser = argparse.ArgumentParser(description=__doc__)\n    parser.add_argument("


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 25_000_000


def test_the_llama_answers_as_float_does() -> None:
    """On text, and on one token again and again; `pylib`, the one that an installation has, is run by many other tests."""
    directory = ROOT / "pylib-llama"
    model, config, tokenizer = load_checkpoint(directory)
    assert tokenizer is not None and config.variant == "SM+ScFuFFN"
    ids = load_tokenizer(tokenizer).encode(TEXT).ids
    pass_ = walker(convert(directory))
    for prompt in (ids, ids[:1] * 40):
        exact = float_logits(model, prompt)
        found = pass_(prompt).client.reshape(-1)
        assert float((found - exact).abs().max()) < 0.01
        assert int(found.argmax()) in torch.topk(exact, 2).indices  # the first, or one that is as good
