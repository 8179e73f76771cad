"""Causal attention of max-plus products as one node, with the keys and values that it keeps between tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from privinf.graph.builder import Builder, Value, rule
from privinf.graph.node import Node, Shape
from privinf.graph.planning import COMPARED_FRAC
from privinf.graph.private import PrivinfTensor
from privinf.ops.last_position import last_of
from privinf.ops.max_plus import OfSums
from protocols.max_plus import MOST_BITS, tropical_mixed, tropical_scores
from protocols.max_plus import max_plus_attention as of_shares
from protocols.party import Protocol_
from protocols.ring import blank, known
from protocols.rows import Rows
from protocols.shares import Shares
from protocols.truncation import rescale


@dataclass(frozen=True, eq=False, repr=False)
class KeptShares:
    """Keys or values of all positions so far (B H, T, d_k), as shares: each opening of a sum of them has a mask of its own."""

    shares: Shares

    @staticmethod
    def joined(before: KeptShares | None, new: Shares) -> KeptShares:
        """With those of new positions behind the others; what was kept is sent in no message that leaves before the query."""
        if before is None:
            return KeptShares(Shares(new.value, new.bits, new.frac))
        both = before.shares.value, new.value
        shape = (new.shape[0], both[0].shape[1] + both[1].shape[1], new.shape[2])
        return KeptShares(Shares(torch.cat(both, 1) if known(*both) else blank(*shape), new.bits, new.frac))

    def shape_only(self) -> KeptShares:
        """For walks that know no values."""
        return KeptShares(self.shares.with_value(blank(*self.shares.shape)))


class MaxPlusAttention(OfSums):
    """q, k, v side by side (B, T, 3 d) -> max_j (max_c (q_ic + k_jc) + v_j), over the positions j up to i, heads merged (B, T, d)."""

    op = "max_plus_attention"
    state = ("keys", "values")
    rowwise = False
    any_length = True
    most_bits = MOST_BITS
    heads: int
    head_dim: int
    last_query: bool

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """Its sizes, and whether the last position alone asks."""

        heads: int
        head_dim: int
        last_query: bool = False

    def check(self) -> None:
        if self.heads < 1 or self.head_dim < 1:
            raise self.fail("heads without width")

    def output_shape(self, *shapes: Shape) -> Shape:
        shape, width = shapes[0], self.heads * self.head_dim
        if len(shape) != 3 or shape[2] != 3 * width:
            raise self.fail(f"input {list(shape)} does not hold q, k, v of {self.heads} heads of {self.head_dim}")
        return (shape[0], 1 if self.last_query else shape[1], width)

    def last_position_of(self) -> Node | None:
        return None if self.last_query else MaxPlusAttention(self.name, self.layer, **{**self.attributes(), "last_query": True})

    def _parts(self, qkv: Any) -> Any:
        """(B, T, 3 d) -> q, k, v, each (B, H, T, d_k)."""
        return qkv.reshape(*qkv.shape[:2], 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)

    def generic(self, qkv: Any, *others: Any) -> Any:
        if not isinstance(qkv, Tensor):
            raise self.fail("stock CrypTen has no protocol for it")
        q, k, v = self._parts(qkv)
        y = tropical_mixed(tropical_scores(q, k), v).transpose(1, 2).reshape(*qkv.shape[:2], -1)
        return last_of(y) if self.last_query else y

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        plan, runtime, (batch, count, _) = self.plan, x.runtime, x.shares.shape
        asked, end = 1 if self.last_query and not runtime.every else count, runtime.offset + count
        opened = yield from rescale(x.party, x.shares, bits=plan.opened, frac=COMPARED_FRAC)
        q, k, v = (opened.map(lambda value, part=part: self._parts(value)[part].flatten(0, 1)) for part in range(3))
        before = runtime.state.get(self.name, {})
        keys, values = (KeptShares.joined(before.get(part), new) for part, new in (("keys", k), ("values", v)))  # type: ignore[arg-type]
        self.keep(runtime, keys=keys, values=values)
        if self.name in runtime.unread:
            return x.shares
        q = q.map(lambda value: value[:, count - asked :])
        y = yield from of_shares(x.party, q, keys.shares, values.shares, Rows(end - asked + 1, asked, 1))
        y = y.map(lambda value: value.reshape(batch, self.heads, asked, self.head_dim).transpose(1, 2).reshape(batch, asked, -1))
        return (yield from rescale(x.party, y, bits=plan.out_bits, frac=plan.out_frac))

    # ---- the ring plan

    def measure(self, inputs: tuple[Tensor, ...], output: Tensor) -> Iterator[tuple[str, Tensor]]:
        q, k, v = self._parts(inputs[0])
        yield "sums", q.abs().amax() + k.abs().amax() + v.abs().amax()


@rule(torch.ops.privinf.max_plus_attention.default)
def attention(b: Builder, qkv: Value, heads: int) -> Value:
    """Of the operator that `protocols.max_plus` defines."""
    return b.emit(MaxPlusAttention, qkv, heads=heads, head_dim=qkv.shape[-1] // 3 // heads)
