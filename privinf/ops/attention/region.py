"""Causal attention seen as one region, whatever layout the module's author chose.

Exported attention is a causal softmax between two matrix products, with a tangle of views, transposes, splits and scalings
around them. Instead of matching tangles, this file runs them: each element of q, k and v is traced back, on a tensor of indices,
to the row and column of the value that it was moved from. Whatever the tangle, the region is recognised if query i of head h
comes from row i (of its batch) and the same columns for every i. Scalings on the way are run on a tensor of ones beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from privinf.graph.draft import Draft
from privinf.graph.kinds import Moving
from privinf.graph.node import Node, Shape
from privinf.ops.add import Add
from privinf.ops.linear import Linear
from privinf.ops.matmul import MatMul
from privinf.ops.mul_constant import MulConstant
from privinf.ops.reshape import Reshape
from privinf.ops.rotary import Rotary
from privinf.ops.scale import Scale
from protocols.rotary import Rotation


@dataclass(frozen=True)
class Factor:
    """What a value was multiplied by: `public` times the private `weights`.

    `surrogate` is the latter with random numbers in place of the weights. It shows on which axes the factor depends by
    construction, so that no decision depends on weights.
    """

    public: float = 1.0
    weights: Tensor | None = None
    surrogate: Tensor | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> Factor:
        """The same after a change of layout, which the weights follow."""
        if self.weights is None or self.surrogate is None:
            return self
        return Factor(self.public, move(self.weights), move(self.surrogate))

    def scaled(self, node: Node, shape: Shape, generator: torch.Generator) -> Factor:
        """Times what the node multiplies by; a weight is broadcast to `shape`."""
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
    while isinstance(draft.producer(key), Moving | MulConstant | Scale):
        steps.append(key)
        key = draft.reads[key][0]
    shape = draft.shapes[key]
    index, factor = torch.arange(torch.Size(shape).numel()).reshape(shape), Factor()
    generator = torch.Generator().manual_seed(1)
    for step in reversed(steps):
        node = draft.nodes[step]
        if isinstance(node, Moving):
            index, factor = node.generic(index), factor.moved(node.generic)
        else:
            factor = factor.scaled(node, draft.shapes[step], generator)
    return Traced(key, index, factor)


def before_offset(draft: Draft, key: str) -> tuple[str, str | None]:
    """Scores before a number was added to all those of one query, which a softmax does not see, and what was added (..., T, 1)."""
    if type(draft.producer(key)) is Add:
        first, second = draft.reads[key]
        for scores, offset in ((first, second), (second, first)):
            if draft.shapes[scores] == draft.shapes[key] and draft.shapes[offset][-1] == 1:
                return scores, offset
    return key, None


def offset_columns(draft: Draft, key: str | None, batch: int, heads: int, length: int) -> tuple[str, Tensor] | None:
    """The linear map whose columns (H,) are what is added, one a head; None if it is not so, and nothing must be added then."""
    if key is None:
        return None
    traced = trace(draft, key)
    if traced.index.numel() != batch * heads * length or traced.factor.weights is not None or traced.factor.public != 1.0:
        return None
    found = as_heads(draft, Traced(traced.source, traced.index.reshape(batch, heads, length, 1), Factor()), batch, heads)
    linear = found is not None and isinstance(draft.producer(traced.source), Linear)
    return (traced.source, found.columns[:, 0]) if found is not None and linear else None


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


def unturned(draft: Draft, heads: Heads, traced: Traced, width: int) -> tuple[Traced, Rotation] | None:
    """What heads that come turned were before, and how they were turned; None if they were not, or not as wholes, or scaled by weights."""
    node = draft.producer(traced.source)
    start = heads.columns[:, :1]
    whole = bool((heads.columns == start + torch.arange(width)).all()) and bool((start % width == 0).all())
    if not isinstance(node, Rotary) or node.rotation.width != width or not whole or traced.factor.weights is not None:
        return None
    inner = trace(draft, draft.reads[traced.source][0])
    if inner.factor.weights is not None:
        return None
    index = inner.index.reshape(-1)[traced.index]
    return Traced(inner.source, index, Factor(inner.factor.public * traced.factor.public)), node.rotation


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
    """Whether a stand-in's elements differ along an axis."""
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
    """One recognised attention. More than a dozen attributes: how it lies, and every factor on its way."""

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
    rotation: Rotation | None = None  # of q and k, which `parts` then lie before
    shared: int = 1  # heads of queries in a row that have the same keys and values
    offset: tuple[str, Tensor] | None = None  # the linear map and its columns (H,) that are added to all scores of a query

    def make(self, draft: Draft, kind: type[Node], reads: list[str], **values: Any) -> str:
        """Adds a node of the region, named after it; its name."""
        return draft.add(kind(self.base + kind.op, self.layer, **values), reads)


def find_region(draft: Draft, softmax: str) -> Region | None:
    """The products around a causal softmax, and how q, k and v lie, if they lie as heads."""
    product = product_after(draft, softmax)
    unshifted, added = before_offset(draft, draft.reads[softmax][0])
    scores = trace_scores(draft, unshifted)
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
    found, rotation = [as_heads(draft, part, batch, heads) for part in (q, k, v)], None
    if scores[1].weights is None and found[0] is not None and found[1] is not None:
        before = [unturned(draft, part, traced, head_dim) for part, traced in ((found[0], q), (found[1], k))]
        made = [draft.producer(part.source) for part in (v, *(each[0] for each in before if each is not None))]
        if all(isinstance(node, Linear) for node in made) and before[0] and before[1] and before[0][1] == before[1][1]:
            rotation = before[0][1]
            found[:2] = [as_heads(draft, each[0], batch, heads) for each in (before[0], before[1])]
    parts: tuple[Heads, Heads, Heads] | None = None
    if all(found) and found[1].by_row is None and found[2].by_row is None:  # type: ignore[union-attr]
        parts = (found[0], found[1], found[2])  # type: ignore[assignment]
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
        parts=parts,
        base=node.name.removesuffix("softmax"),
        layer=node.layer,
        batch=batch,
        heads=heads,
        length=length,
        head_dim=head_dim,
        public=scores[1].public,
        by_row=by_row,
        by_head=by_head,
        rotation=rotation,
        shared=1 if parts is None else shared_heads(parts[1], parts[2]),
        offset=offset_columns(draft, added, batch, heads, length),
    )


def shared_heads(keys: Heads, values: Heads) -> int:
    """The largest number of heads in a row, the same all over, that have the same keys and values."""
    count = len(keys.columns)
    for times in range(count, 1, -1):
        if count % times == 0 and not keys.private and not values.private:
            first = torch.arange(0, count, times).repeat_interleave(times)
            if all(bool((heads.columns == heads.columns[first]).all()) for heads in (keys, values)):
                return times
    return 1


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
