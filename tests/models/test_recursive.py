"""Blocks that run in loops: a shared weight is masked and sent once, whatever each loop adds to it, and private passes follow float."""

from __future__ import annotations

import json
import math
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
from tests.support.alone import Alone
from tests.support.duo import duo
from tests.support.ladder import IDS, LOGIT_ERROR, walker
from tests.support.trio import trio
from tests.support.two_party import Weights

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
    w, fields = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    w = {name: tensor.double() for name, tensor in w.items()}
    heads, count, loops = fields["n_head"], len(ids), fields["loops"]
    blocks = fields["n_layer"] // loops
    x = w["wte.weight"][list(ids)] + w["wpe.weight"][:count]
    width = x.shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        if fields["norm"] == "none":
            return x
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    for loop in range(loops):
        for block in range(blocks):

            def apply(x: Tensor, name: str, block: int = block, layer: int = loop * blocks + block) -> Tensor:
                y = x @ w[f"h.{block}.{name}.weight"] + w[f"h.{block}.{name}.bias"]
                own = f"differences.{layer}.{name.replace('.', '_')}"
                return y + x @ w[f"{own}.down"] @ w[f"{own}.up"] if f"{own}.up" in w else y

            q, k, v = apply(norm(x, f"h.{block}.ln_1"), "attn.c_attn").reshape(count, 3, heads, width // heads).permute(1, 2, 0, 3)
            if f"h.{block}.attn.temperature" in w:
                q = q / w[f"h.{block}.attn.temperature"][:, :count, None]
            scores = q @ k.mT / math.sqrt(width // heads) + torch.full((count, count), -math.inf).double().triu(1)
            x = x + apply((scores.softmax(-1) @ v).transpose(0, 1).reshape(count, width), "attn.c_proj")
            y = norm(x, f"h.{block}.ln_2")
            x = x + (apply(y, "mlp.fused") if fields["ffn"] == "fused" else apply(apply(y, "mlp.c_fc").relu(), "mlp.c_proj"))
    return norm(x, "ln_f") @ w.get("lm_head.weight", w["wte.weight"]).T


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
    lowered, sources = convert(directory), list[Alone]()
    maps = [node for node in lowered.graph.nodes if node.op == "shared_linear"]
    loops, layers = fields.get("loops", 3), fields.get("n_layer", 6)
    assert len([node for node in maps if node.shared_with is None]) * loops == len(maps)
    assert {node.layer for node in maps if node.shared_with is None} == {f"h.{block}" for block in range(layers // loops)}
    assert all(("down" in node.parameter_shapes) == bool(fields["rank"]) for node in maps)

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
    assert 0 <= rounds[0] - rounds[1] <= (4 if rank else 0)  # a wider ring may cost a row that stands alone an exchange, in each pass
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
    directory, prompt = saved(tmp_path / "checkpoint", "SM+FuFFN", rank=2, n_layer=3), [5, 7, 2, 11, 3]
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


def test_two_parties_alone_generate(tmp_path: Path) -> None:
    directory = saved(tmp_path / "checkpoint", "SM+FuFFN", rank=2, n_layer=3)
    with duo(convert(directory), cache=tmp_path / "cache") as pair, pair.client(fresh=True) as client:
        tokens = [token.id for token in client.generate(ids=[5, 7, 2], max_new_tokens=3, logits=True, ignore_eos=True)]
        found = torch.stack(client.logits).reshape(3, -1)
    assert float((found - reference(directory, [5, 7, 2, *tokens[:-1]])[2:]).abs().max()) < LOGIT_ERROR


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
    directory = saved(tmp_path, "SM+FuFFN", rank=2)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ConfigError, match=told) as caught:
        load_checkpoint(directory)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


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
