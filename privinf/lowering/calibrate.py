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
from privinf.lowering.nodes import CausalAttention, LayerNorm
from protocols.errors import ConfigError

Ranges = dict[str, dict[str, float]]

SMALLEST_RANGE = 2.0**-10  # of a value that is zero throughout
SCORE_RANGE = 120.0  # what `protocols.softmax` is right for
WINDOW = 128  # positions of one calibration input
WINDOWS = 8
SINGLE_TOKENS = 16


def calibrate(graph: Graph, inputs: Sequence[Sequence[Tensor]], headroom: float = 4.0) -> Ranges:
    """What `peaks` finds, each multiplied by `headroom` and rounded up to a power of two; `score_seen` is the largest score itself."""
    if not (math.isfinite(headroom) and headroom >= 1.0):
        raise ConfigError(f"headroom must be at least 1, not {headroom}")
    found = peaks(graph, inputs)
    ranges = {name: {part: power_of_two(peak * headroom) for part, peak in entry.items()} for name, entry in found.items()}
    for name, entry in found.items():
        if "score" in entry:
            ranges[name]["score_seen"] = entry["score"]
    return ranges


def peaks(graph: Graph, inputs: Sequence[Sequence[Tensor]]) -> Ranges:
    """For every float input and node the largest |output| as `out`; for attention also those of `q` (scaled), `k`, `v`, `score`;
    for LayerNorm a row's sum of squares about its mean, as `squares`. ConfigError where a value is not finite."""
    found: Ranges = {}

    def note(name: str, part: str, value: Tensor) -> None:
        peak = float(value.abs().max())
        if not math.isfinite(peak):
            raise ConfigError("a value is not finite on these inputs", layer=name)
        entry = found.setdefault(name, {})
        entry[part] = max(peak, entry.get(part, 0.0))

    def observe(node: Any, operands: tuple[Any, ...], output: Any) -> None:
        note(node.name, "out", output)
        if isinstance(node, CausalAttention):
            q, k, v = node.split_heads(operands[0])
            q = node.scale_query(q)
            scores = q.matmul(k.transpose(2, 3)).tril()  # (B, H, T, T), masked ones are never computed privately
            for part, value in (("q", q), ("k", k), ("v", v), ("score", scores)):
                note(node.name, part, value)
        if isinstance(node, LayerNorm):
            x = operands[0].double()
            note(node.name, "squares", (x - x.mean(-1, keepdim=True)).square().sum(-1) + x.shape[-1] * node.epsilon)

    with torch.no_grad():
        for values in inputs:
            for name, value in zip(graph.input_names, values, strict=True):
                if value.is_floating_point():
                    note(name, "out", value.float())
            graph(*(value.float() if value.is_floating_point() else value for value in values), observe=observe)
    return found


def beyond(graph: Graph, ranges: Ranges, inputs: Sequence[Tensor]) -> list[str]:
    """A line for each value that leaves the range that the rings are planned for on these inputs, where a ring may have wrapped.

    An embedding's range is that of its table, whatever was seen; scores have a range of their own.
    """
    lines = []
    for name, entry in peaks(graph, [inputs]).items():
        for part, peak in entry.items():
            bound = SCORE_RANGE if part == "score" else ranges.get(name, {}).get(part, math.inf)
            embedding = name in graph._modules and graph.node(name).op == "embedding"
            if peak > bound and not embedding:
                what = "a value" if part == "out" else {"score": "a score", "squares": "a sum of squares"}.get(part, f"a value in {part}")
                lines.append(f"{name}: {what} of {peak:.3g} is beyond the planned {bound:g}")
    return lines


def power_of_two(value: float) -> float:
    """The smallest power of two that is at least `value`."""
    if value <= SMALLEST_RANGE:
        return SMALLEST_RANGE
    mantissa, exponent = math.frexp(value)  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
    return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


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
    if tokenizer is None:
        return []
    from tokenizers import Tokenizer  # only here: loading it is not free

    try:
        encoder = Tokenizer.from_buffer(tokenizer)
    except Exception as error:
        raise ConfigError(f"tokenizer.json: not a tokenizer: {error}") from None
    text = resources.files("privinf.lowering").joinpath("calibration.txt").read_text("utf-8")
    return [number for number in encoder.encode(text).ids if number < vocab]
