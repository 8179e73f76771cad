"""Mamba-2 and what is left of it: our float module and private passes against the recurrence, position by position."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.models.mamba2 import Mamba2Model
from privinf.training.families import built, first_weights, variant_config
from protocols import reference
from protocols.errors import ConfigError, RangeError
from tests.support.families import generation_follows, pass_follows, refused, root_mean_square, two_alone_follow
from tests.support.ladder import IDS, LOGIT_ERROR, logit_error

VARIANTS = ("M2(fix)", "M2(relu)", "M2(relu)+RN+GLU", "M2(fix)+Conv+R", "M2(sp)+Conv+RN+SiLU")
SIZES: dict[str, int] = {"n_layer": 2, "n_head": 4, "n_embd": 24, "vocab_size": 201, "n_positions": 80}


def made(directory: Path, variant: str, **sizes: int) -> dict[str, Tensor]:
    """Writes a random network, no parameter at its resting value; its tensors."""
    config = variant_config("mamba2", variant, **{**SIZES, **sizes})
    model = built(config)
    assert isinstance(model, Mamba2Model) and config.variant == variant
    first_weights(model, 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif name in ("embeddings.weight", "lm_head.weight"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("out_proj.weight") and config.norm == "rmsnorm":
                parameter.mul_(3)
    save_checkpoint(model, config, directory, torch.float32)
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def plain(tensors: dict[str, Tensor], config: Any, ids: list[int]) -> Tensor:
    """Logits (T, V), from the published formulas: a loop over positions."""
    x = tensors["embeddings.weight"][ids]
    act = {"silu": F.silu, "relu": F.relu}.get(config.gate, lambda v: v)
    inner, size, heads = config.n_inner, config.n_state, config.n_head
    for layer in range(config.n_layer):
        at = f"layers.{layer}.mixer"
        u = root_mean_square(x, tensors, f"layers.{layer}.norm")
        parts = u @ tensors[f"{at}.in_proj.weight"].T
        if config.conv:
            before = torch.cat([torch.zeros(config.conv - 1, parts.shape[1]).double(), parts])
            taps = tensors[f"{at}.conv_weight"][:, 0]
            parts = act(torch.stack([(before[t : t + config.conv] * taps).sum(0) for t in range(len(u))]) + tensors[f"{at}.conv_bias"])
        values, b, c = parts.split([inner, size, size], -1)
        v = values.reshape(len(u), heads, -1).transpose(0, 1)  # (H, T, P)
        if config.decay == "fixed":
            a = torch.tensor([1 - 2.0**-shift for shift in config.shifts]).double()[:, None].expand(heads, len(u))
            gain = 1 - a
        else:
            dt = (u @ tensors[f"{at}.dt_proj.weight"].T + tensors[f"{at}.dt_proj.bias"]).T  # (H, T)
            dt = dt.clamp(min=0) if config.decay == "relu" else torch.log1p(dt.exp())
            a = torch.exp(-dt) if config.decay == "relu" else torch.exp(-dt * tensors[f"{at}.A_log"].exp()[:, None])
            gain = 1 - a if config.decay == "relu" else dt
        y, _ = reference.recurrence(v, b, c, a, gain, torch.zeros(heads, size, v.shape[-1]).double())
        y = y.transpose(0, 1)  # (T, H, P)
        if config.conv:
            y = y + tensors[f"{at}.D"][:, None] * v.transpose(0, 1)
        y = y.reshape(len(u), -1)
        if config.gate != "none":
            y = y * act(u @ tensors[f"{at}.z_proj.weight"].T)
        x = x + root_mean_square(y, tensors, f"{at}.norm") @ tensors[f"{at}.out_proj.weight"].T
    return root_mean_square(x, tensors, "norm_f") @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_recurrence(tmp_path: Path, variant: str) -> None:
    """Our float module, and a private pass with a dealer, and of some without, each for what was predicted."""
    tensors = made(tmp_path, variant)
    model, config, _ = load_checkpoint(tmp_path)
    wanted = plain(tensors, config, list(IDS))
    for training in (False, True):
        with torch.no_grad():
            found = model.train(training)(torch.tensor([IDS]))[0]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    lowered = convert(tmp_path)
    ops = {node.op for node in lowered.graph.nodes}
    left = {"scan", "taps", "rms_norm", "silu", "relu", "softplus", "mul"} & ops
    assert (
        left
        == {
            "M2(fix)": {"scan"},
            "M2(relu)": {"scan", "relu"},
            "M2(relu)+RN+GLU": {"scan", "relu", "rms_norm", "mul"},
            "M2(fix)+Conv+R": {"scan", "taps", "relu", "mul"},
            "M2(sp)+Conv+RN+SiLU": {"scan", "taps", "rms_norm", "silu", "softplus", "mul"},
        }[variant]
    )

    pass_follows(lowered, wanted[-1], alone=variant in ("M2(relu)", "M2(sp)+Conv+RN+SiLU"))


@pytest.mark.parametrize(
    ("variant", "count"),
    [("M2(relu)+RN+GLU", 8), *(pytest.param(variant, 64, marks=pytest.mark.slow) for variant in ("M2(fix)", "M2(sp)+Conv+RN+SiLU"))],
)
def test_cached_generation_follows_float(tmp_path: Path, variant: str, count: int) -> None:
    """A prompt in pieces, and then token by token over the state alone; for what was predicted."""
    tensors = made(tmp_path, variant)
    _, config, _ = load_checkpoint(tmp_path)
    generation_follows(convert(tmp_path), partial(plain, tensors, config), list(IDS[:7]), count, chunk=3)


def test_without_a_dealer_over_a_state(tmp_path: Path) -> None:
    tensors = made(tmp_path / "model", "M2(relu)", n_layer=1)
    _, config, _ = load_checkpoint(tmp_path / "model")
    two_alone_follow(convert(tmp_path / "model"), partial(plain, tensors, config), list(IDS[:4]), tmp_path / "cache")


def test_one_token_again_and_again_adds_up_to_little_error(tmp_path: Path) -> None:
    """Heads that hardly forget take the same small step at each position, large scores multiply it, and its rounding with it."""
    made(tmp_path, "M2(sp)+RN+R")
    model, config, _ = load_checkpoint(tmp_path)
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.dt_proj.weight.mul_(0.1)
            layer.mixer.dt_proj.bias.copy_(torch.tensor([-8.5, -8.0, -7.0, -6.0]))
            layer.mixer.in_proj.weight[config.n_inner :].mul_(4)
    save_checkpoint(model, config, tmp_path / "slow", torch.float32)
    lowered = convert(tmp_path / "slow")
    assert all(node.plan.finer for node in lowered.graph.nodes if node.op == "scan")
    assert logit_error(lowered, model, [17] * 80) < LOGIT_ERROR


@pytest.mark.parametrize("variant", ["M2(fix)", "M2(sp)+Conv+RN+SiLU"])
def test_a_token_costs_the_same_at_any_length(tmp_path: Path, variant: str) -> None:
    """Bytes, rounds, what a dealer sends, and what is kept; attention's would grow."""
    made(tmp_path, variant)
    lowered = convert(tmp_path)
    costs = [explain(lowered, 1, logits=True, cached=cached)["total"] for cached in (3, 30, 79)]
    assert costs[0] == costs[1] == costs[2]


def test_a_state_stays_within_its_ring_however_long_it_runs(tmp_path: Path) -> None:
    """What the plan holds a state to is what it can never exceed: the largest of all that comes in, again and again."""
    for variant in ("M2(fix)", "M2(relu)", "M2(sp)+RN+R"):
        made(tmp_path / variant, variant)
        lowered = convert(tmp_path / variant)
        worst: list[tuple[str, float, float]] = []

        def observe(node: Any, operands: Any, output: Tensor, worst: list[tuple[str, float, float]] = worst) -> None:
            if node.op != "scan":
                return
            x, b, _, *z = (value[0].double() for value in operands)
            entering = x.reshape(len(x), node.heads, -1).abs().amax(-1).T  # (H, T)
            a = torch.exp(-z[0].T) if z else torch.tensor([1 - 2.0**-shift for shift in node.shifts]).double()[:, None].expand_as(entering)
            entering = (1 - a if node.convex else torch.ones_like(a)) * entering * b.abs().amax(-1)
            for t in range(len(x)):  # the same position for ever: h = a h + u b x
                h = torch.zeros(len(a)).double()
                for _ in range(500):
                    h = a[:, t] * h + entering[:, t]
                worst.append((node.name, float(h.max()), 2.0 ** (node.plan.wide_bits - 34)))

        lowered.graph(torch.tensor([IDS]), observe=observe)
        assert worst and all(reached < bound for _, reached, bound in worst)


def test_small_weights_have_rings_too(tmp_path: Path) -> None:
    """Scores far below one, as those of a layer that does nothing."""
    made(tmp_path, "M2(fix)", n_layer=1)
    model, config, _ = load_checkpoint(tmp_path)
    for parameter in model.parameters():
        parameter.mul_(1e-2)
    save_checkpoint(model, config, tmp_path / "small", torch.float32)
    lowered = convert(tmp_path / "small")
    with torch.no_grad():
        pass_follows(lowered, model(torch.tensor([IDS]))[0, -1], alone=False)


def test_values_that_float_does_not_hold_are_told(tmp_path: Path) -> None:
    made(tmp_path, "M2(relu)+RN+GLU", n_layer=1)
    model, config, _ = load_checkpoint(tmp_path)
    for parameter in model.parameters():
        parameter.mul_(1e30)
    save_checkpoint(model, config, tmp_path / "large", torch.float32)
    with pytest.raises(ConfigError, match=r"a value is (too large|not finite).*the weights or the inputs are too large"):
        convert(tmp_path / "large")


def test_decays_that_no_exponential_is_right_for_are_told(tmp_path: Path) -> None:
    made(tmp_path, "M2(relu)")
    model, config, _ = load_checkpoint(tmp_path)
    with torch.no_grad():
        model.layers[1].mixer.dt_proj.bias.fill_(3.0)
    save_checkpoint(model, config, tmp_path / "steep", torch.float32)
    block = {node.name: node.plan.block for node in convert(tmp_path / "steep").graph.nodes if node.op == "scan"}
    assert block["layers.1.mixer.scan"] <= 16 < block["layers.0.mixer.scan"]
    with torch.no_grad():
        model.layers[1].mixer.dt_proj.bias.fill_(70.0)
    save_checkpoint(model, config, tmp_path / "steeper", torch.float32)
    with pytest.raises(RangeError, match=r"decays reach 7\d.* nats a position; the plan allows for 60 \(layer layers\.1\.mixer\.scan\)"):
        convert(tmp_path / "steeper")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_head": 5}, "n_inner: 48 is not a multiple of n_head, 5"),
        ({"decay": "tanh"}, "decay: Input should be 'softplus', 'relu' or 'fixed'"),
        ({"conv": 1}, "conv: one tap is none"),
        ({"n_state": None}, "n_state"),
        ({"state_size": 16}, "state_size: Extra inputs"),
        ({"architectures": ["Mamba2ForCausalLM"]}, "model_type: a 'mamba2' of elsewhere is not supported; train one: --family mamba2"),
        ({"n_state": 9}, r"in_proj\.weight: shape \[80, 24\], expected \[66, 24\]"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_told_in_a_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    made(tmp_path, "M2(relu)+RN+GLU")
    refused(tmp_path, told, **changes)
