"""TTT-Linear: our float module and private passes against gradient descent, position by position."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from privinf.client.shared import Shared
from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.models.ttt import TttModel
from privinf.training.families import built, first_weights, variant_config
from protocols import reference
from protocols.errors import ConfigError, RangeError
from tests.support.families import generation_follows, pass_follows, refused, root_mean_square, two_alone_follow, worst
from tests.support.ladder import IDS, LOGIT_ERROR
from tests.support.trio import trio

VARIANTS = ("TTT", "TTT+R", "TTT+RN+SwiGLU")
SIZES: dict[str, int] = {"n_layer": 2, "n_head": 4, "n_embd": 24, "vocab_size": 201, "n_positions": 80, "mini_batch": 5}


def made(directory: Path, variant: str, **sizes: int) -> dict[str, Tensor]:
    """Writes a random network, whose steps are large; its tensors."""
    config = variant_config("ttt", variant, **{**SIZES, **sizes})
    model = built(config)
    assert isinstance(model, TttModel) and config.variant == variant
    first_weights(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if config.norm == "none" and name != "lm_head.weight":
                continue
            if name in ("embeddings.weight", "lm_head.weight"):
                parameter.mul_(10)
            elif name.endswith("o_proj.weight"):
                parameter.mul_(2)
    save_checkpoint(model, config, directory, torch.float32)
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def plain(tensors: dict[str, Tensor], config: Any, ids: list[int]) -> Tensor:
    """Logits (T, V), from the published formulas: gradient by gradient."""
    x = tensors["embeddings.weight"][ids]
    for layer in range(config.n_layer):
        at = f"layers.{layer}"
        u = root_mean_square(x, tensors, f"{at}.norm")
        q, k, v = (
            (u @ tensors[f"{at}.learner.{part}_proj.weight"].T).reshape(len(u), config.n_head, -1).transpose(0, 1) for part in "qkv"
        )  # (H, T, P)
        z, _ = reference.inner_linear(q, k, v, tensors[f"{at}.learner.weight"], config.mini_batch)
        z = z.transpose(0, 1).reshape(len(u), -1)
        x = x + root_mean_square(z, tensors, f"{at}.learner.norm") @ tensors[f"{at}.learner.o_proj.weight"].T
        if config.ffn != "none":
            u = root_mean_square(x, tensors, f"{at}.mlp_norm")
            up = u @ tensors[f"{at}.mlp.up_proj.weight"].T
            inner = up.clamp(min=0) if config.ffn == "relu" else F.silu(u @ tensors[f"{at}.mlp.gate_proj.weight"].T) * up
            x = x + inner @ tensors[f"{at}.mlp.down_proj.weight"].T
    return root_mean_square(x, tensors, "norm_f") @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_gradient_descent(tmp_path: Path, variant: str) -> None:
    """Our float module, and a private pass with a dealer, and of some without, each for what was predicted."""
    tensors = made(tmp_path, variant)
    model, config, _ = load_checkpoint(tmp_path)
    wanted = plain(tensors, config, list(IDS))
    for training in (False, True):
        with torch.no_grad():
            found = model.train(training)(torch.tensor([IDS]))[0]
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    lowered = convert(tmp_path)
    assert {"ttt", "rms_norm", "silu", "relu", "mul"} & {node.op for node in lowered.graph.nodes} == {
        "TTT": {"ttt"},
        "TTT+R": {"ttt", "relu"},
        "TTT+RN+SwiGLU": {"ttt", "rms_norm", "silu", "mul"},
    }[variant]

    pass_follows(lowered, wanted[-1], alone=variant == "TTT+RN+SwiGLU")


@pytest.mark.parametrize(
    ("variant", "count"), [("TTT", 8), *(pytest.param(variant, 64, marks=pytest.mark.slow) for variant in ("TTT", "TTT+RN+SwiGLU"))]
)
def test_cached_generation_follows_float(tmp_path: Path, variant: str, count: int) -> None:
    """A prompt in pieces that end within mini-batches, and then token by token over the weights alone; for what was predicted."""
    tensors = made(tmp_path, variant)
    _, config, _ = load_checkpoint(tmp_path)
    generation_follows(convert(tmp_path), partial(plain, tensors, config), list(IDS[:7]), count, chunk=3)


def test_without_a_dealer_over_a_weight(tmp_path: Path) -> None:
    tensors = made(tmp_path / "model", "TTT", n_layer=1)
    _, config, _ = load_checkpoint(tmp_path / "model")
    two_alone_follow(convert(tmp_path / "model"), partial(plain, tensors, config), list(IDS[:4]), tmp_path / "cache")


def test_callers_have_a_session_each(tmp_path: Path) -> None:
    """Of a model that takes one sequence at a time: conversations side by side, as a gateway has them, in two turns; a list is told."""
    tensors = made(tmp_path, "TTT", n_layer=1)
    _, config, _ = load_checkpoint(tmp_path)
    with trio(convert(tmp_path)) as parties, parties.client(fresh=True) as client:
        with pytest.raises(ConfigError, match=r"this model takes one sequence at a time .*; give one prompt") as caught:
            list(client.generate(ids=[[1], [2]], max_new_tokens=2))
        assert caught.value.exit_code == 2
        shared = Shared(client, 4)
        with shared.seat() as one, shared.seat() as other:
            assert len(shared.sessions) == 2
            for seat, ids in ((one, [5, 7, 2]), (other, [9, 4, 1, 8, 3, 6])):
                so_far = list[int]()
                for turn in (ids, [11]):
                    so_far += turn
                    tokens = [token.id for token in seat.generate(turn, max_new_tokens=3, logits=True, ignore_eos=True)]
                    assert seat.reply is not None
                    found, so_far = torch.stack(seat.reply.logits).reshape(3, -1), so_far + tokens
                    assert worst(found, plain(tensors, config, so_far[:-1])[-3:]) < LOGIT_ERROR


def test_a_token_costs_the_same_at_any_length(tmp_path: Path) -> None:
    """At the beginning, the middle and the end of a mini-batch."""
    made(tmp_path, "TTT")
    lowered = convert(tmp_path)
    costs = [explain(lowered, 1, logits=True, cached=cached)["total"] for cached in (3, 4, 5, 79)]
    assert all(cost == costs[0] for cost in costs)


def test_a_weight_stays_within_its_ring_over_a_whole_context(tmp_path: Path) -> None:
    """Where every mini-batch is the one that adds most, W is still within what the plan holds it to."""
    made(tmp_path, "TTT")
    worst: list[tuple[float, float]] = []

    def observe(node: Any, operands: Any, output: Tensor) -> None:
        if node.op == "ttt":
            q, k, v = (part[0, :5].double().reshape(5, node.heads, -1).transpose(0, 1) for part in operands)
            many = [part.repeat(1, 80 // 5, 1) for part in (q, k, v)]
            _, weight = reference.inner_linear(*many, node.value("weight").double(), node.batch)
            worst.append((float(weight.abs().max()), 2.0 ** (node.plan.ring - 30)))

    convert(tmp_path).graph(torch.tensor([IDS]), observe=observe)
    assert len(worst) == 2 and all(reached < bound for reached, bound in worst)


def test_steps_that_may_not_settle_are_told(tmp_path: Path) -> None:
    made(tmp_path, "TTT")
    model, config, _ = load_checkpoint(tmp_path)
    with torch.no_grad():
        model.layers[1].learner.k_proj.weight.mul_(12)
    save_checkpoint(model, config, tmp_path / "steep", torch.float32)
    with pytest.raises(RangeError, match=r"keys have a product of norm .*; the plan allows for 1, .*layers\.1\.learner\.ttt"):
        convert(tmp_path / "steep")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_head": 5}, "n_embd: 24 is not a multiple of n_head, 5"),
        ({"mini_batch": 0}, "mini_batch: Input should be greater than or equal to 1"),
        ({"ffn": "gelu"}, "ffn: Input should be 'swiglu', 'relu' or 'none'"),
        ({"inner": "mlp"}, "inner: Extra inputs"),
        ({"n_head": 2}, r"learner\.weight: shape \[4, 6, 6\], expected \[2, 12, 12\]"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_told_in_a_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    made(tmp_path, "TTT+R")
    refused(tmp_path, told, **changes)


def test_what_is_no_variant_is_told() -> None:
    for variant, sizes, told in (
        ("TTT+LN", {}, "none of ttt's"),
        ("TTT", {"n_head": 5}, "24 is not a multiple"),
        ("TTT", {"kv_heads": 2}, "no keys"),
    ):
        with pytest.raises(ConfigError, match=told):
            variant_config("ttt", variant, **{**SIZES, **sizes})  # type: ignore[arg-type]
