"""Maps that follow each other along a stream become one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from privinf.crypten_adapter import Graph
from privinf.lowering import lower
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
    graph = lower(Residual(shared=True), [torch.randn(1, 5, WIDTH), torch.randn(1, 5, 2 * WIDTH)]).graph
    assert "joint_linear" not in ops(graph) and ops(graph).count("linear") == 2
