"""Recognising causal attention as one region, whatever layout the module's author chose.

Exported attention is a causal softmax between two matrix products, with a tangle of views, transposes, splits and scalings
around them. Instead of matching tangles, this file runs them: each element of q, k and v is traced back, on a tensor of indices,
to the row and column of the value that it was moved from. Whatever the tangle, the region is recognised if query i of head h
comes from row i (of its batch) and the same columns for every i. Scalings on the way are run on a tensor of ones beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from privinf.lowering.draft import Draft, joint_name
from privinf.lowering.node_base import Node, Shape
from privinf.lowering.nodes import (
    Cat,
    CausalAttention,
    Linear,
    MatMul,
    MulConstant,
    Permute,
    Reshape,
    Scale,
    Select,
    Slice,
    Softmax,
)

LAYOUT = (Reshape, Permute, Slice, Select)


@dataclass(frozen=True)
class Factor:
    """What a value was multiplied by: `public` times the private `weights`, where `surrogate` is the latter with random numbers
    in place of the weights. It shows on which axes the factor depends by construction, so that no decision depends on weights."""

    public: float = 1.0
    weights: Tensor | None = None
    surrogate: Tensor | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> Factor:
        if self.weights is None or self.surrogate is None:
            return self
        return Factor(self.public, move(self.weights), move(self.surrogate))

    def scaled(self, node: Node, shape: Shape, generator: torch.Generator) -> Factor:
        if type(node) is MulConstant:
            return Factor(self.public * node.constant, self.weights, self.surrogate)
        weight: Tensor = node.value("weight").double()
        random = torch.rand(weight.shape, generator=generator, dtype=torch.float64) + 0.5
        ones = torch.ones(shape, dtype=torch.float64)
        return Factor(
            self.public,
            weight * (ones if self.weights is None else self.weights),
            random * (ones if self.surrogate is None else self.surrogate),
        )


@dataclass(frozen=True)
class Traced:
    """Where the elements of a value come from: `index` into the flattened `source`, times `factor`."""

    source: str
    index: Tensor
    factor: Factor


def trace(draft: Draft, key: str) -> Traced:
    """Walk back from a value through what only moves and scales elements."""
    steps: list[str] = []
    while type(draft.producer(key)) in (*LAYOUT, MulConstant, Scale):
        steps.append(key)
        key = draft.reads[key][0]
    shape = draft.shapes[key]
    index, factor = torch.arange(torch.Size(shape).numel()).reshape(shape), Factor()
    generator = torch.Generator().manual_seed(1)
    for step in reversed(steps):
        node = draft.nodes[step]
        if type(node) in LAYOUT:
            index, factor = node.generic(index), factor.moved(node.generic)
        else:
            factor = factor.scaled(node, draft.shapes[step], generator)
    return Traced(key, index, factor)


def trace_scores(draft: Draft, key: str) -> tuple[str, Factor] | None:
    """Walk back from a softmax's input to the product that makes it, through scalings and reshapes of the leading axes."""
    steps: list[str] = []
    while not isinstance(node := draft.producer(key), MatMul):
        source = draft.reads[key][0] if node is not None else ""
        if type(node) is Reshape:
            if draft.shapes[source][-2:] != draft.shapes[key][-2:]:
                return None
        elif type(node) not in (MulConstant, Scale):
            return None
        steps.append(key)
        key = source
    factor, generator = Factor(), torch.Generator().manual_seed(2)
    for step in reversed(steps):
        node = draft.nodes[step]
        factor = factor.moved(node.generic) if type(node) is Reshape else factor.scaled(node, draft.shapes[step], generator)
    return key, factor


@dataclass(frozen=True)
class Heads:
    """One of q, k, v: columns (H, d_k) of a value of B * T rows, times `by_column` (H, d_k), `by_row` (H, T) and `public`."""

    source: str
    columns: Tensor
    by_column: Tensor
    by_row: Tensor | None
    private: bool  # whether by_column holds weights; else it is all ones
    public: float


def depends(surrogate: Tensor, axis: int) -> bool:
    return bool((surrogate != surrogate.select(axis, 0).unsqueeze(axis)).any())


def as_heads(draft: Draft, traced: Traced, batch: int, heads: int) -> Heads | None:
    """Read a traced (..., T, d_k) as heads of rows, or None if its elements do not lie so."""
    length, width = traced.index.shape[-2:]
    full = (batch, heads, length, width)
    row_size = draft.shapes[traced.source][-1]
    index = traced.index.reshape(full)
    rows, columns = index // row_size, index % row_size
    expected = torch.arange(batch * length).reshape(batch, 1, length, 1)
    if bool((rows != expected).any()) or bool((columns != columns[:1, :, :1]).any()):
        return None
    by_column, by_row = torch.ones(heads, width, dtype=torch.float64), None
    weights, surrogate = traced.factor.weights, traced.factor.surrogate
    if weights is not None and surrogate is not None:
        weights, surrogate = weights.reshape(full), surrogate.reshape(full)
        if depends(surrogate, 0) or (depends(surrogate, 2) and depends(surrogate, 3)):
            return None
        if depends(surrogate, 2):
            by_row = weights[0, :, :, 0]  # (H, T)
        else:
            by_column = weights[0, :, 0, :]  # (H, d_k)
    private = weights is not None and by_row is None
    return Heads(traced.source, columns[0, :, 0], by_column, by_row, private, traced.factor.public)


@dataclass
class Region:
    """One recognised attention."""

    product: str  # the value after the product with V, (..., T, d_k)
    operands: tuple[str, str, str]  # what the products read: (..., T, d_k), (..., d_k, T), (..., T, d_k)
    parts: tuple[Heads, Heads, Heads] | None  # how they lie in the values that they were moved from, if as heads
    base: str  # of the names
    layer: str
    batch: int
    heads: int
    length: int
    head_dim: int
    public: float  # factor of the scores
    by_row: Tensor | None  # (H, T), private factor of the scores that depends on the query's position
    by_head: Tensor | None  # (H,), private factor of the scores that does not

    def make(self, draft: Draft, kind: type[Node], reads: list[str], **values: Any) -> str:
        return draft.add(kind(self.base + kind.op, self.layer, **values), reads)


def recognise_attention(draft: Draft) -> None:
    """Replace every causal softmax between two products of private values by one node."""
    for key in draft.order():
        node = draft.nodes.get(key)
        if isinstance(node, Softmax) and node.causal:
            region = find_region(draft, key)
            if region is not None:
                put_region(draft, region)
                draft.prune()


def find_region(draft: Draft, softmax: str) -> Region | None:
    """The products around a causal softmax, and how q, k and v lie, if they lie as heads."""
    product = product_after(draft, softmax)
    scores = trace_scores(draft, draft.reads[softmax][0])
    if product is None or scores is None:
        return None
    q_key, k_key = draft.reads[scores[0]]
    v_key = draft.reads[product][1]
    length, head_dim = draft.shapes[q_key][-2:]
    if draft.shapes[k_key][-1] != length or draft.shapes[v_key][-2:] != (length, head_dim):
        return None
    q, k, v = trace(draft, q_key), trace(draft, k_key), trace(draft, v_key)
    k = Traced(k.source, k.index.mT, k.factor.moved(lambda part: part.mT))  # (..., d_k, T) -> (..., T, d_k)
    batch, heads = split_lead(draft.shapes[q_key][:-2], torch.Size(draft.shapes[q.source][:-1]).numel(), length)
    found = [as_heads(draft, part, batch, heads) for part in (q, k, v)]
    parts = None
    if all(found) and found[1].by_row is None and found[2].by_row is None:  # type: ignore[union-attr]
        parts = (found[0], found[1], found[2])
    by_row = by_head = None
    weights, surrogate = scores[1].weights, scores[1].surrogate
    if weights is not None and surrogate is not None:
        weights, surrogate = (part.reshape(batch, heads, length, length) for part in (weights, surrogate))
        if depends(surrogate, 0) or depends(surrogate, 3):
            return None
        if depends(surrogate, 2):
            by_row = weights[0, :, :, 0]
        else:
            by_head = weights[0, :, 0, 0]
    node = draft.nodes[softmax]
    return Region(
        product=product,
        operands=(q_key, k_key, v_key),
        parts=parts,  # type: ignore[arg-type]
        base=node.name.removesuffix("softmax"),
        layer=node.layer,
        batch=batch,
        heads=heads,
        length=length,
        head_dim=head_dim,
        public=scores[1].public,
        by_row=by_row,
        by_head=by_head,
    )


def product_after(draft: Draft, softmax: str) -> str | None:
    """The product whose left operand is the softmax's result, and that alone reads it."""
    key, reader = softmax, draft.single_reader(softmax)
    while reader is not None and type(draft.nodes[reader]) is Reshape and draft.shapes[reader][-2:] == draft.shapes[key][-2:]:
        key, reader = reader, draft.single_reader(reader)
    if reader is None or not isinstance(draft.nodes[reader], MatMul):
        return None
    left, right = draft.reads[reader]
    return reader if left == key != right else None


def split_lead(lead: Shape, rows: int, length: int) -> tuple[int, int]:
    """(B, H) of the axes before (T, d_k): as they say themselves if there are several, else as the rows that q is made from say."""
    if len(lead) > 1:
        return torch.Size(lead[:-1]).numel(), lead[-1]
    count, batch = torch.Size(lead).numel(), rows // length
    return (batch, count // batch) if batch and rows % length == 0 and count % batch == 0 else (count, 1)


# ---- putting the one node in place


def put_region(draft: Draft, region: Region) -> None:
    """Join q, k and v, put every factor where it costs nothing, and let the node take the region's place."""
    parts, temperature, public = region.parts, region.by_row, region.public
    linear = parts is not None and all(isinstance(draft.producer(part.source), Linear) for part in parts)
    if parts is not None and not linear and not lie_side_by_side(region, parts):
        parts = None  # what was done to q, k and v stays nodes of their own, before the region
    if parts is not None:
        public *= parts[0].public * parts[1].public
        if parts[0].by_row is not None:
            temperature = parts[0].by_row if temperature is None else temperature * parts[0].by_row
    if region.by_head is not None and not linear:
        by_head = region.by_head[:, None].expand(region.heads, region.length)
        temperature = by_head if temperature is None else temperature * by_head
    on_query = public if temperature is None else 1.0
    if parts is None:
        joined = join_operands(draft, region, on_query)
    elif linear:
        joined = fuse_columns(draft, region, parts, on_query)
    else:
        joined = join_parts(draft, region, parts, on_query)
    values = {} if temperature is None else {"inverse_temperature": temperature * public}
    put_output(draft, region, region.make(draft, CausalAttention, [joined], heads=region.heads, head_dim=region.head_dim, **values))


def scaled(draft: Draft, region: Region, key: str, factor: float) -> str:
    """A value times a public number: what is left to do where no private weight takes the factor."""
    return key if factor == 1.0 else region.make(draft, MulConstant, [key], constant=factor)


def fuse_columns(draft: Draft, region: Region, parts: tuple[Heads, Heads, Heads], on_query: float) -> str:
    """One linear map whose columns are those of q, k and v, in the order that the node reads, with their factors."""
    by_head = torch.ones(region.heads, dtype=torch.float64) if region.by_head is None else region.by_head
    factors = (parts[0].by_column * by_head[:, None] * on_query, parts[1].by_column, parts[2].by_column * parts[2].public)
    maps: list[tuple[str, str, Tensor, Tensor | None]] = []  # name, input, weight, bias
    for part, factor in zip(parts, factors, strict=True):
        linear = draft.nodes[part.source]
        columns, bias = part.columns.reshape(-1), linear.maybe("bias")
        weight = linear.value("weight")[:, columns].double() * factor.reshape(-1)
        bias = None if bias is None else bias[columns].double() * factor.reshape(-1)
        maps.append((linear.name, as_rows(draft, region, draft.reads[part.source][0]), weight, bias))
    if len({source for _, source, _, _ in maps}) == 1:
        names, sources, weights, biases = zip(*maps, strict=True)
        return add_linear(draft, region, joint_name(list(dict.fromkeys(names))), sources[0], weights, biases)
    return region.make(draft, Cat, [add_linear(draft, region, n, s, (w,), (b,)) for n, s, w, b in maps], dim=2)


def add_linear(draft: Draft, region: Region, name: str, source: str, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> str:
    values = {"weight": torch.cat(list(weights), dim=1)}
    if any(bias is not None for bias in biases):
        zeros = [torch.zeros(weight.shape[1], dtype=torch.float64) for weight in weights]
        values["bias"] = torch.cat([zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)])
    return draft.add(Linear(name, region.layer, **values), [source])


def reshaped(draft: Draft, region: Region, key: str, shape: Shape) -> str:
    """A value in another shape; a reshape that is there already is used again."""
    while type(draft.producer(key)) is Reshape:
        key = draft.reads[key][0]
    if draft.shapes[key] == shape:
        return key
    for reader in draft.readers(key):
        if type(draft.nodes[reader]) is Reshape and draft.shapes[reader] == shape:
            return reader
    return region.make(draft, Reshape, [key], shape=list(shape))


def as_rows(draft: Draft, region: Region, key: str) -> str:
    """A value of B * T rows as (B, T, width)."""
    return reshaped(draft, region, key, (region.batch, region.length, draft.shapes[key][-1]))


def lie_side_by_side(region: Region, parts: tuple[Heads, Heads, Heads]) -> bool:
    """Whether each of q, k, v is consecutive columns of a value, with no factor that needs a linear map to take it."""
    count = torch.arange(region.heads * region.head_dim)
    consecutive = all(bool((part.columns.reshape(-1) - part.columns[0, 0] == count).all()) for part in parts)
    return consecutive and parts[2].public == 1.0 and not any(part.private for part in parts)


def join_parts(draft: Draft, region: Region, parts: tuple[Heads, Heads, Heads], on_query: float) -> str:
    """q, k, v side by side, each from consecutive columns of a value."""
    width = region.heads * region.head_dim
    starts = [int(part.columns[0, 0]) for part in parts]
    wholes = [as_rows(draft, region, part.source) for part in parts]  # each (B, T, columns of its source)
    as_they_are = len(set(wholes)) == 1 and draft.shapes[wholes[0]][2] == 3 * width and starts == [0, width, 2 * width]
    if as_they_are and on_query == 1.0:
        return wholes[0]
    q, k, v = (
        whole if draft.shapes[whole][2] == width else region.make(draft, Slice, [whole], dim=2, start=start, stop=start + width)
        for whole, start in zip(wholes, starts, strict=True)
    )
    return region.make(draft, Cat, [scaled(draft, region, q, on_query), k, v], dim=2)


def join_operands(draft: Draft, region: Region, on_query: float) -> str:
    """q, k, v side by side (B, T, 3 d), from the operands of the products themselves, moved to where they belong."""
    batch, heads, length, head_dim = region.batch, region.heads, region.length, region.head_dim
    pieces = []
    for part, key in enumerate(region.operands):
        if part == 1:
            rank = len(draft.shapes[key])
            key = region.make(draft, Permute, [key], dims=[*range(rank - 2), rank - 1, rank - 2])
        key = reshaped(draft, region, key, (batch, heads, length, head_dim))
        key = region.make(draft, Permute, [key], dims=[0, 2, 1, 3])  # (B, T, H, d_k)
        pieces.append(reshaped(draft, region, key, (batch, length, heads * head_dim)))
    q, k, v = pieces
    return region.make(draft, Cat, [scaled(draft, region, q, on_query), k, v], dim=2)


def put_output(draft: Draft, region: Region, merged: str) -> None:
    """Let what reads the region's output read `merged` (B, T, d): after the merging of heads if that follows, else before."""
    batch, heads, length, head_dim = region.batch, region.heads, region.length, region.head_dim
    elements = torch.arange(batch * heads * length * head_dim)
    wanted = elements.reshape(batch, heads, length, head_dim).permute(0, 2, 1, 3).reshape(-1)  # (B, T, H, d_k), flat
    key: str | None = region.product
    current = elements.reshape(draft.shapes[region.product])
    while key is not None:
        shape = draft.shapes[key]
        if shape[-1:] == (heads * head_dim,) and bool((current.reshape(-1) == wanted).all()):
            draft.swap(key, reshaped(draft, region, merged, shape))
            return
        key = draft.single_reader(key)
        node = None if key is None else draft.nodes[key]
        if node is None or type(node) not in (Reshape, Permute):
            break
        current = node.generic(current)
    split = region.make(draft, Reshape, [merged], shape=[batch, length, heads, head_dim])
    split = region.make(draft, Permute, [split], dims=[0, 2, 1, 3])  # (B, H, T, d_k)
    draft.swap(region.product, reshaped(draft, region, split, draft.shapes[region.product]))
