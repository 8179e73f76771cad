"""Value ranges: the float graph runs on calibration inputs, and the largest magnitude of every value is kept.

The ring plan is made from these. They come from the weights and stay at the server; only the plan, in coarse widths, is public.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.graph.node import Node
from privinf.graph.planning import power_of_two
from privinf.lowering.gains import gains
from privinf.ops.last_position import every_position
from protocols.errors import ConfigError

Ranges = dict[str, dict[str, float]]

WINDOW = 128  # positions of one calibration input
WINDOWS = 8
SINGLE_TOKENS = 16
REPEATED = 24  # tokens of which each is seen again and again
WIDEST = 16.0

log = logging.getLogger("privinf.lowering")


def calibrate(
    graph: Graph,
    inputs: Sequence[Sequence[Tensor]],
    headroom: float = 4.0,
    *,
    scored: bool = False,
    again: Sequence[Sequence[Tensor]] = (),
) -> Ranges:
    """What `peaks` finds, each multiplied by `headroom` and rounded up to a power of two.

    `PART_seen` is the largest itself, where a node keeps that too. What is computed of the last position alone has been seen on a row
    for each input: of a graph that also takes prompts to be `scored`, it is seen on every row of the windows too, with half the headroom.
    `again`, of one token again and again, has half of it too: a range becomes `WIDEST` times that of the others at most. What is beyond
    that stays as it is, with a warning: it is of networks that run away on such inputs, in float too. What is `scored` has `gains` too.
    """
    if not (math.isfinite(headroom) and headroom >= 1.0):
        raise ConfigError(f"headroom must be at least 1, not {headroom}")
    found, every = _Peaks(), _Peaks()
    late = after_the_last(graph, inputs[0]) if scored else set()
    wanted = {read for name, _, reads in graph.named_nodes() if name in late for read in reads} - late - set(graph.input_names)
    for values in inputs:
        row = late and 1 < values[0].numel() <= WINDOW
        before = found.add(graph, values, kept=wanted if row else ())
        if row:
            with every_position():
                every.add(graph, values, only=late, given=before)
    ranges = {name: {part: power_of_two(peak * headroom) for part, peak in entry.items()} for name, entry in found.largest.items()}
    for name, entry in every.largest.items():
        for part, peak in entry.items():
            ranges[name][part] = max(ranges[name][part], power_of_two(peak * max(1.0, headroom / 2)))
    _widen(ranges, graph, again, max(1.0, headroom / 2))
    for node in graph.nodes:
        ranges[node.name] |= {f"{part}_seen": found.largest[node.name][part] for part in node.peaks_kept}
    for name, part, gain in gains(graph, inputs) if scored else ():
        ranges[name][part] = gain
    return ranges


def _widen(ranges: Ranges, graph: Graph, again: Sequence[Sequence[Tensor]], headroom: float) -> None:
    """Makes ranges hold what comes of these inputs as well, as `calibrate` says."""
    before, told = {name: dict(entry) for name, entry in ranges.items()}, ""
    summed = {(node.name, part) for node in graph.nodes for part in node.summed}
    for values in again:
        try:
            found = peaks(graph, [values])
        except ConfigError as error:  # not finite
            told = told or f" (layer {error.layer})"
            continue
        for name, entry in found.items():
            for part, peak in entry.items():
                wanted = power_of_two(peak * headroom)
                if (name, part) in summed:
                    continue
                if wanted <= WIDEST * before[name][part]:
                    ranges[name][part] = max(ranges[name][part], wanted)
                elif peak > before[name][part]:
                    told = told or f" (layer {name})"
    if told:
        log.warning("one token again and again makes values too large to plan for%s: a reply to such a text may not be the network's", told)


def peaks(graph: Graph, inputs: Sequence[Sequence[Tensor]]) -> Ranges:
    """For every float input and node the largest |output| as `out`, and those of what a node measures besides (`Node.measure`).

    ConfigError where a value is not finite.
    """
    found = _Peaks()
    for values in inputs:
        found.add(graph, values)
    return found.largest


class _Peaks:
    """The largest magnitudes so far, as `peaks` has them."""

    def __init__(self) -> None:
        self.largest: Ranges = {}

    def add(
        self,
        graph: Graph,
        values: Sequence[Tensor],
        *,
        kept: Collection[str] = (),
        only: Collection[str] | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Runs the graph, or `only` these nodes on what is `given`, as `Graph.forward` has it; the outputs that are `kept`."""
        outputs: dict[str, Tensor] = {}

        def observe(node: Any, operands: tuple[Any, ...], output: Any) -> None:
            self._note(node.name, "out", output)
            for part, value in node.measure(operands, output):
                self._note(node.name, part, value)
            if node.name in kept:
                outputs[node.name] = output

        for name, value in zip(graph.input_names, values, strict=True):
            if value.is_floating_point():
                self._note(name, "out", value.float())
        with torch.no_grad():
            graph(*_floats(values), observe=observe, only=only, given=given)
        return outputs

    def _note(self, name: str, part: str, value: Tensor) -> None:
        peak = max(abs(float(end)) for end in value.aminmax())
        if not math.isfinite(peak):
            raise ConfigError("a value is not finite on these inputs", layer=name)
        entry = self.largest.setdefault(name, {})
        entry[part] = max(peak, entry.get(part, 0.0))


def after_the_last(graph: Graph, values: Sequence[Tensor]) -> set[str]:
    """Nodes that compute the last position alone, of what a graph for prompts of any length computes of each: found on two positions."""
    few = [torch.cat([value, value], dim=1)[:, :2] for value in values]

    def shapes() -> dict[str, torch.Size]:
        found: dict[str, torch.Size] = {}
        with torch.no_grad():
            graph(*_floats(few), observe=lambda node, _, output: found.__setitem__(node.name, output.shape))
        return found

    alone = shapes()
    with every_position():
        return {name for name, shape in shapes().items() if shape != alone[name]}


def _floats(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.float() if value.is_floating_point() else value for value in values]


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


def repeated_ids(tokenizer: bytes | None, vocab: int, n_positions: int, ends: Sequence[int]) -> Iterator[tuple[Tensor]]:
    """Inputs (1, T) of one token each: end tokens, with which prompts are padded, and some of the text, the most frequent first."""
    ids = text_ids(tokenizer, vocab)
    frequent = [token for token, _ in Counter(ids).most_common(REPEATED // 2)]
    others = ids[:: max(1, len(ids) // (REPEATED // 2))] or range(0, vocab, max(1, vocab // REPEATED))
    for token in list(dict.fromkeys([*ends, *frequent, *others]))[:REPEATED]:
        yield (torch.full((1, min(WINDOW, n_positions)), token),)


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
