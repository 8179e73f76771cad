"""Softmax over rows, causal or not."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor

from privinf.graph.builder import Builder, Unsupported, Value, aten, recogniser, rule
from privinf.graph.draft import Draft
from privinf.graph.kinds import Product
from privinf.graph.node import Node, Shape
from privinf.graph.private import PrivinfTensor
from privinf.ops.permute import transpose
from privinf.ops.scale import Scale
from protocols.errors import UnsupportedOpError
from protocols.party import Protocol_
from protocols.rows import Rows
from protocols.shares import Shares
from protocols.softmax import softmax as of_rows

# A score at or below this has no weight after a softmax, whatever the others are: it marks a mask, not a bias.
MASKED = -9999.0
# Stock CrypTen approximates exp(x) by (1 + x/256)^256, which explodes below -512: a masked score must stay moderate, and
# exp(-60) is nothing beside any exp(0).
CRYPTEN_MASK = -60.0


def last_axis_softmax(scores: Any, causal: bool) -> Any:
    """Softmax over the last axis of (..., T, T), over positions up to the query's own where causal."""
    if causal:
        size = scores.size(-1)
        future = torch.ones(size, size, dtype=torch.bool).triu(1)  # (T, T)
        if isinstance(scores, torch.Tensor):
            scores = scores.masked_fill(future.to(scores.device), float("-inf"))
        else:
            scores = scores.add(future * CRYPTEN_MASK)
    return scores.softmax(-1)


class Softmax(Product):
    """Softmax over the last axis of (...); causal: of (..., T, T), each row over the positions up to its own."""

    op = "softmax"
    causal: bool

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """Whether the future is masked."""

        causal: bool = False

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        if not shape or (self.causal and (len(shape) < 2 or shape[-1] != shape[-2])):
            raise self.fail(f"no {'causal ' if self.causal else ''}softmax over {list(shape)}")
        return shape

    def generic(self, x: Any, *others: Any) -> Any:
        return last_axis_softmax(x, self.causal)

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        shape = x.shares.shape
        *_, number, length = shape if len(shape) > 1 else (1, *shape)
        rows = Rows(1, number, 1) if self.causal else Rows(length, number, 0)
        packed = x.shares.map(lambda v: rows.pack(v.reshape(-1, number, length)))
        p = yield from of_rows(x.party, packed, rows, bits=self.plan.bits, frac=self.plan.frac)
        return p.map(lambda v: rows.unpack(v).reshape(shape))


class CausalMask(Node):
    """Only while lowering: scores (..., T, T) with the future masked. The softmax that follows absorbs it."""

    def keeps_infinity(self, before: Shape, after: Shape) -> bool:
        return True


@rule(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
def softmax(b: Builder, x: Value, dim: int, *_: Any) -> Value:
    """Over any axis, by way of the last."""
    dim %= len(x.shape)
    if dim == len(x.shape) - 1:
        return b.emit(Softmax, x)
    return transpose(b, b.emit(Softmax, transpose(b, x, dim, -1)), dim, -1)


def mask(b: Builder, x: Value, masked: Tensor) -> Value:
    """Scores x (..., T, T) with the masked ones at minus infinity; only the causal mask is known."""
    queries, keys = x.shape[-2:] if len(x.shape) > 1 else (1, 1)
    future = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    if not bool(masked.any()) and (queries, keys) != (1, 1):
        return x
    if queries != keys or not bool((masked == future).all()):
        raise Unsupported("a mask that is not the causal one")
    return b.emit(CausalMask, x)


@recogniser(folded=False)
def absorb_masks(draft: Draft) -> None:
    """Let each softmax take over the causal mask of its scores; a mask without a softmax is an error."""
    failures: list[str] = []
    for key in draft.order():
        if not isinstance(draft.nodes.get(key), CausalMask):
            continue
        ends = softmaxes_after(draft, key)
        if ends is None:
            failures.append(f"{draft.nodes[key].name}: a causal mask whose result is not only read by a softmax")
            continue
        for end in ends:
            node = draft.nodes[end]
            draft.replace(end, Softmax(node.name, node.layer, causal=True), draft.reads[end])
        source = draft.reads[key][0]
        while isinstance(maker := draft.producer(source), Scale) and maker.hides_the_future():
            source = draft.reads[source][0]  # scores * tril + mask: the product changes nothing that is left
        draft.swap(key, source)
        draft.drop(key)
    if failures:
        raise UnsupportedOpError(f"unsupported operators ({len(failures)}): " + "; ".join(failures))


def softmaxes_after(draft: Draft, key: str) -> list[str] | None:
    """The softmaxes that read a masked value, through steps that keep minus infinity; None if something else reads it."""
    if key == draft.output:
        return None
    found: list[str] = []
    for reader in draft.readers(key):
        node = draft.nodes[reader]
        if isinstance(node, Softmax):
            found.append(reader)
            continue
        deeper = softmaxes_after(draft, reader) if node.keeps_infinity(draft.shapes[key], draft.shapes[reader]) else None
        if deeper is None:
            return None
        found += deeper
    return list(dict.fromkeys(found))
