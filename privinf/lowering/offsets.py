"""Leaving out what is added to rows of scores where it does not spare them their maximum."""

from __future__ import annotations

from collections.abc import Mapping

from privinf.crypten_adapter import Graph
from privinf.graph.planning import Plan
from privinf.ops.attention.node import CausalAttention
from privinf.ops.linear import Linear


def without_idle_offsets(graph: Graph, plan: Mapping[str, Plan]) -> bool:
    """Takes the columns of offsets from the maps of all layers that have a maximum in this plan; whether there were any.

    A softmax does not see them, so that the graph's function is the same; ranges and plan are to be made anew.
    """
    makers, idle = {name: inputs[0] for name, _, inputs in graph.named_nodes() if inputs}, []
    for node in graph.nodes:
        if isinstance(node, CausalAttention) and node.row_offsets and node.name in plan and _maximum(plan[node.name]):
            node.row_offsets = False
            maker = graph.node(makers[node.name])
            assert isinstance(maker, Linear), "offsets are columns of the map that makes q, k and v"
            for key in maker.parameter_shapes:
                columns = maker.value(key)[..., : -node.heads].contiguous()
                maker._parameters[key] = columns
                maker.parameter_shapes[key] = tuple(columns.shape)
            idle.append(node.name)
    return bool(idle)


def _maximum(plan: Plan) -> bool:
    return isinstance(plan, CausalAttention.Plan) and plan.within is None
