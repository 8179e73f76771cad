"""Families with a state are trained by the same verb: a variant learns, resumes, and its private pass follows float."""

from __future__ import annotations

from pathlib import Path

import pytest

from privinf.models.recurrent import RecurrentModel
from privinf.training.families import built, variant_config
from privinf.training.objective import Objective
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


def test_penalties_on_rows_are_refused() -> None:
    model = built(variant_config("mamba2", "M2(fix)", **SIZES))
    for settings in (Settings(entropy_lambda=1e-5), Settings(row_weight=0.01)):
        with pytest.raises(ConfigError, match="no rows of scores"):
            Objective(model, settings, compile=False)
