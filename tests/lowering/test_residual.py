"""Maps that follow each other along a stream become one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from privinf.crypten_adapter import Graph
from privinf.lowering import lower, residual
from privinf.lowering.explain import explain
from tests.support.lowering_modules import WIDTH

FLOAT = 2e-5  # of two float32 evaluations in different order, values of order 1


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


class Residual(nn.Module):
    """Two maps along a stream, the second of which something else may read, or which something may stand before."""

    def __init__(self, *, shared: bool = False, bias: bool = True, turned: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2 * WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.shared, self.turned = shared, turned

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        s = self.a(y * y) + x if self.turned else x + self.a(y * y)
        out = self.b(s) + s if self.turned else s + self.b(s)
        return out + s * s if self.shared else out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_maps_that_follow_each_other_along_a_stream_are_one(bias: bool, turned: bool) -> None:
    module, inputs = Residual(bias=bias, turned=turned), [torch.randn(1, 5, WIDTH), torch.randn(1, 5, 2 * WIDTH)]
    lowered = lower(module, inputs)
    assert ops(lowered.graph).count("joint_linear") == 1 and "linear" not in ops(lowered.graph)
    with torch.no_grad():
        torch.testing.assert_close(lowered.graph(*inputs), module(*inputs), rtol=FLOAT, atol=FLOAT)


def test_a_stream_that_is_read_between_its_maps_keeps_both() -> None:
    module, inputs = Residual(shared=True), [torch.randn(1, 5, WIDTH), torch.randn(1, 5, 2 * WIDTH)]
    graph = lower(module, inputs).graph
    assert ops(graph) == ["mul", "joint_linear", "linear", "add", "add", "mul", "add"], "the second map reads what the first one does"
    with torch.no_grad():
        torch.testing.assert_close(graph(*inputs), module(*inputs), rtol=FLOAT, atol=FLOAT)


class Stream(nn.Module):
    """A stream that maps add to, each followed by what reads it: a product in place of attention, and a head."""

    def __init__(self, *, fused: bool, bias: bool) -> None:
        super().__init__()
        self.read = nn.ModuleList([nn.Linear(WIDTH, 2 * WIDTH, bias=bias) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(2 * WIDTH, WIDTH, bias=bias) for _ in range(2)])
        self.mlp = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 7, bias=bias)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        for read, out, mlp in zip(self.read, self.out, self.mlp, strict=True):
            y = read(x)
            x = x + out(y * y)
            x = x + mlp(x) if self.fused else x
        return self.head(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_what_reads_a_stream_does_not_wait_for_its_truncation(fused: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function in fewer rounds, the last sum not made at all; not where it is worth less than its weights."""
    module, x = Stream(fused=fused, bias=bias), torch.randn(1, 5, WIDTH)
    lowered = lower(module, x)
    first = "joint_linear" if fused else "linear"
    assert ops(lowered.graph) == ["linear", "mul", "joint_linear", first, "add", "mul", "joint_linear"]
    with torch.no_grad():
        torch.testing.assert_close(lowered.graph(x), module(x), rtol=FLOAT, atol=FLOAT)
    monkeypatch.setattr(residual, "MOST_ADDED", 2 * WIDTH * (2 * WIDTH + 7) - 1)
    plain = lower(module, x)
    assert ops(plain.graph) == ["linear", "mul", first, "add", "linear", "mul", first, "add", "linear"]
    joint, apart = (explain(each)["total"]["rounds"] for each in (lowered, plain))
    assert joint <= apart - 2
