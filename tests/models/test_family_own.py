"""A family that is defined here, in one class and its module: it converts, generates over its state, and is explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.models.base import Config, Decoder, Family, families
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from protocols.errors import ConfigError
from tests.support.trio import trio

PROMPT, NEW = [3, 1, 4, 1, 5], 6


class OwnConfig(Config):
    """Two fields beside those that all families have."""

    widening: int = 2
    parallel: bool = False


class OwnBlock(nn.Module):
    """Attention and a ReLU FFN, each beside a residual, or both beside one."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        width, inner = config.n_embd, config.widening * config.n_embd
        self.heads, self.parallel = config.n_head, config.parallel
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (part(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, tokens, width)
        after = x + self.out(y)
        return after + self.down(F.relu(self.up(x if self.parallel else after)))


class OwnModel(Decoder):
    """Two such blocks between an embedding with positions and a head of its own."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens, self.positions = nn.Embedding(config.vocab_size, config.n_embd), nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.ModuleList(OwnBlock(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class Own(Family):
    """Registered by its definition."""

    model_type = "own"
    state = ("keys", "values")
    config = OwnConfig
    decoder = OwnModel


@pytest.fixture(params=[False, True], ids=["one after the other", "parallel"])
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    config = OwnConfig(model_type="own", vocab_size=61, n_positions=24, n_embd=16, n_layer=2, n_head=2, parallel=request.param)
    model, generator = OwnModel(config), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.35 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(model, config, tmp_path / "checkpoint", torch.float32)
    return tmp_path / "checkpoint"


def test_it_converts_generates_and_is_explained(checkpoint: Path) -> None:
    model, _, _ = load_checkpoint(checkpoint)
    lowered = convert(checkpoint)
    assert (lowered.info.variant, lowered.info.layers) == ("own", 2)
    assert ("slice" in {node.op for node in lowered.graph.nodes}) == model.config.parallel  # of what q, k, v and the FFN read in one
    with trio(lowered) as parties, parties.client(fresh=True) as client:
        tokens = [token.id for token in client.generate(ids=PROMPT, max_new_tokens=NEW, logits=True)]
        logits, result = client.logits, client.result
    assert result is not None and len(tokens) == NEW
    for done, found in enumerate(logits):
        with torch.no_grad():
            exact = model(torch.tensor([PROMPT + tokens[:done]]))[0, -1]
        assert float((found - exact).abs().max()) < 0.02 + 2.0**-8
    total = explain(lowered, len(PROMPT), new_tokens=NEW, logits=True)["total"]
    assert (total["online_bytes"], total["rounds"]) == (result["traffic"]["online"]["payload"], result["traffic"]["online"]["rounds"])


def test_its_checkpoints_are_read_strictly(checkpoint: Path) -> None:
    assert {"aero", "gpt2", "own"} <= set(families())
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "widening": "much"}))
    with pytest.raises(ConfigError, match="widening"):
        convert(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({**config, "widening": 3}))
    with pytest.raises(ConfigError, match=r"blocks\.0\.up\.weight: shape"):
        convert(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    with pytest.raises(ConfigError, match="'other' is not supported"):
        convert(checkpoint)


def test_what_it_says_that_it_keeps_is_what_its_operators_keep(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "state", ("hidden",))
    with pytest.raises(ConfigError, match="keep hidden between tokens, and its operators keep keys, values"):
        convert(checkpoint)
