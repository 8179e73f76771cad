"""How much a network enlarges what it is off by in one place: noise is put there, and the logits are compared.

Fraction bits are spent where it counts (`privinf.ops.attention.scores`): a rounding of a first layer may reach the logits enlarged by
hundreds where a later layer's rows have two large scores that are nearly equal. A few passes of the float graph say it; like the ranges
these numbers come from the weights and stay at the server, and the plan has a bit of each that is beyond a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.ops.last_position import every_position

NOISE = 2.0**-12  # standard deviation of what is added, of a weight for inputs of norm 1
POSITIONS = 192  # of calibration that are looked at, a window at least
WORTH = {"score": 16.0, "weight": 600.0, "table": 0.0}
"""Two thirds of the thresholds: where all places of a kind together have no more than that, none is looked at alone."""

Place = tuple[Any, str]  # a node and a part


def gains(graph: Graph, inputs: Sequence[Sequence[Tensor]]) -> Iterator[tuple[str, str, float]]:
    """(node, `PART_gain`, gain) of the parts that are `inexact` in softmax attention, in the maps that it reads and in a table of its own.

    A gain is the largest change of a logit at any position, for noise of a standard deviation of 1. Those of a kind that are small together
    are left out. Nothing in networks without such attention.
    """
    inputs = _chosen(inputs)
    makers = [graph.node(source) for _, node, (source, *_) in graph.named_nodes() if "score" in node.inexact]
    if not makers or not inputs:
        return
    with torch.no_grad(), every_position():
        exact = [graph(*values) for values in inputs]
        tied = {node.tied_to for node in graph.nodes}
        for part, worth in WORTH.items():
            nodes = [node for node in (makers if part == "weight" else graph.nodes) if part in node.inexact and node.name not in tied]
            if _gain(graph, inputs, exact, [(node, part) for node in nodes]) <= worth:
                continue
            for node in nodes:
                yield node.name, f"{part}_gain", _gain(graph, inputs, exact, [(node, part)])


def _chosen(inputs: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """The first windows, so many that they have `POSITIONS` together; one at least."""
    found: list[Sequence[Tensor]] = []
    for values in inputs:
        size = values[0].numel()
        if 1 < size <= POSITIONS and size * (len(found) + 1) <= POSITIONS:
            found.append(values)
    return found


def _gain(graph: Graph, inputs: Sequence[Sequence[Tensor]], exact: Sequence[Tensor], places: Sequence[Place]) -> float:
    """The largest change of a logit where these places are noisy."""
    if not places:
        return 0.0
    with _noisy(places):
        return max(float((graph(*values) - logits).abs().max()) for values, logits in zip(inputs, exact, strict=True)) / NOISE


@contextmanager
def _noisy(places: Sequence[Place]) -> Iterator[None]:
    generator = torch.Generator().manual_seed(20250102)
    try:
        for node, part in places:
            setattr(node, node.inexact[part], _with_noise(getattr(node, node.inexact[part]), part, generator))
        yield
    finally:
        for node, part in places:
            node.__dict__.pop(node.inexact[part], None)


def _with_noise(method: Callable[..., Tensor], part: str, generator: torch.Generator) -> Callable[..., Tensor]:
    def made(*operands: Tensor) -> Tensor:
        found = method(*operands)
        noise = NOISE * torch.randn(found.shape, generator=generator)
        if part == "weight":  # a row of inputs times the roundings of a column
            noise = noise * torch.cat(operands, -1).norm(dim=-1, keepdim=True)
        return found + noise

    return made
