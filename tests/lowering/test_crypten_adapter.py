"""The adapter: CrypTen imports on this torch, its graph's two weaknesses are gone, and private values take their own path."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
from typing import Any

import pytest
import torch

from privinf.crypten_adapter import CrypTensor, Graph, Module, PrivateValue, crypten_module
from privinf.graph.node import NODE_KINDS, Node
from privinf.ops.add import Add
from privinf.ops.cat import Cat
from privinf.ops.linear import Linear
from privinf.ops.mul import Mul
from privinf.ops.mul_constant import MulConstant


def graph_of(*nodes: tuple[Any, list[str]], inputs: tuple[str, ...] = ("x",)) -> Graph:
    graph = Graph(inputs, [nodes[-1][0].name])
    for node, reads in nodes:
        graph.append(node, reads)
    graph.eval()
    return graph


def test_crypten_works_on_this_torch(crypten: Any) -> None:
    x = torch.tensor([1.0, -2.0, 3.5])
    torch.testing.assert_close(crypten.cryptensor(x).get_plain_text(), x, atol=1e-3, rtol=0)


def test_a_graph_is_a_crypten_graph() -> None:
    graph = graph_of((Add("double"), ["x", "x"]))
    nn = crypten_module().nn
    assert isinstance(graph, nn.Graph) and isinstance(graph.nodes[0], nn.Module) and isinstance(graph.nodes[0], nn.Add)
    assert issubclass(Module, nn.Module)


def test_a_node_may_read_a_value_twice(crypten: Any) -> None:
    graph = graph_of(
        (Add("double"), ["x", "x"]), (Mul("square"), ["double", "double"]), (Cat("both", dim=0), ["square", "double", "square"])
    )
    x = torch.tensor([[1.0, -3.0]])
    expected = torch.cat([4 * x * x, 2 * x, 4 * x * x])
    torch.testing.assert_close(graph(x), expected)
    torch.testing.assert_close(graph.encrypted_copy()(crypten.cryptensor(x)).get_plain_text(), expected, atol=1e-2, rtol=0)


def test_long_graphs_run_in_linear_time() -> None:
    """Upstream looks through all nodes after each one: ten thousand nodes would take minutes."""
    count = 10_000
    names = ["x", *(f"n{i}" for i in range(count))]
    graph = graph_of(*((MulConstant(name, constant=1.0), [before]) for before, name in itertools.pairwise(names)))
    start = time.thread_time()  # of the processor, which others do not lengthen
    assert float(graph(torch.ones(1))) == 1.0
    assert time.thread_time() - start < 30


def test_values_are_freed_after_their_last_reader() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    seen: list[int] = []

    def observe(node: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        gc.collect()
        seen.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(output))

    names = ["x", *(f"n{i}" for i in range(6))]
    graph = graph_of(*((MulConstant(name, constant=2.0), [before]) for before, name in itertools.pairwise(names)))
    graph(torch.ones(1), observe=observe)
    assert max(seen) <= 1  # the operand of the node that runs


def test_inputs_are_counted_and_several_outputs_come_as_a_tuple() -> None:
    graph = Graph(["x", "y"], ["sum", "x"])
    graph.append(Add("sum"), ["x", "y"])
    one, two = torch.ones(1), torch.full((1,), 2.0)
    found = graph(one, two)
    assert isinstance(found, tuple) and float(found[0]) == 3.0 and found[1] is one
    with pytest.raises(ValueError, match="takes 2 inputs"):
        graph(one)


def test_an_encrypted_copy_leaves_the_graph_alone(crypten: Any) -> None:
    graph = graph_of((Linear("map", weight=torch.eye(2), bias=torch.ones(2)), ["x"]))
    twin = graph.encrypted_copy()
    assert twin.encrypted and isinstance(twin.node("map").value("weight"), CrypTensor)
    assert not graph.encrypted and isinstance(graph.node("map").value("weight"), torch.Tensor)
    with pytest.raises(RuntimeError, match="unencrypted model"):
        graph(crypten.cryptensor(torch.ones(1, 2)))


EXAMPLES: dict[str, dict[str, Any]] = {
    "embedding": {"weight": (5, 2)},
    "position_bias": {"weight": (5, 2)},
    "linear": {"weight": (2, 3)},
    "joint_linear": {"weight": (4, 3)},
    "shared_linear": {"weight": (4, 3)},
    "scale": {"weight": (2,)},
    "bias": {"weight": (2,)},
    "mul_constant": {"constant": 2.0},
    "add_constant": {"constant": 2.0},
    "attention": {"heads": 2, "head_dim": 3},
    "relu_attention": {"heads": 2, "head_dim": 3},
    "max_plus": {"weight": (2, 3)},
    "max_plus_attention": {"heads": 2, "head_dim": 3},
    "reshape": {"shape": [2]},
    "permute": {"dims": [1, 0]},
    "slice": {"dim": 0, "start": 0, "stop": 1},
    "select": {"dim": 0, "index": 0},
    "cat": {"dim": 0},
    "repeat": {"dim": 0, "times": 2},
    "rotary": {"rotation": {"width": 2}},
    "scan": {"heads": 2, "shifts": [1, 2]},
    "spread": {"each": 2},
    "taps": {"weight": (2, 1, 3)},
    "ttt": {"weight": (2, 3, 3), "batch": 4},
}


class Bare(PrivateValue):
    def __init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize("op", NODE_KINDS)
def test_a_private_value_is_the_nodes_own_to_run(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an unencrypted graph with or without weights, through CrypTen's own call path."""
    calls: list[int] = []

    def run(self: Node, x: Any, *others: Any) -> Any:
        calls.append(len(others))
        return x

    monkeypatch.setattr(NODE_KINDS[op], "run", run)
    node = NODE_KINDS[op]("node", **EXAMPLES.get(op, {}))
    count = 3 if node.arity is None else node.arity
    graph = graph_of((node, ["x"] * count))
    value = Bare()
    assert graph(value) is value and graph.forward(value) is value
    assert calls == [count - 1] * 2
    rebuilt = NODE_KINDS[op].from_attributes("node", "", node.attributes(), node.parameter_shapes)
    assert rebuilt.attributes() == node.attributes() and rebuilt.parameter_shapes == node.parameter_shapes
