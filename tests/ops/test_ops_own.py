"""An operator of somebody else's, defined here and nowhere in the package: the logistic function, by the softmax of a value and zero.

Class and rule are what CONTRIBUTING.md asks for, no more, and need `privinf.graph` alone. It lowers, is explained, and runs in float,
on stock CrypTen and privately.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import privinf
from privinf.crypten_adapter import crypten_module
from privinf.graph.builder import TABLE, Builder, Value, rule
from privinf.graph.node import NODE_KINDS, Node
from privinf.graph.planning import PassingPlan, Planning, Shown
from privinf.graph.private import PrivinfTensor, Runtime, encode_weights, weights_of
from protocols.errors import RangeError, UnsupportedOpError
from protocols.exponential import FRAC as SCORE_FRAC
from protocols.party import Party, Protocol_
from protocols.rows import Rows
from protocols.shares import Shares
from protocols.softmax import SCORE_BITS, softmax
from tests.support.two_party import execute, offline_walk

aten = torch.ops.aten
LARGEST = 120.0  # score that `softmax` is right for


class Sigmoid(Node):
    """1 / (1 + e^-x): (sigmoid(x), sigmoid(-x)) is the softmax of (x, 0)."""

    op = "sigmoid"
    rowwise = True

    def generic(self, x: Any, *others: Any) -> Any:
        return x.sigmoid()

    def make_plan(self, planning: Planning) -> PassingPlan:
        if (largest := planning.input_range(self.name, 0.0)) > LARGEST:
            raise RangeError(f"the logistic function of values up to {largest:g}", layer=self.name)
        return self.Plan(bits=planning.bits, frac=planning.frac)

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        shape, rows = x.shares.shape, Rows(2, x.shares.value.numel(), 0)
        pairs = x.shares.map(lambda v: rows.pack(torch.stack([v.reshape(1, -1), 0 * v.reshape(1, -1)], dim=-1)))  # (1, n, 2), packed
        halves = yield from softmax(x.party, pairs, rows, bits=self.plan.bits, frac=self.plan.frac)
        return halves.map(lambda v: rows.unpack(v)[..., 0].reshape(shape))

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        yield Shown("scores", SCORE_BITS, SCORE_FRAC, LARGEST, "protocol")


@rule(aten.sigmoid.default)
def sigmoid(b: Builder, x: Value) -> Value:
    """Of any shape."""
    return b.by_rows(Sigmoid, x)


# Other tests hold that there is no such operator: here it is known only while a test runs, and in processes that import `own_sigmoid`.
del NODE_KINDS["sigmoid"], TABLE[aten.sigmoid.default]


def register() -> None:
    """Make it known again."""
    NODE_KINDS["sigmoid"], TABLE[aten.sigmoid.default] = Sigmoid, [sigmoid]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NODE_KINDS, "sigmoid", Sigmoid)
    monkeypatch.setitem(TABLE, aten.sigmoid.default, [sigmoid])


@pytest.fixture
def x() -> torch.Tensor:
    return 3 * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3)).eval()


@pytest.fixture
def lowered(known: None, module: nn.Module, x: torch.Tensor) -> privinf.Lowered:
    return privinf.lower(module, x)


def test_without_it_the_module_does_not_lower(module: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(UnsupportedOpError, match=r"1 \(Sigmoid\): aten.sigmoid"):
        privinf.lower(module, x)


def test_it_is_recognised_and_runs_on_floats_and_on_stock_crypten(lowered: privinf.Lowered, module: nn.Module, x: torch.Tensor) -> None:
    assert [node.op for node in lowered.graph.nodes] == ["linear", "sigmoid", "linear"]
    torch.testing.assert_close(lowered.graph(x), module(x))
    crypten = crypten_module()
    if not crypten.is_initialized():
        crypten.init()
    stock = lowered.graph.encrypted_copy()(crypten.cryptensor(x)).get_plain_text()
    torch.testing.assert_close(stock, module(x), atol=0.05, rtol=0)


def test_it_is_explained_and_costs_what_is_predicted(lowered: privinf.Lowered, module: nn.Module, x: torch.Tensor) -> None:
    from privinf.lowering.explain import explain
    from privinf.lowering.program import module_output

    predicted = explain(privinf.Lowered.from_bundle(lowered.bundle()))  # as the client can
    (cost,) = [op for op in predicted["ops"] if op["op"].endswith("sigmoid")]
    assert cost["online_bytes"] > 0 and cost["rounds"] > 0 and cost["dealer_bytes"] > 0
    shown = [wire["wire"] for wire in predicted["wires"] if wire["op"] == cost["op"]]
    assert shown == ["scores", "output"]
    encoded = encode_weights(lowered.graph)
    weights = {name: (record, encoded[name]) for name, (record, _, _) in weights_of(lowered.graph).items()}

    def program(party: Party) -> torch.Tensor | None:
        given = x.to("meta") if offline_walk(party) else x if not party.is_server else torch.zeros_like(x)
        return module_output(lowered.graph, Runtime.of(lowered.graph, party), [given])

    outcome = execute(program, weights)
    assert float((outcome.client - module(x).detach()).abs().max()) < 0.01
    online, total = outcome.counted["online"], predicted["total"]
    assert (online["payload"], online["rounds"]) == (total["online_bytes"], total["rounds"])


def test_its_domain_is_its_own_to_refuse(known: None, module: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(RangeError, match="the logistic function of values up to"):
        privinf.lower(module, 1000 * x)


def test_three_processes_know_it_by_an_entry_point(
    lowered: privinf.Lowered, module: nn.Module, x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an installed distribution brings it: a module, and its name under `privinf.ops`."""
    site = tmp_path / "site"
    information = site / "own_sigmoid-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "own_sigmoid.py").write_text("from tests.ops.test_ops_own import register\n\nregister()\n")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: own-sigmoid\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[privinf.ops]\nown_sigmoid = own_sigmoid\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(Path(__file__).parents[2])]))
    with privinf.local_session(lowered, cache=tmp_path / "cache") as session:
        found = session.run(x)
        assert float((found - module(x).detach()).abs().max()) < 0.01
        assert session.traffic["online"]["payload"] == session.costs["total"]["online_bytes"]
