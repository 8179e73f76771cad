"""Putting one node in the place of a region that is causal attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from privinf.graph.builder import Builder, Constant, Unsupported, Value, as_constant, as_value, aten, recogniser, rule
from privinf.graph.draft import Draft, joint_name
from privinf.graph.node import Shape
from privinf.ops.attention.node import CausalAttention
from privinf.ops.attention.region import Heads, Region, find_region
from privinf.ops.bias import shift
from privinf.ops.cat import Cat
from privinf.ops.linear import Linear
from privinf.ops.matmul import matmul
from privinf.ops.mul_constant import MulConstant
from privinf.ops.permute import Permute, transpose
from privinf.ops.repeat import repeat
from privinf.ops.reshape import Reshape
from privinf.ops.scale import scale as times
from privinf.ops.slice import Slice
from privinf.ops.softmax import Softmax
from privinf.ops.softmax import mask as mask_scores


@rule(aten.scaled_dot_product_attention.default)
def attention(
    b: Builder,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Spelt out, for `recognise_attention` to find where it is causal."""
    q, k, v = as_value(q), as_value(k), as_value(v)
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        if q.shape[-3] % k.shape[-3] or k.shape[-3] != v.shape[-3]:
            raise Unsupported("attention whose heads of queries cannot share those of keys evenly")
        k, v = (repeat(b, part, -3, q.shape[-3] // k.shape[-3]) for part in (k, v))
    scores = times(b, matmul(b, q, transpose(b, k)), q.shape[-1] ** -0.5 if scale is None else scale)  # (..., T, T)
    if is_causal:
        scores = mask_scores(b, scores, torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1))
    if mask is not None:
        tensor = as_constant(mask)
        scores = mask_scores(b, scores, ~tensor) if tensor.dtype == torch.bool else shift(b, scores, Constant(tensor, True))
    return matmul(b, b.emit(Softmax, scores), v)


@recogniser(folded=True)
def recognise_attention(draft: Draft) -> None:
    """Replace every causal softmax between two products of private values by one node."""
    for key in draft.order():
        node = draft.nodes.get(key)
        if isinstance(node, Softmax) and node.causal:
            region = find_region(draft, key)
            if region is not None:
                put_region(draft, region)
                draft.prune()


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
    on_query = public if temperature is None and region.rotation is None else 1.0
    if parts is None:
        joined = join_operands(draft, region, on_query)
    elif linear:
        joined = fuse_columns(draft, region, parts, on_query)
    else:
        joined = join_parts(draft, region, parts, on_query)
    values: dict[str, Any] = {} if temperature is None else {"inverse_temperature": temperature * public}
    if region.rotation is not None:
        values = {"rotation": region.rotation, "scale": public}  # the table takes the factor
    if linear and region.shared > 1:
        values["kv_heads"] = region.heads // region.shared
    kept = region.heads // (region.shared if linear else 1)
    if draft.shapes[joined][-1] > (region.heads + 2 * kept) * region.head_dim:
        values["row_offsets"] = True
    put_output(draft, region, region.make(draft, CausalAttention, [joined], heads=region.heads, head_dim=region.head_dim, **values))


def scaled(draft: Draft, region: Region, key: str, factor: float) -> str:
    """A value times a public number: what is left to do where no private weight takes the factor."""
    return key if factor == 1.0 else region.make(draft, MulConstant, [key], constant=factor)


def fuse_columns(draft: Draft, region: Region, parts: tuple[Heads, Heads, Heads], on_query: float) -> str:
    """One linear map whose columns are those of q, k and v, in the order that the node reads, with their factors."""
    by_head = torch.ones(region.heads, dtype=torch.float64) if region.by_head is None else region.by_head
    factors = (parts[0].by_column * by_head[:, None] * on_query, parts[1].by_column, parts[2].by_column * parts[2].public)
    maps: list[tuple[str, str, Tensor, Tensor | None]] = []  # name, input, weight, bias
    for part, factor, step in zip(parts, factors, (1, region.shared, region.shared), strict=True):
        linear = draft.nodes[part.source]
        columns, bias, factor = part.columns[::step].reshape(-1), linear.maybe("bias"), factor[::step]
        weight = linear.value("weight")[:, columns].double() * factor.reshape(-1)
        bias = None if bias is None else bias[columns].double() * factor.reshape(-1)
        maps.append((linear.name, as_rows(draft, region, draft.reads[part.source][0]), weight, bias))
    if len({source for _, source, _, _ in maps}) == 1:
        names, sources, weights, biases = zip(*maps, *offset_map(draft, region, maps[0][1]), strict=True)
        return add_linear(draft, region, joint_name(list(dict.fromkeys(names[:3]))), sources[0], weights, biases)
    return region.make(draft, Cat, [add_linear(draft, region, n, s, (w,), (b,)) for n, s, w, b in maps], dim=2)


def offset_map(draft: Draft, region: Region, source: str) -> list[tuple[str, str, Tensor, Tensor | None]]:
    """The columns that are added to the scores, where they are a map of the same input; elsewhere nothing is: a softmax is the same."""
    if region.offset is None or as_rows(draft, region, draft.reads[region.offset[0]][0]) != source:
        return []
    linear, columns = draft.nodes[region.offset[0]], region.offset[1]
    bias = linear.maybe("bias")
    return [(linear.name, source, linear.value("weight")[:, columns].double(), None if bias is None else bias[columns].double())]


def add_linear(draft: Draft, region: Region, name: str, source: str, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> str:
    """Adds linear maps of one input as one, weights side by side (in, sum of outs); its name."""
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
