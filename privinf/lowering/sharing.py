"""Weights that blocks of a network have in common, found again in its lowered graph: one node has each, the others name it.

A network whose blocks run several times is lowered as if each run were a block of its own, by the passes that every network goes through:
biases, scales and neighbouring maps go into its matrices. Then each matrix is what the network without differences has there, the same in
every run, and a difference whose rank follows from what was joined, whatever the weights are.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.graph.node import Node
from privinf.models.base import Sharing
from privinf.ops.joint_linear import JointLinear
from privinf.ops.linear import Linear
from privinf.ops.shared_linear import SharedLinear
from protocols.errors import UnsupportedOpError

CLOSE = 1e-4  # of the largest entry: how near a matrix must be to what is put in its place


def share(graph: Graph, plain: Graph, sharing: Sharing) -> Graph:
    """The same graph with a `SharedLinear` in place of each linear map of the shared layers. `plain`: the network's without differences."""
    runs = {layer: run for run in sharing.runs for layer in run}
    owners: dict[tuple[Any, ...], Node] = {}
    users: dict[str, int] = defaultdict(int)
    found = Graph(graph.input_names, graph.output_names)
    for (_, node, inputs), (_, base, _) in zip(graph.named_nodes(), plain.named_nodes(), strict=True):
        if type(node) in (Linear, JointLinear) and node.layer in runs:
            # a map of this name and size is the same in every layer of its run
            place = (runs[node.layer], type(node), node.name.removeprefix(node.layer), node.parameter_shapes["weight"])
            owner = owners.setdefault(place, base)
            node = _shared(node, owner, sharing.rank * len(inputs))
            users[owner.name] += 1
        found.append(node, inputs)
    if any(users[owner.name] != len(place[0]) for place, owner in owners.items()):
        raise UnsupportedOpError("the blocks that share weights are not lowered alike", remedy="they must be the same modules")
    found.eval()
    return found


def _shared(node: Node, owner: Node, rank: int) -> SharedLinear:
    weight: Tensor = owner.value("weight")
    values: dict[str, Any] = {"weight": weight, "bias": node.maybe("bias")}
    if owner.name != node.name:
        values["shared_with"] = owner.name
    rank = min(rank, *weight.shape)
    difference = node.value("weight").double() - weight.double()
    if rank:
        values["down"], values["up"] = _factors(difference, rank)
        difference = difference - values["down"] @ values["up"]
    if float(difference.abs().max()) > CLOSE * float(node.value("weight").abs().max()):
        raise UnsupportedOpError(f"{node.name}: what its loop adds to a shared weight is of a higher rank than {rank}")
    return SharedLinear(node.name, node.layer, **values)


def _factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(in, r) and (r, out), equally large, whose product is a matrix of at most this rank."""
    left, sizes, right = torch.linalg.svd(difference, full_matrices=False)
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
