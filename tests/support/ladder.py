"""Networks of the ladder with random weights, lowered, and private passes of them by parties in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from privinf.graph.private import Runtime, encode_weights, weights_of
from privinf.lowering import convert
from privinf.lowering.lowered import Lowered
from privinf.lowering.program import next_token
from privinf.models.aero import AeroModel
from privinf.models.base import Decoder
from privinf.models.checkpoint import save_checkpoint
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config
from protocols.party import Party
from tests.support.two_party import Outcome, Session, offline_walk

LADDER = ("SM+LN+G", "SM+LN+R", "SM+LN", "SM+G", "SM+R", "SM+ScFFN", "SM+ScFuFFN", "SM+ScFuFFN_i1", "SM(t)+ScFuFFN", "SM(t)+ScFuFFN_i1")
IDS = (5, 7, 200, 11, 3, 3, 9, 100, 42, 17, 0, 96)

LOGIT_ERROR = 0.02
"""How far a revealed logit of the tests' networks may be from float. Its rounding to units of 2^-10 takes 0.001 of it, and the rest is
0.005 at most in thousands of passes of them. Networks that enlarge what enters them have more: `python -m benchmarks errors`."""


def make(directory: Path, variant: str, outlier: float = 0.0, **sizes: int) -> tuple[Lowered, AeroModel]:
    """A lowered model with random weights that are large enough for every nonlinearity to matter."""
    values = {"n_layer": 2, "n_head": 2, "n_embd": 24, "vocab_size": 201, "n_positions": 16, **sizes}
    config = ladder_config(variant, **values)
    model = AeroModel(config)
    initialise(model, 3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "temperature" not in name:
                weight.mul_(2.5 if config.norm == "layernorm" else 1.5)
        model.wpe.weight[0, 3] += outlier
    save_checkpoint(model, config, directory, torch.float32)
    return convert(directory), model.eval()


def walker(lowered: Lowered, **session: Any) -> Callable[..., Outcome]:
    """`pass_(ids, logits=True, every=False)`, a pass at both parties of a session, with an empty cache; the options are a `Session`'s."""
    encoded = encode_weights(lowered.graph)
    weights = {name: (record, encoded[name]) for name, (record, _, _) in weights_of(lowered.graph).items()}
    made = Session(weights, **session)

    def pass_(ids: Sequence[int], *, logits: bool = True, every: bool = False) -> Outcome:
        def program(party: Party) -> torch.Tensor | None:
            known = not party.is_server and not offline_walk(party)
            tokens = torch.tensor([list(ids)])
            runtime, tokens = Runtime.of(lowered.graph, party), tokens if known else tokens.to("meta")
            return next_token(lowered.graph, runtime, tokens, logits=logits, every=every)

        return made.run(program)

    return pass_


def run(lowered: Lowered, ids: Sequence[int], *, logits: bool = True) -> Outcome:
    """One pass at both parties."""
    return walker(lowered)(ids, logits=logits)


def float_logits(model: Decoder, ids: Sequence[int]) -> torch.Tensor:
    """Of the last position, in float64, (V,)."""
    with torch.no_grad():
        found: torch.Tensor = model.double()(torch.tensor([list(ids)]))[0, -1]
    return found


def logit_error(lowered: Lowered, model: Decoder, ids: Sequence[int]) -> float:
    """The worst of one private pass."""
    return float((run(lowered, ids).client.reshape(-1) - float_logits(model, ids)).abs().max())
