"""What tests of the families have in common: passes, generation and training of a checkpoint, held against a float reference of theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from privinf.cli.train import train
from privinf.lowering import Lowered, convert
from privinf.lowering.explain import explain
from privinf.models.base import Config, Decoder
from privinf.models.checkpoint import load_checkpoint
from protocols.errors import ConfigError
from tests.support.alone import Alone
from tests.support.duo import duo
from tests.support.ladder import IDS, LOGIT_ERROR, run, walker
from tests.support.training import SMALL_RUN
from tests.support.trio import trio
from tests.support.two_party import Weights

Exact = Callable[[list[int]], Tensor]
"""Ids to logits (T, V)."""


def worst(found: Tensor, exact: Tensor) -> float:
    """The largest difference."""
    return float((found - exact).abs().max())


def pass_follows(lowered: Lowered, exact: Tensor, *, alone: bool = True) -> None:
    """A private pass over `IDS` has these last logits (V,), for what was predicted, with a dealer, and if `alone` without."""
    outcome, total = run(lowered, IDS), explain(lowered, len(IDS), logits=True)["total"]
    assert worst(outcome.client, exact) < LOGIT_ERROR
    assert (outcome.counted["online"]["payload"], outcome.counted["online"]["rounds"]) == (total["online_bytes"], total["rounds"])
    if alone:
        sources: list[Alone] = []

        def source(weights: Weights, device: str) -> Alone:
            sources.append(Alone(weights, device))
            return sources[0]

        outcome = walker(lowered, source=source)(IDS)
        assert worst(outcome.client, exact) < LOGIT_ERROR
        assert outcome.counted["online"]["payload"] == outcome.predicted.online_bytes
        payload, rounds = sources[0].predicted[0]
        assert outcome.counted["offline"]["payload"] == outcome.predicted.peer_offline_bytes + payload
        assert outcome.counted["offline"]["rounds"] == rounds


def generation_follows(
    lowered: Lowered, exact: Exact, prompt: list[int], count: int, *, chunk: int = 0, within: float = LOGIT_ERROR
) -> None:
    """Token by token over what is kept, with a dealer, for what was predicted; every token is float's best, or within the error of it."""
    with trio(lowered) as parties, parties.client(fresh=True, chunk=chunk) as client:
        tokens = [token.id for token in client.generate(ids=prompt, max_new_tokens=count, logits=True, ignore_eos=True)]
        logits, result = client.logits, client.result
    assert result is not None and len(tokens) == count
    wanted = exact(prompt + tokens[:-1])[len(prompt) - 1 :]
    assert worst(torch.stack(logits).reshape(count, -1), wanted) < within
    assert float((wanted.amax(-1) - wanted[torch.arange(count), tokens]).max()) < 2 * within
    total = explain(lowered, len(prompt), new_tokens=count, logits=True, chunk=chunk)["total"]
    assert (total["online_bytes"], total["rounds"]) == (result["traffic"]["online"]["payload"], result["traffic"]["online"]["rounds"])


def two_alone_follow(lowered: Lowered, exact: Exact, prompt: list[int], cache: Path, *, chunk: int = 0) -> None:
    """Three tokens without a dealer."""
    with duo(lowered, cache=cache) as pair, pair.client(fresh=True, chunk=chunk) as client:
        tokens = [token.id for token in client.generate(ids=prompt, max_new_tokens=3, logits=True, ignore_eos=True)]
        found = torch.stack(client.logits).reshape(3, -1)
    assert worst(found, exact([*prompt, *tokens[:-1]])[len(prompt) - 1 :]) < LOGIT_ERROR


def refused(directory: Path, told: str, **changes: Any) -> None:
    """A checkpoint whose `config.json` has these fields is refused in a line."""
    file = directory / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), **changes}))
    with pytest.raises(ConfigError, match=told) as caught:
        load_checkpoint(directory)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    file.write_text(before)


def trained(directory: Path, *words: str) -> dict[str, Any]:
    """What `privinf train` says of a run with these options, which ends well."""
    app = typer.Typer()
    app.command()(train)
    found = CliRunner().invoke(app, ["-o", str(directory), *words])
    assert found.exit_code == 0, found.output
    result: dict[str, Any] = json.loads(found.stdout)
    return result


def learnt(directory: Path, family: str, variant: str, below: float, *words: str, within: float = LOGIT_ERROR) -> tuple[Decoder, Config]:
    """What `privinf train` leaves: 20 steps and, resumed, 20 more come below this loss (guessing evenly: 5.7), and a pass follows float."""
    text = directory / "text"
    text.mkdir()
    for n in range(20):
        (text / f"m{n}.py").write_text(f"def area_{n}(width, height):\n    return width * height + {n}\n" * 30)
    for steps in (20, 40):
        result = trained(directory / "run", "--corpus", str(text), "--family", family, *SMALL_RUN, *words, "--steps", str(steps))
    assert result["steps"] == 40 and result["variant"] == variant and result["held_out_loss"] < below
    model, config, tokenizer = load_checkpoint(directory / "run" / "checkpoint")
    assert tokenizer is not None and config.model_type == family
    ids = list(range(3, 15))
    exact = model(torch.tensor([ids]))[0, -1]
    assert worst(run(convert(directory / "run" / "checkpoint"), ids).client, exact) < within
    return model, config


def root_mean_square(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """RMSNorm of rows, if there is one of this name."""
    weight = w.get(f"{name}.weight")
    found: Tensor = x if weight is None else x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    return found


def ladder_logits(directory: Path, ids: Sequence[int], attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """(T, V) in float64 of a network of the ladder's shape, from the file's tensors alone.

    `attention` is of q, divided by sqrt(d_k), k and v, each (T, H, d_k), and gives (T, H, d_k).
    """
    w, fields = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    w = {name: tensor.double() for name, tensor in w.items()}
    heads, count, layers = fields["n_head"], len(ids), fields["n_layer"]
    blocks = layers // fields.get("loops", 1)
    x = w["wte.weight"][list(ids)] + w["wpe.weight"][:count]
    width = x.shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        if fields["norm"] == "none":
            return x
        x = x - x.mean(-1, keepdim=True)
        found: Tensor = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        return found

    for layer in range(layers):
        at = f"h.{layer % blocks}"

        def apply(x: Tensor, name: str, at: str = at, layer: int = layer) -> Tensor:
            y: Tensor = x @ w[f"{at}.{name}.weight"] + w[f"{at}.{name}.bias"]
            own = f"differences.{layer}.{name.replace('.', '_')}"
            return y + x @ w[f"{own}.down"] @ w[f"{own}.up"] if f"{own}.up" in w else y

        q, k, v = apply(norm(x, f"{at}.ln_1"), "attn.c_attn").reshape(count, 3, heads, width // heads).unbind(1)
        if f"{at}.attn.temperature" in w:
            q = q / w[f"{at}.attn.temperature"][:, :count].T[..., None]
        x = x + apply(attention(q / math.sqrt(width // heads), k, v).reshape(count, width), "attn.c_proj")
        y = norm(x, f"{at}.ln_2")
        if fields["ffn"] == "fused":
            y = apply(y, "mlp.fused")
        else:
            y = apply(y, "mlp.c_fc")
            if fields["ffn"] == "relu":
                y = y.relu()
            elif fields["ffn"] == "maxplus":
                y = torch.stack([(y + column).max(-1).values for column in w[f"{at}.mlp.tropical"].T], -1)
            y = apply(y, "mlp.c_proj")
        alpha, beta = (w.get(f"{at}.mlp.{name}", torch.tensor(1.0)) for name in ("alpha", "beta"))
        x = beta * x + y / alpha
    logits: Tensor = norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T
    return logits


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The usual one, causal, for `ladder_logits`."""
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))  # (H, T, d_k)
    future = torch.full((len(q[0]), len(q[0])), -math.inf).double().triu(1)
    return ((q @ k.mT + future).softmax(-1) @ v).transpose(0, 1)
