"""Attention with ReLU in place of the softmax: private passes follow float, for what was predicted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from privinf.cli.train import train
from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.models.relu import ReluModel
from privinf.training.families import built, first_weights, variant_config
from privinf.training.ladder import load_ladder
from protocols.errors import ConfigError, RangeError
from tests.support.alone import Alone
from tests.support.batches import Batches
from tests.support.duo import duo
from tests.support.ladder import IDS, LOGIT_ERROR, run, walker
from tests.support.training import SMALL_RUN
from tests.support.trio import trio
from tests.support.two_party import Dealt, Weights

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 24, "vocab_size": 201, "n_positions": 80}


def saved(directory: Path, variant: str, **fields: Any) -> Path:
    """A checkpoint with random weights that are large enough for every ReLU to matter."""
    config = variant_config("relu", variant, **{**SIZES, **fields})
    assert config.variant == variant
    model = built(config)
    first_weights(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.fill_(1.4 if name.endswith("alpha") else -0.8)
            elif parameter.dim() == 2:
                parameter.mul_(2.5 if config.norm == "layernorm" else 1.5)
    save_checkpoint(model, config, directory, torch.float32)
    return directory


def reference(directory: Path, ids: list[int] | tuple[int, ...]) -> Tensor:
    """(T, V) in float64 from the file's tensors alone, one position after the other."""
    w, fields = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    w = {name: tensor.double() for name, tensor in w.items()}
    heads, count = fields["n_head"], len(ids)
    x = w["wte.weight"][list(ids)] + w["wpe.weight"][:count]
    width = x.shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        if fields["norm"] == "none":
            return x
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def apply(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    for layer in range(fields["n_layer"]):
        qkv = apply(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").reshape(count, 3, heads, width // heads)
        y = torch.zeros(count, heads, width // heads, dtype=torch.float64)
        for i in range(count):
            for j in range(i + 1):
                score = (qkv[i, 0] * qkv[j, 1]).sum(-1) / math.sqrt(width // heads)  # (H,)
                y[i] += score.relu()[:, None] * qkv[j, 2] / (i + 1)
        x = x + apply(y.reshape(count, width), f"h.{layer}.attn.c_proj")
        y = norm(x, f"h.{layer}.ln_2")
        y = apply(y, f"h.{layer}.mlp.fused") if fields["ffn"] == "fused" else apply(y, f"h.{layer}.mlp.c_fc")
        if fields["ffn"] != "fused":
            y = apply(y.relu() if fields["ffn"] == "relu" else y, f"h.{layer}.mlp.c_proj")
        alpha, beta = (w.get(f"h.{layer}.mlp.{name}", torch.tensor(1.0)) for name in ("alpha", "beta"))
        x = beta * x + y / alpha
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T


@pytest.mark.parametrize("variant", ["RA+FuFFN", "RA+ScFuFFN", "RA+R", "RA+LN+R"])
def test_a_private_pass_follows_float(tmp_path: Path, variant: str) -> None:
    """For what was predicted, with a dealer and without."""
    directory = saved(tmp_path, variant, n_positions=16)
    exact = reference(directory, IDS)
    with torch.no_grad():
        model = load_checkpoint(directory)[0]
        for found in (model(torch.tensor([IDS])), model.train()(torch.tensor([IDS])), model.folded()(torch.tensor([IDS]))):
            torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=1e-4)
    lowered, sources = convert(directory), list[Alone]()
    ops = {node.op for node in lowered.graph.nodes}
    assert ops.isdisjoint({"attention", "softmax"}) and ops >= {"relu_attention"} and ("relu" in ops) == variant.endswith("+R")

    def source(weights: Weights, device: str) -> Alone:
        sources.append(Alone(weights, device))
        return sources[0]

    outcome, alone = walker(lowered)(IDS), walker(lowered, source=source)(IDS)
    for each in (outcome, alone):
        assert float((each.client - exact[-1]).abs().max()) < LOGIT_ERROR
    assert alone.counted["online"]["payload"] == alone.predicted.online_bytes
    assert alone.counted["offline"]["payload"] == alone.predicted.peer_offline_bytes + sources[0].predicted[0][0]
    total = explain(lowered, len(IDS), logits=True)["total"]
    assert (outcome.counted["online"]["payload"], outcome.counted["online"]["rounds"]) == (total["online_bytes"], total["rounds"])


@pytest.mark.parametrize("count", [20, pytest.param(64, marks=pytest.mark.slow)])
def test_cached_generation_follows_float(tmp_path: Path, count: int) -> None:
    """Token by token, rows filled up and replayed ones among them: each is divided by its real length."""
    directory, prompt = saved(tmp_path / "checkpoint", "RA+ScFuFFN"), [5, 7, 2, 11, 3]
    lowered = convert(directory)
    with trio(lowered) as parties, parties.client(fresh=True) as client:
        tokens = [token.id for token in client.generate(ids=prompt, max_new_tokens=count, logits=True, ignore_eos=True)]
        logits, result = client.logits, client.result
    assert result is not None and len(tokens) == count
    exact = reference(directory, prompt + tokens[:-1])[len(prompt) - 1 :]
    assert float((torch.stack(logits).reshape(count, -1) - exact).abs().max()) < LOGIT_ERROR
    assert float((exact.amax(-1) - exact[torch.arange(count), tokens]).max()) < 2 * LOGIT_ERROR
    total = explain(lowered, len(prompt), new_tokens=count, logits=True)["total"]
    assert (total["online_bytes"], total["rounds"]) == (result["traffic"]["online"]["payload"], result["traffic"]["online"]["rounds"])


def test_several_sequences_in_a_pass(tmp_path: Path) -> None:
    directory = saved(tmp_path, "RA+FuFFN", n_positions=16)
    lowered = convert(directory)
    for source, fills in ((Dealt, 0), (Alone, 0), (Dealt, 16)):
        batches, so_far = Batches(lowered, source=source, fills=fills), dict[int, list[int]]()
        for new in ({0: [5, 7, 2, 11, 3], 1: [9]}, {1: [4, 1], 0: [8]}, *([{0: [1], 1: [2]}, {0: [3], 1: [6]}] if fills else [])):
            found = batches.step(new, logits=True)
            so_far = {number: so_far.get(number, []) + ids for number, ids in new.items()}
            assert found.predicted.online_bytes == found.counted["online"]["payload"]
            exact = torch.stack([reference(directory, so_far[number])[-1] for number in new])
            assert float((found.client - exact).abs().max()) < LOGIT_ERROR


def test_two_parties_alone_generate(tmp_path: Path) -> None:
    directory = saved(tmp_path / "checkpoint", "RA+FuFFN", n_layer=1)
    with duo(convert(directory), cache=tmp_path / "cache") as pair, pair.client(fresh=True) as client:
        tokens = [token.id for token in client.generate(ids=[5, 7, 2], max_new_tokens=3, logits=True, ignore_eos=True)]
        found = torch.stack(client.logits).reshape(3, -1)
    assert float((found - reference(directory, [5, 7, 2, *tokens[:-1]])[2:]).abs().max()) < LOGIT_ERROR


def test_it_takes_fewer_bytes_than_a_softmax(tmp_path: Path) -> None:
    """The same weights in both."""
    lowered = convert(saved(tmp_path / "relu", "RA+FuFFN", n_positions=64))
    config = variant_config("aero", "SM+FuFFN", **{**SIZES, "n_positions": 64})
    model = built(config)
    model.load_state_dict(load_checkpoint(tmp_path / "relu")[0].state_dict())
    save_checkpoint(model, config, tmp_path / "softmax", torch.float32)
    mine, theirs = (explain(each, 64)["total"] for each in (lowered, convert(tmp_path / "softmax")))
    for name in ("online_bytes", "dealer_bytes"):
        assert mine[name] < theirs[name]


def test_it_learns_and_what_it_leaves_runs_privately(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for n in range(20):
        (text / f"m{n}.py").write_text(f"def area_{n}(width, height):\n    return width * height + {n}\n" * 30)
    app = typer.Typer()
    app.command()(train)
    words = ["-o", str(tmp_path / "run"), "--corpus", str(text), "--family", "relu", *SMALL_RUN]
    for steps in (20, 40):
        found = CliRunner().invoke(app, [*words, "--steps", str(steps)])
        assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["variant"] == "RA+ScFuFFN" and result["held_out_loss"] < 4.8  # guessing evenly: 5.7
    model, _, _ = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert isinstance(model, ReluModel)
    ids = list(range(3, 15))
    exact = model(torch.tensor([ids]))[0, -1]
    assert float((run(convert(tmp_path / "run" / "checkpoint"), ids).client - exact).abs().max()) < LOGIT_ERROR
    with pytest.raises(ConfigError, match="'relu' is no model of the ladder"):
        load_ladder(tmp_path / "run" / "checkpoint")


def test_what_is_no_variant_is_told(tmp_path: Path) -> None:
    for variant, told in (
        ("SM+LN", "none of relu's; examples are RA"),
        ("RA(t)+FuFFN", "attn_temperature: .* has none"),
        ("RA+X", "not on"),
    ):
        with pytest.raises(ConfigError, match=told):
            variant_config("relu", variant, **SIZES)
    directory = saved(tmp_path, "RA+FuFFN", n_layer=1)
    config = json.loads((directory / "config.json").read_text())
    for changes, told in (({"attn_temperature": True}, "has none"), ({"ffn": "maybe"}, "ffn"), ({"n_heads": 2}, "did you mean n_head")):
        (directory / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ConfigError, match=told) as caught:
            load_checkpoint(directory)
        assert "\n" not in str(caught.value)


def test_scores_that_no_ring_compares_are_told(tmp_path: Path) -> None:
    directory = saved(tmp_path, "RA+LN+R", n_layer=1, n_positions=16)
    model, config, _ = load_checkpoint(directory)
    assert isinstance(model, ReluModel)
    with torch.no_grad():
        model.get_parameter("h.0.attn.c_attn.weight").mul_(3e4)
    save_checkpoint(model, config, directory, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match=r"attention scores up to .* too large to be compared|do not fit a ring"):
        convert(directory)
