"""A tiny model for tests: its checkpoint, its lowering, and what float says to a prompt."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from privinf.lowering import convert
from privinf.lowering.lowered import Lowered
from privinf.models.aero import AeroModel
from privinf.models.base import Decoder
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.training.ladder import ladder_config
from tests.support.ladder import LOGIT_ERROR

VOCAB, POSITIONS, END = 97, 32, 95
CLEAR = 2 * LOGIT_ERROR
"""The margin between the two best logits above which the private token must be float's."""


@functools.cache
def scratch() -> Path:
    """A directory of this test process."""
    directory = Path(tempfile.mkdtemp(prefix="privinf-tests-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a fork
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    return directory


def tokenizer() -> Tokenizer:
    """One token for each printable character of ASCII, an end token and an unknown one."""
    vocabulary = {chr(code): code - 32 for code in range(32, 127)}
    made = Tokenizer(models.BPE({**vocabulary, "<|end|>": END, "<unk>": 96}, [], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<|end|>", "<unk>"])
    return made


@functools.cache
def checkpoint(seed: int = 0, texts: bool = True, nudge: float = 0.0) -> Path:
    """Two layers of width 32 with random weights, logits up to 30; with `nudge` every weight is a little larger, and no range much."""
    directory = scratch() / f"checkpoint-{seed}-{texts}-{nudge}"
    generator = torch.Generator().manual_seed(seed + 2)
    config = ladder_config(
        "SM(t)+ScFuFFN", vocab_size=VOCAB, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=2, eos_token_id=END if texts else None
    )
    model = AeroModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = (0.5 if name.endswith("wpe.weight") else 0.22) * torch.randn(parameter.shape, generator=generator)
            if name.endswith(("alpha", "beta", "temperature")):
                drawn = 0.5 + torch.rand(parameter.shape, generator=generator)
            parameter.copy_(drawn * (1 + nudge))
    save_checkpoint(model, config, directory)
    if texts:
        tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@functools.cache
def lowered(seed: int = 0, texts: bool = True, nudge: float = 0.0) -> Lowered:
    """The same, lowered."""
    return convert(checkpoint(seed, texts, nudge))


def changed(model: Lowered, tokenizer: bytes | None = None, **info: Any) -> Lowered:
    """The same lowering, of which something else is said: another model, since its id covers what is public."""
    kept = {name: getattr(model, name) for name in ("setup", "plan", "ranges", "mask_seed", "headroom")}
    return Lowered(model.graph, msgspec.structs.replace(model.info, **info), tokenizer=tokenizer or model.tokenizer, **kept)


@functools.cache
def lowered_directory() -> Path:
    """The first of them, as a directory."""
    directory = scratch() / "lowered"
    lowered().save(directory)
    return directory


@functools.cache
def float_model(seed: int = 0, texts: bool = True) -> Decoder:
    """The float model of the checkpoint."""
    return load_checkpoint(checkpoint(seed, texts))[0]


def float_logits(ids: list[int], seed: int = 0, texts: bool = True) -> Tensor:
    """Of the last position, by a whole pass."""
    with torch.no_grad():
        found: Tensor = float_model(seed, texts)(torch.tensor([ids]))[0, -1]
    return found


def is_greedy(prompt: list[int], tokens: list[int], seed: int = 0, texts: bool = True) -> bool:
    """Whether each token is float's best after those before it, or within the margin of it."""
    for done, token in enumerate(tokens):
        logits = float_logits(prompt + tokens[:done], seed, texts)
        if float(logits.max() - logits[token]) > CLEAR:
            return False
    return True
