"""Every network of the ladder, private against float: in-process parties, the same program as over a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from privinf.crypten_adapter import crypten_module
from privinf.graph.private import Runtime, encode_weights, weights_of
from privinf.lowering import convert, lower
from privinf.lowering.program import module_output
from privinf.models.aero import AeroModel
from privinf.models.checkpoint import save_checkpoint
from privinf.training.initial import initialise
from privinf.training.ladder import ladder_config
from protocols.party import Party
from tests.support.ladder import IDS, LADDER, LOGIT_ERROR, float_logits, logit_error, make, run
from tests.support.two_party import execute, offline_walk


@pytest.mark.parametrize("variant", LADDER)
def test_logits_and_cost(tmp_path: Path, variant: str) -> None:
    lowered, model = make(tmp_path, variant)
    outcome = run(lowered, IDS)
    assert float((outcome.client.reshape(-1) - float_logits(model, IDS)).abs().max()) < LOGIT_ERROR
    online, offline = outcome.counted["online"], outcome.counted["offline"]
    assert (online["payload"], online["rounds"]) == (outcome.predicted.online_bytes, outcome.predicted.rounds)
    assert offline["payload"] == outcome.predicted.peer_offline_bytes


@pytest.mark.parametrize("length", [1, 2, 16])
def test_lengths(tmp_path: Path, length: int) -> None:
    lowered, model = make(tmp_path, "SM+LN+G")
    assert logit_error(lowered, model, (IDS * 2)[:length]) < LOGIT_ERROR


def test_odd_sizes(tmp_path: Path) -> None:
    """One head, an odd head width, a vocabulary that is no power of two."""
    lowered, model = make(tmp_path, "SM+LN+R", n_head=1, n_embd=15, vocab_size=197)
    ids = tuple(i % 197 for i in IDS)
    assert logit_error(lowered, model, ids) < LOGIT_ERROR
    exact = float_logits(model, ids)
    chosen = int(run(lowered, ids, logits=False).client)
    assert float(exact.max() - exact[chosen]) < 2 * LOGIT_ERROR


def test_small_ranges(tmp_path: Path) -> None:
    """Values far inside of GELU's edges still compare with them."""
    config = ladder_config("SM+LN+G", n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    model = AeroModel(config).eval()
    initialise(model, 0)
    save_checkpoint(model, config, tmp_path, torch.float32)
    assert logit_error(convert(tmp_path), model, (1, 2, 3)) < 0.01


@pytest.mark.parametrize(
    "module", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.LayerNorm(8), nn.RMSNorm(8), nn.Sequential(nn.GELU(), nn.Linear(8, 2))]
)
def test_a_nonlinearity_of_the_input_itself(module: nn.Module) -> None:
    x = torch.randn(2, 8) * 2
    lowered = lower(module.eval(), x)
    encoded = encode_weights(lowered.graph)
    weights = {name: (record, encoded[name]) for name, (record, _, _) in weights_of(lowered.graph).items()}

    def program(party: Party) -> torch.Tensor | None:
        known = x.to("meta") if offline_walk(party) else x if not party.is_server else torch.zeros_like(x)
        return module_output(lowered.graph, Runtime.of(lowered.graph, party), [known])

    assert float((execute(program, weights).client - module(x)).abs().max().detach()) < 0.01


def test_residual_outliers_at_the_first_position(tmp_path: Path) -> None:
    """Trained GPT-2s carry values of thousands there; LayerNorm, the rings of the residual stream and attention must hold them."""
    lowered, model = make(tmp_path, "SM+LN+G", outlier=3000.0)
    assert logit_error(lowered, model, IDS) < LOGIT_ERROR


def test_one_graph_on_stock_crypten_and_on_our_protocols(tmp_path: Path) -> None:
    """The same graph object; each output within its own fixed-point error of float's, hence of the other's."""
    crypten = crypten_module()
    if not crypten.is_initialized():
        crypten.init()
    lowered, model = make(tmp_path, "SM(t)+ScFuFFN")
    exact = float_logits(model, IDS).float()[None]
    ours = run(lowered, IDS).client.float()
    one_hot = torch.nn.functional.one_hot(torch.tensor([IDS]), lowered.info.vocab).float()
    stock = lowered.graph.encrypted_copy()(crypten.cryptensor(one_hot)).get_plain_text()
    torch.testing.assert_close(ours, exact, atol=LOGIT_ERROR, rtol=0)
    torch.testing.assert_close(stock, exact, atol=0.05, rtol=0)
    torch.testing.assert_close(ours, stock, atol=0.05 + LOGIT_ERROR, rtol=0)
