"""The ring plan of a whole graph: each node makes its own part (`privinf.graph.planning`), the ring between nodes is found here."""

from __future__ import annotations

from collections.abc import Mapping

from privinf.crypten_adapter import Graph
from privinf.graph.info import Info
from privinf.graph.planning import FRAC, Plan, Planning, bits_for, up


def plan_rings(graph: Graph, ranges: Mapping[str, Mapping[str, float]], info: Info) -> dict[str, Plan]:
    """The plan of every node: `ranges` gives the largest size (headroom included) of each node's `out`, and of what it measures besides.

    RangeError where a value cannot fit: a score above what was calibrated for, or a wire of more than 64 bits.
    """
    planning = Planning(graph, ranges, info)
    for node in graph.nodes:
        planning.plans[node.name] = node.make_plan(planning)
    widest = max(plan.needs for plan in planning.plans.values())
    planning.bits = max(up(widest), *(bits_for(name, FRAC, planning.out(name)) for name in planning.plans))
    return {node.name: node.make_plan(planning) for node in graph.nodes}
