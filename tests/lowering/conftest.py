"""A lowered model that the tests of storage and bundle share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from privinf.lowering import Lowered, convert
from privinf.models.aero import AeroModel
from privinf.models.checkpoint import save_checkpoint
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config

VOCAB = 40


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A converted checkpoint with tied words, temperatures and a tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint")
    config = ladder_config("SM(t)+FuFFN", vocab_size=VOCAB, n_positions=12, n_embd=16, n_layer=2, n_head=4, eos_token_id=1)
    model = AeroModel(config)
    torch.manual_seed(0)
    initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.02)
    save_checkpoint(model, config, directory, torch.float32)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB - 1)} | {"[UNK]": VOCAB - 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return convert(directory)


@pytest.fixture
def saved(lowered: Lowered, tmp_path: Path) -> Path:
    lowered.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def crypten() -> Any:
    """Stock CrypTen, ready."""
    from privinf.crypten_adapter import crypten_module

    package = crypten_module()
    if not package.is_initialized():
        package.init()
    return package
