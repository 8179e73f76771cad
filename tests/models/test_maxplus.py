"""Max-plus products: private passes follow float, with a dealer and without, for what was predicted."""

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
from privinf.models.maxplus import MaxPlusModel
from privinf.training.families import built, first_weights, variant_config
from protocols.errors import ConfigError, RangeError
from tests.support.alone import Alone
from tests.support.duo import duo
from tests.support.ladder import IDS, LOGIT_ERROR, run, walker
from tests.support.training import SMALL_RUN
from tests.support.trio import trio
from tests.support.two_party import Weights

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 201, "n_positions": 80}


def saved(directory: Path, variant: str, **fields: Any) -> Path:
    """A checkpoint with random weights."""
    config = variant_config("maxplus", variant, **{**SIZES, **fields})
    assert config.variant == variant
    model = built(config)
    first_weights(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.fill_(1.4 if name.endswith("alpha") else -0.8)
            elif parameter.dim() == 2:
                parameter.mul_(1.5)
    save_checkpoint(model, config, directory, torch.float32)
    return directory


def reference(directory: Path, ids: list[int] | tuple[int, ...]) -> Tensor:
    """(T, V) in float64 from the file's tensors alone, by loops."""
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

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of one query (H, d) over some keys (n, H, d)."""
        if fields["attention"] == "softmax":
            return ((q * k).sum(-1).softmax(0)[..., None] * v).sum(0)
        best = torch.full(q.shape, -math.inf, dtype=torch.float64)
        for key, value in zip(k, v, strict=True):
            best = torch.maximum(best, (q + key).max(-1).values[:, None] + value)
        return best

    for layer in range(fields["n_layer"]):
        qkv = apply(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").reshape(count, 3, heads, width // heads)
        qkv[:, 0] /= math.sqrt(width // heads)
        y = torch.stack([attention(qkv[i, 0], qkv[: i + 1, 1], qkv[: i + 1, 2]) for i in range(count)])
        x = x + apply(y.reshape(count, width), f"h.{layer}.attn.c_proj")
        y = norm(x, f"h.{layer}.ln_2")
        if fields["ffn"] == "fused":
            y = apply(y, f"h.{layer}.mlp.fused")
        else:
            y = apply(y, f"h.{layer}.mlp.c_fc")
            y = torch.stack([(y + column).max(-1).values for column in w[f"h.{layer}.mlp.tropical"].T], -1)
            y = apply(y, f"h.{layer}.mlp.c_proj")
        alpha, beta = (w.get(f"h.{layer}.mlp.{name}", torch.tensor(1.0)) for name in ("alpha", "beta"))
        x = beta * x + y / alpha
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T


@pytest.mark.parametrize("variant", ["MP+MP", "SM+LN+MP", "MP+ScFuFFN"])
def test_a_private_pass_follows_float(tmp_path: Path, variant: str) -> None:
    """For what was predicted; the layer's own weight is in no set-up."""
    directory = saved(tmp_path, variant, n_positions=16)
    exact = reference(directory, IDS)
    with torch.no_grad():
        model = load_checkpoint(directory)[0]
        for found in (model(torch.tensor([IDS])), model.train()(torch.tensor([IDS])), model.folded()(torch.tensor([IDS]))):
            torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=1e-4)
    lowered, sources = convert(directory), list[Alone]()
    ops = {node.op for node in lowered.graph.nodes}
    assert ("max_plus" in ops, "max_plus_attention" in ops) == (variant.endswith("+MP"), variant.startswith("MP"))
    assert not any("max_plus" in name for name in lowered.setup.items)

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
    directory, prompt = saved(tmp_path / "checkpoint", "MP+MP", n_layer=1), [5, 7, 2, 11, 3]
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


def test_two_parties_alone_generate_over_a_prompt_in_pieces(tmp_path: Path) -> None:
    directory, prompt = saved(tmp_path / "checkpoint", "MP+MP", n_layer=1), [5, 7, 2, 11]
    with duo(convert(directory), cache=tmp_path / "cache") as pair, pair.client(fresh=True, chunk=3) as client:
        tokens = [token.id for token in client.generate(ids=prompt, max_new_tokens=3, logits=True, ignore_eos=True)]
        found = torch.stack(client.logits).reshape(3, -1)
    assert float((found - reference(directory, [*prompt, *tokens[:-1]])[3:]).abs().max()) < LOGIT_ERROR


def test_it_learns_and_what_it_leaves_runs_privately(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for n in range(20):
        (text / f"m{n}.py").write_text(f"def area_{n}(width, height):\n    return width * height + {n}\n" * 30)
    app = typer.Typer()
    app.command()(train)
    words = ["-o", str(tmp_path / "run"), "--corpus", str(text), "--family", "maxplus", *SMALL_RUN]
    for steps in (20, 40):
        found = CliRunner().invoke(app, [*words, "--steps", str(steps)])
        assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["variant"] == "MP+MP" and result["held_out_loss"] < 4.8  # guessing evenly: 5.7
    model, _, _ = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert isinstance(model, MaxPlusModel)
    ids = list(range(3, 15))
    exact = model(torch.tensor([ids]))[0, -1]
    assert float((run(convert(tmp_path / "run" / "checkpoint"), ids).client - exact).abs().max()) < LOGIT_ERROR


def test_what_is_no_variant_is_told(tmp_path: Path) -> None:
    for variant, told in (("SM+LN", "none of maxplus's"), ("SM+FuFFN", "a network of the ladder"), ("MP(t)+MP", "none of maxplus's")):
        with pytest.raises(ConfigError, match=told):
            variant_config("maxplus", variant, **SIZES)
    directory = saved(tmp_path, "MP+MP", n_layer=1)
    config = json.loads((directory / "config.json").read_text())
    for changes, told in (
        ({"attn_temperature": True}, "has none"),
        ({"ffn": "gelu"}, "ffn"),
        ({"attention": "max"}, "attention"),
        ({"n_inner": 7}, r"mlp\.tropical: shape \[16, 16\], expected \[7, 7\]"),
    ):
        (directory / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ConfigError, match=told) as caught:
            load_checkpoint(directory)
        assert "\n" not in str(caught.value)


def test_sums_that_no_ring_compares_are_told(tmp_path: Path) -> None:
    directory = saved(tmp_path, "SM+MP", n_layer=1, n_positions=16)
    model, config, _ = load_checkpoint(directory)
    assert isinstance(model, MaxPlusModel)
    with torch.no_grad():
        model.get_parameter("h.0.mlp.tropical").mul_(1e5)
    save_checkpoint(model, config, directory, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="too large to be compared in 31 bits"):
        convert(directory)
