"""Causal attention whose weights are ReLU of the scores over the number of visible keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from privinf.graph.builder import Builder, Value, rule
from privinf.graph.node import Node
from privinf.graph.planning import FRAC, SMALLEST, Bits, Planning, Shown, Wanted, bits_for
from privinf.graph.planning import Plan as AnyPlan
from privinf.graph.private import PrivinfTensor
from privinf.ops.attention.node import QKV_FRACS, SUM_FRAC, V_FRAC, CausalAttention
from privinf.ops.attention.scores import QK_FRAC, usual_fracs
from privinf.ops.last_position import last_of
from protocols.comparison import MAX_BITS
from protocols.errors import RangeError
from protocols.relu_attention import FRAC as SCORE_FRAC
from protocols.relu_attention import INVERSE_FRAC, LiveMean, ReluRings, inverses, relu_attention
from protocols.ring import placed


class ReluAttention(CausalAttention):
    """`CausalAttention` with relu(scores) / length in place of softmax(scores): q, k, v (B, T, 3 d) -> (B, T, d)."""

    op = "relu_attention"
    inexact: ClassVar[Mapping[str, str]] = {}
    optional = ()
    encoded = ()
    peaks_kept = ("score",)

    class Plan(AnyPlan, frozen=True, kw_only=True):
        """The rings of `protocols.relu_attention.ReluRings`."""

        qk_bits: Bits
        q_frac: Bits
        k_frac: Bits
        score_bits: Bits
        v_bits: Bits
        v_frac: Bits
        sum_frac: Bits
        mean_bits: Bits
        bits: Bits
        frac: Bits
        out_frac: Bits
        out_bits: Bits

        def __post_init__(self) -> None:
            """A peer's plan is held to what can be compared."""
            if not SCORE_FRAC < self.score_bits <= MAX_BITS:
                raise ValueError("scores that cannot be compared")

        @property
        def within(self) -> None:
            """There is no row to bound."""
            return

        @property
        def output(self) -> tuple[int, int]:
            return self.out_bits, self.out_frac

        @property
        def rings(self) -> ReluRings:
            """For the protocol."""
            return ReluRings(**{name: getattr(self, name) for name in ReluRings.__dataclass_fields__})

    plan: Plan  # type: ignore[assignment]

    @staticmethod
    def of_wires(*operands: Any, at_once: bool = False, live: LiveMean | None = None) -> Any:
        """See `protocols.relu_attention`; there is no round to spare with wider rings."""
        return relu_attention(*operands, live=live)

    def last_position_of(self) -> Node | None:
        return None if self.last_query else ReluAttention(self.name, self.layer, **{**self.attributes(), "last_query": True})

    def generic(self, qkv: Any, *others: Any) -> Any:
        q, k, v = self.split_heads(qkv)
        q, k = self.turned_and_scaled(q, k)
        weights = q.matmul(self.for_queries(k).transpose(2, 3)).relu().mul(_means(qkv.size(1)))  # (B, H, T, T)
        merged = weights.matmul(self.for_queries(v)).permute(0, 2, 1, 3).reshape(qkv.size(0), qkv.size(1), self.width)  # (B, T, d)
        return last_of(merged) if self.last_query else merged

    def _live(self, x: PrivinfTensor, filled: Sequence[int]) -> Any:
        ends = torch.tensor([[end] for _, end in x.runtime.windows(1)])
        inverse = x.party.varying(lambda further: placed(inverses(ends + further), x.runtime.device))
        return LiveMean(super()._live(x, filled).mask, inverse)

    # ---- the ring plan

    def measure(self, inputs: tuple[Tensor, ...], output: Tensor) -> Iterator[tuple[str, Tensor]]:
        q, k, v = self.split_heads(inputs[0])
        q, k = self.turned_and_scaled(q, k)
        yield from (("q", q), ("k", k), ("v", v))
        scores = q.matmul(self.for_queries(k).transpose(2, 3)).tril()  # (B, H, T, T), masked ones are never computed privately
        yield "score", scores
        yield "sums", scores.relu().matmul(self.for_queries(v))

    def bound_of(self, part: str, ranges: Mapping[str, float]) -> float:
        return Node.bound_of(self, part, ranges)

    def name_of(self, part: str) -> str:
        return "a score" if part == "score" else Node.name_of(self, part)

    def make_plan(self, planning: Planning) -> Plan:  # type: ignore[override]
        (q_frac, k_frac, qk_bits), v_bits = self._opened_in(planning), self._v_bits(planning)
        out_bits, out_frac = planning.output_for_readers(self.name)
        largest = math.ceil(math.log2(max(planning.out(self.name), SMALLEST)))
        if v_bits > 64 or largest + 2 + SUM_FRAC + INVERSE_FRAC > 64:
            raise self.unfit(planning)
        return self.Plan(
            qk_bits=qk_bits,
            q_frac=q_frac,
            k_frac=k_frac,
            score_bits=qk_bits - QK_FRAC + SCORE_FRAC,
            v_bits=v_bits,
            v_frac=V_FRAC,
            sum_frac=SUM_FRAC,
            # so wide, if it can be, that the result is a reduction
            mean_bits=min(64, max(out_bits - out_frac, largest + 2) + SUM_FRAC + INVERSE_FRAC),
            bits=planning.bits,
            frac=planning.frac,
            out_frac=out_frac,
            out_bits=out_bits,
        )

    def _opened_in(self, planning: Planning) -> tuple[int, int, int]:
        """Fraction bits of q and of k, and the ring of both and of their product, whose truncation to the scores is a reduction."""
        q_frac, k_frac = usual_fracs(self.head_dim)
        largest = float(planning.ranges[self.name]["score"])
        score_bits = max(bits_for(self.name, SCORE_FRAC, largest), SCORE_FRAC + 1)  # however small a network's scores are
        if score_bits > MAX_BITS:
            raise RangeError(f"attention scores up to {largest:g} are too large to be compared in {MAX_BITS} bits", layer=self.name)
        return q_frac, k_frac, score_bits + QK_FRAC - SCORE_FRAC

    def _v_bits(self, planning: Planning) -> int:
        """The ring of v, and of the sums of v."""
        ranges = planning.ranges[self.name]
        return bits_for(self.name, SCORE_FRAC + V_FRAC, max(float(ranges["sums"]), float(ranges["v"]) / 2**SCORE_FRAC))

    def wants(self, planning: Planning, maker: str) -> Wanted:
        q_frac, k_frac, bits = self._opened_in(planning)
        in_frac, weight_frac = QKV_FRACS
        headroom = max(bits - q_frac, bits - k_frac, math.ceil(math.log2(max(self._v(planning), SMALLEST))) + 2)
        sums = max(headroom, self._v_bits(planning) - V_FRAC)
        return Wanted(sums if sums + weight_frac + FRAC <= 64 else headroom, in_frac, weight_frac, headroom)

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        plan = self.plan
        for part, bits, frac in (("q", plan.qk_bits, plan.q_frac), ("k", plan.qk_bits, plan.k_frac), ("v", plan.v_bits, plan.v_frac)):
            yield Shown(part, bits, frac, own.get(part))
        yield Shown("scores", plan.score_bits, SCORE_FRAC, own.get("score"))
        yield Shown("sums of v", plan.v_bits, SCORE_FRAC + V_FRAC, own.get("sums"))


def _means(size: int) -> Tensor:
    """(T, T): 1 / length where a key is visible."""
    return torch.ones(size, size).tril() / torch.arange(1, size + 1)[:, None]


@rule(torch.ops.privinf.relu_attention.default)
def attention(b: Builder, qkv: Value, heads: int) -> Value:
    """Of the operator that `protocols.relu_attention` defines."""
    return b.emit(ReluAttention, qkv, heads=heads, head_dim=qkv.shape[-1] // 3 // heads)
