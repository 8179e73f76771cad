"""Families with a state are trained by the same verb: a variant learns, resumes, and its private pass follows float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from privinf.models.base import Activations
from privinf.models.recurrent import RecurrentModel
from privinf.models.ttt import TttModel
from privinf.ops.ttt import STEEPEST
from privinf.training.families import built, first_weights, variant_config
from privinf.training.objective import Objective
from privinf.training.recurrent import SETTLED, settle_keys
from privinf.training.settings import Settings
from protocols.errors import ConfigError
from tests.support.families import learnt

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 24, "vocab_size": 201, "n_positions": 16}


TRAINED_ERROR = 0.05  # of networks without a norm, whose logits reach 30 here: each layer is a product of three maps of the stream


@pytest.mark.parametrize(("family", "variant"), [("mamba2", "M2(fix)"), ("mamba2", "M2(sp)+Conv+RN+SiLU"), ("ttt", "TTT")])
def test_it_learns_and_resumes_and_what_it_leaves_runs_privately(tmp_path: Path, family: str, variant: str) -> None:
    model, _ = learnt(tmp_path, family, variant, 5.5, "--variant", variant, within=TRAINED_ERROR)
    assert isinstance(model, RecurrentModel)


@pytest.mark.parametrize(
    ("variant", "sizes", "told"),
    [
        ("M2(tanh)", {}, r"none of mamba2's; examples are M2\(sp\)"),
        ("M2(fix)", {"n_head": 5}, "twice 24 is not a multiple of --heads, 5"),
        ("M2(fix)", {"kv_heads": 2}, "these heads have no keys and values"),
    ],
)
def test_what_is_no_variant_is_told(variant: str, sizes: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        variant_config("mamba2", variant, **{**SIZES, **sizes})  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["M2(fix)", "M2(relu)"])
def test_first_weights_of_many_layers_without_a_norm_hold_the_stream(variant: str) -> None:
    """Each layer is a product of three maps of the stream, summed over what its heads remember: 128 positions here."""
    sizes = {"n_layer": 7, "n_head": 4, "n_embd": 64, "vocab_size": 201, "n_positions": 128}
    model = built(variant_config("mamba2", variant, **sizes))
    for seed in (1, 2):
        first_weights(model, seed)
        trace = Activations()
        with torch.no_grad():
            model(torch.randint(0, 201, (8, 128), generator=torch.Generator().manual_seed(seed)), trace=trace)
        assert max(float(x.abs().max()) for x in trace.residual) < 20
        assert float((trace.residual[-1] - trace.residual[0]).std()) > 0.02 * float(trace.residual[0].std())  # and layers are felt


def test_keys_that_are_too_large_are_brought_to_where_a_step_settles_and_others_are_left() -> None:
    model = built(variant_config("ttt", "TTT", **SIZES))
    assert isinstance(model, TttModel)
    first_weights(model, 1)
    ids = torch.arange(36).reshape(3, 12)
    k_proj = model.layers[0].learner.k_proj  # type: ignore[union-attr]
    with torch.no_grad():
        k_proj.weight[:6] *= 40  # type: ignore[index,operator]  # those of the first of four heads
        before = k_proj.weight.clone()  # type: ignore[operator,union-attr]
        settle_keys(model, ids)
        k = k_proj(model.embeddings(ids)).reshape(3, 12, 4, 6).transpose(1, 2)  # type: ignore[operator]
    steepest = torch.linalg.eigvalsh(k.mT @ k).amax(dim=(0, 2))  # no more than one mini-batch
    assert float(steepest[0]) == pytest.approx(SETTLED, rel=1e-4) and float(steepest[1:].max()) < SETTLED < STEEPEST
    assert torch.equal(k_proj.weight[6:], before[6:])  # type: ignore[index]


def test_penalties_on_rows_are_refused() -> None:
    model = built(variant_config("mamba2", "M2(fix)", **SIZES))
    for settings in (Settings(entropy_lambda=1e-5), Settings(row_weight=0.01)):
        with pytest.raises(ConfigError, match="no rows of scores"):
            Objective(model, settings, compile=False)
