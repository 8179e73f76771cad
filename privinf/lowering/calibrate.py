"""Value ranges: the float graph runs on calibration inputs, and the largest magnitude of every value is kept.

The ring plan is made from these. They come from the weights and stay at the server; only the plan, in coarse widths, is public.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.graph.node import Node
from privinf.graph.planning import power_of_two
from privinf.ops.last_position import every_position
from protocols.errors import ConfigError

Ranges = dict[str, dict[str, float]]

WINDOW = 128  # positions of one calibration input
WINDOWS = 8
SINGLE_TOKENS = 16


def calibrate(graph: Graph, inputs: Sequence[Sequence[Tensor]], headroom: float = 4.0, *, scored: bool = False) -> Ranges:
    """What `peaks` finds, each multiplied by `headroom` and rounded up to a power of two.

    `PART_seen` is the largest itself, where a node keeps that too. What is computed of the last position alone has been seen on a row
    for each input: of a graph that also takes prompts to be `scored`, it is seen on every row of the windows too, with half the headroom.
    """
    if not (math.isfinite(headroom) and headroom >= 1.0):
        raise ConfigError(f"headroom must be at least 1, not {headroom}")
    found = peaks(graph, inputs)
    ranges = {name: {part: power_of_two(peak * headroom) for part, peak in entry.items()} for name, entry in found.items()}
    with every_position():
        windows = [values for values in inputs if 1 < values[0].numel() <= WINDOW] if scored else []
        for name, entry in peaks(graph, windows).items():
            for part, peak in entry.items():
                ranges[name][part] = max(ranges[name][part], power_of_two(peak * max(1.0, headroom / 2)))
    for node in graph.nodes:
        ranges[node.name] |= {f"{part}_seen": found[node.name][part] for part in node.peaks_kept}
    return ranges


def peaks(graph: Graph, inputs: Sequence[Sequence[Tensor]]) -> Ranges:
    """For every float input and node the largest |output| as `out`, and those of what a node measures besides (`Node.measure`).

    ConfigError where a value is not finite.
    """
    found: Ranges = {}

    def note(name: str, part: str, value: Tensor) -> None:
        peak = max(abs(float(end)) for end in value.aminmax())
        if not math.isfinite(peak):
            raise ConfigError("a value is not finite on these inputs", layer=name)
        entry = found.setdefault(name, {})
        entry[part] = max(peak, entry.get(part, 0.0))

    def observe(node: Any, operands: tuple[Any, ...], output: Any) -> None:
        note(node.name, "out", output)
        for part, value in node.measure(operands, output):
            note(node.name, part, value)

    with torch.no_grad():
        for values in inputs:
            for name, value in zip(graph.input_names, values, strict=True):
                if value.is_floating_point():
                    note(name, "out", value.float())
            graph(*(value.float() if value.is_floating_point() else value for value in values), observe=observe)
    return found


def beyond(graph: Graph, ranges: Ranges, inputs: Sequence[Tensor]) -> list[str]:
    """A line for each value that leaves the range that the rings are planned for on these inputs, where a ring may have wrapped."""
    lines = []
    nodes = {node.name: node for node in graph.nodes}
    for name, entry in peaks(graph, [inputs]).items():
        node = nodes.get(name) or Node(name)  # of an input nothing else is known
        for part, peak in entry.items():
            bound = node.bound_of(part, ranges.get(name, {}))
            if peak > bound:
                lines.append(f"{name}: {node.name_of(part)} of {peak:.3g} is beyond the planned {bound:g}")
    return lines


def calibration_ids(tokenizer: bytes | None, vocab: int, n_positions: int) -> Iterator[tuple[Tensor]]:
    """Inputs (1, T) for a converted checkpoint: windows of the shipped text, single tokens, and one input of full length.

    Without a tokenizer, or where its ids are not the model's, random ids (from a fixed seed) stand in for the text.
    """
    generator = torch.Generator().manual_seed(20250101)
    needed = max(WINDOW * WINDOWS, n_positions)
    ids = text_ids(tokenizer, vocab)
    while 0 < len(ids) < needed:
        ids = ids + ids
    if not ids:
        ids = torch.randint(vocab, (needed,), generator=generator).tolist()
    window = min(WINDOW, n_positions)
    for start in range(0, window * WINDOWS, window):
        yield (torch.tensor([ids[start : start + window]]),)
    for start in range(0, len(ids), max(1, len(ids) // SINGLE_TOKENS)):
        yield (torch.tensor([ids[start : start + 1]]),)
    yield (torch.tensor([ids[:n_positions]]),)


def text_ids(tokenizer: bytes | None, vocab: int) -> list[int]:
    """Ids below `vocab` of the text that every network is calibrated on; none without a tokenizer, ConfigError if it is none."""
    if tokenizer is None:
        return []
    from tokenizers import Tokenizer  # only here: loading it is not free

    try:
        encoder = Tokenizer.from_buffer(tokenizer)
    except Exception as error:
        raise ConfigError(f"tokenizer.json: not a tokenizer: {error}") from None
    text = resources.files("privinf.lowering").joinpath("calibration.txt").read_text("utf-8")
    return [number for number in encoder.encode(text).ids if number < vocab]
