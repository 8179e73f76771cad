"""Llama's kind is trained by the same verb: each variant learns, resumes, and its private pass follows float."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from privinf.cli.train import train
from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.models.llama import LlamaModel
from privinf.training.families import built, first_weights, variant_config
from protocols.errors import ConfigError
from tests.support.alone import Alone
from tests.support.ladder import LOGIT_ERROR, run, walker
from tests.support.training import SMALL_RUN

VARIANTS = ("SM+RN+SwiGLU", "SM+RN+GLU", "SM+ScGLU", "SM+RN+FuFFN", "SM+ScFuFFN")
IDS = (5, 7, 200, 11, 3, 3, 9, 100, 42, 17, 0, 96)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_as_float_does(tmp_path: Path, variant: str) -> None:
    """With scalars that are not 1; with a dealer and without, for what was predicted."""
    config = variant_config("llama", variant, n_layer=2, n_head=4, kv_heads=2, n_embd=24, vocab_size=201, n_positions=16)
    assert config.variant == variant
    model = built(config)
    first_weights(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.fill_(1.4 if name.endswith("alpha") else -0.8)
            elif parameter.dim() == 2:
                parameter.mul_(5 if config.norm == "rmsnorm" else 1.5)
    save_checkpoint(model, config, tmp_path / "checkpoint", torch.float32)
    lowered, sources = convert(tmp_path / "checkpoint"), list[Alone]()
    ops = {node.op for node in lowered.graph.nodes}
    assert ({"rms_norm"} <= ops, {"silu"} <= ops, {"mul"} <= ops) == ("+RN" in variant, "SwiGLU" in variant, "GLU" in variant)
    exact = load_checkpoint(tmp_path / "checkpoint")[0].double()(torch.tensor([IDS]))[0, -1]

    def source(weights: object, device: str) -> Alone:
        sources.append(Alone(weights, device))  # type: ignore[arg-type]
        return sources[0]

    outcome, alone = run(lowered, IDS), walker(lowered, source=source)(IDS)
    for found in (outcome, alone):
        assert float((found.client - exact).abs().max()) < LOGIT_ERROR
    assert alone.counted["online"]["payload"] == alone.predicted.online_bytes
    total = explain(lowered, len(IDS), logits=True)["total"]
    assert (outcome.counted["online"]["payload"], outcome.counted["online"]["rounds"]) == (total["online_bytes"], total["rounds"])


@pytest.mark.parametrize("variant", ["SM+RN+SwiGLU", "SM+ScFuFFN"])
def test_it_learns_and_resumes_and_what_it_leaves_runs_privately(tmp_path: Path, variant: str) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for n in range(20):
        (text / f"m{n}.py").write_text(f"def area_{n}(width, height):\n    return width * height + {n}\n" * 30)
    app = typer.Typer()
    app.command()(train)
    words = ["-o", str(tmp_path / "run"), "--corpus", str(text), "--family", "llama", "--variant", variant, *SMALL_RUN, "--kv-heads", "1"]
    for steps in (20, 40):
        found = CliRunner().invoke(app, [*words, "--steps", str(steps)])
        assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["steps"] == 40 and result["variant"] == variant and result["held_out_loss"] < 4.5  # guessing evenly: 5.7
    model, config, tokenizer = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert isinstance(model, LlamaModel) and tokenizer is not None and config.model_type == "llama"
    ids = list(range(3, 15))
    exact = model(torch.tensor([ids]))[0, -1]
    assert float((run(convert(tmp_path / "run" / "checkpoint"), ids).client - exact).abs().max()) < LOGIT_ERROR


@pytest.mark.parametrize(
    ("family", "variant", "sizes", "told"),
    [
        ("llama", "SM+LN+G", {}, "none of llama's; examples are SM"),
        ("aero", "SM+RN+SwiGLU", {}, "not on the ladder"),
        ("llama", "SM+RN+GLU", {"n_embd": 22}, "22 is not an even multiple of --heads, 4"),
        ("llama", "SM+RN+GLU", {"kv_heads": 3}, "4 heads cannot share 3"),
        ("aero", "SM+LN+G", {"kv_heads": 2}, "keys and values of their own"),
    ],
)
def test_what_is_no_variant_is_told(family: str, variant: str, sizes: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        variant_config(family, variant, **{"n_layer": 2, "n_head": 4, "n_embd": 24, "vocab_size": 201, "n_positions": 16, **sizes})  # type: ignore[arg-type]
