"""Blocks that run in loops: a shared weight is masked and sent once, whatever each loop adds to it, and private passes follow float."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from privinf.lowering import Lowered, convert, residual
from privinf.lowering.explain import explain
from privinf.lowering.program import setup_bytes
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from privinf.models.recursive import RecursiveModel
from privinf.training.families import built, first_weights, variant_config
from protocols.errors import ConfigError
from tests.support.families import generation_follows, ladder_logits, pass_follows, refused, softmax_attention, two_alone_follow
from tests.support.ladder import IDS, LOGIT_ERROR, walker
from tests.support.trio import trio

SIZES = {"n_layer": 6, "n_head": 2, "n_embd": 24, "vocab_size": 201, "n_positions": 80}


def saved(directory: Path, variant: str, **fields: Any) -> Path:
    """A checkpoint with random weights, of which those of the differences matter."""
    config = variant_config("recursive", variant, **{**SIZES, "loops": 3, **fields})
    model = built(config)
    first_weights(model, 3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".up", ".down", ".bias", "ln_1.weight", "ln_2.weight")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 2:
                parameter.mul_(1.5 if config.norm == "layernorm" else 1.2)
    save_checkpoint(model, config, directory, torch.float32)
    return directory


def reference(directory: Path, ids: list[int] | tuple[int, ...]) -> Tensor:
    """(T, V) in float64 from the file's tensors alone."""
    return ladder_logits(directory, ids, softmax_attention)


def set_up(lowered: Lowered) -> dict[str, int]:
    """Bytes of the layers' weights and of the rest."""
    found = {"layers": 0, "rest": 0}
    for (layer, _), size in setup_bytes(lowered.graph).items():
        found["layers" if layer.startswith("h.") else "rest"] += size
    return found


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("SM+FuFFN", {"rank": 0, "n_layer": 3}),
        ("SM+FuFFN", {"rank": 2, "tie_word_embeddings": False}),
        ("SM(t)+FuFFN", {"rank": 1, "loops": 2, "n_layer": 2}),
        ("SM+LN+R", {"rank": 2, "n_layer": 3}),
    ],
    ids=str,
)
def test_a_private_pass_follows_float(tmp_path: Path, variant: str, fields: dict[str, Any]) -> None:
    """For what was predicted, with a dealer and without; every weight of a block is there once."""
    directory = saved(tmp_path / "checkpoint", variant, **{"n_positions": 16, **fields})
    exact = reference(directory, IDS)
    with torch.no_grad():
        found = load_checkpoint(directory)[0](torch.tensor([IDS]))[0]
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)
    lowered = convert(directory)
    maps = [node for node in lowered.graph.nodes if node.op == "shared_linear"]
    loops, layers = fields.get("loops", 3), fields.get("n_layer", 6)
    assert len([node for node in maps if node.shared_with is None]) * loops == len(maps)
    assert {node.layer for node in maps if node.shared_with is None} == {f"h.{block}" for block in range(layers // loops)}
    assert all(("down" in node.parameter_shapes) == bool(fields["rank"]) for node in maps)

    pass_follows(lowered, exact[-1])
    lowered.save(tmp_path / "lowered")
    again = Lowered.load(tmp_path / "lowered")
    assert again.id == lowered.id and Lowered.from_bundle(lowered.bundle()).id == lowered.id
    assert float((walker(again)(IDS).client - exact[-1]).abs().max()) < LOGIT_ERROR


@pytest.mark.parametrize("rank", [0, 2])
def test_a_set_up_sends_a_shared_weight_once(tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3 loops at most 0.4 of what the same depth takes otherwise; as explained, and as counted."""
    sizes = {**SIZES, "n_layer": 3, "n_embd": 96, "n_positions": 16}
    shared = convert(saved(tmp_path / "shared", "SM+FuFFN", **{**sizes, "rank": rank}))
    model, _, _ = load_checkpoint(tmp_path / "shared")
    assert isinstance(model, RecursiveModel)
    save_checkpoint(model.unrolled(), model.unrolled().config, tmp_path / "plain", torch.float32)
    monkeypatch.setattr(residual, "MOST_ADDED", 0)  # maps that share weights are not joined with others
    plain = convert(tmp_path / "plain")
    mine, theirs = set_up(shared), set_up(plain)
    assert mine["layers"] <= 0.4 * theirs["layers"]
    assert mine["rest"] == theirs["rest"]  # the embedding and the head
    rounds = [explain(lowered, 4, new_tokens=2)["total"]["rounds"] for lowered in (shared, plain)]
    # a wider ring may cost a row that stands alone an exchange: that of the prompt's last layer, and the token's in all three
    assert 0 <= rounds[0] - rounds[1] <= (2 + 3 * 2 if rank else 0)
    counted = []
    for lowered in (shared, plain):
        with trio(lowered) as parties, parties.client(fresh=True) as client:
            list(client.generate(ids=[1, 2, 3, 4], max_new_tokens=1))
            assert client.result is not None
            counted.append(client.result["traffic"]["setup"]["payload"])
    assert counted == [sum(mine.values()), sum(theirs.values())]


@pytest.mark.parametrize("count", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_cached_generation_follows_float(tmp_path: Path, count: int) -> None:
    """Token by token; each loop has its own keys and values of the weights that it shares."""
    directory = saved(tmp_path, "SM+FuFFN", rank=2, n_layer=3)
    generation_follows(convert(directory), partial(reference, directory), [5, 7, 2, 11, 3], count)


def test_two_parties_alone_generate(tmp_path: Path) -> None:
    directory = saved(tmp_path / "checkpoint", "SM+FuFFN", rank=2, n_layer=3)
    two_alone_follow(convert(directory), partial(reference, directory), [5, 7, 2], tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loops": 4}, "loops: 6 layers are not 4 times as many blocks"),
        ({"loops": 0}, "loops"),
        ({"rank": 24}, "rank: 24 is not below n_embd, 24"),
        ({"rank": 3}, r"differences\.0\.attn_c_attn\.down: shape \[24, 2\], expected \[24, 3\]"),
        ({"rank": 0}, r"differences\.0\.attn_c_attn\.down: surplus"),
        ({"ffn_scaled": True}, "ffn_scaled: a scale of the residual would make each loop's weights others"),
        ({"ffn": "identity"}, "loops take 'gelu', 'relu' or 'fused'"),
        ({"loop": 2}, "loop: unknown field; did you mean loops?"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told_in_a_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    refused(saved(tmp_path, "SM+FuFFN", rank=2), told, **changes)


def test_a_weight_that_is_nobodys_is_refused(tmp_path: Path) -> None:
    """A kept lowering whose sharing was changed, or whose weights lack one that is shared."""
    lowered = convert(saved(tmp_path / "checkpoint", "SM+FuFFN", rank=1, n_layer=3))
    lowered.save(tmp_path / "lowered")
    structure, weights = tmp_path / "lowered" / "lowered.json", tmp_path / "lowered" / "weights.safetensors"
    told = structure.read_text()
    structure.write_text(told.replace('"shared_with": "h.0.attn.c_attn.linear"', '"shared_with": "h.0.attn.c_proj.linear"'))
    with pytest.raises(ConfigError, match=r"shares the weight of h\.0\.attn\.c_proj\.linear, which has none of its size before it|missing"):
        Lowered.load(tmp_path / "lowered")
    structure.write_text(told)
    tensors = load_file(weights)
    del tensors["h.0.attn.c_attn.linear.weight"]
    save_file(tensors, weights)
    with pytest.raises(ConfigError, match=r"h\.0\.attn\.c_attn\.linear\.weight: missing"):
        Lowered.load(tmp_path / "lowered")
