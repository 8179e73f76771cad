"""The causal attention of all heads as one node, with the keys and values that it keeps between tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor

from privinf.graph.node import Node, Shape
from privinf.graph.planning import FRAC, INPUT_FRAC, MATRIX_FRAC, MOST_FINE, SMALLEST, Planning, Shown, Wanted, up
from privinf.graph.private import PrivinfTensor
from privinf.ops.attention.filled import live_rows, row_offsets
from privinf.ops.attention.plan import AttentionPlan
from privinf.ops.attention.rows import HEADROOMS, ROW_FIELDS, ROW_PARTS, bound_of_rows, chosen, measured_rows, shown_rows
from privinf.ops.attention.scores import finer, finer_weights, score_fracs, temperature_frac
from privinf.ops.last_position import last_of
from privinf.ops.rotary import turned_floats
from privinf.ops.softmax import last_axis_softmax
from protocols.errors import RangeError
from protocols.exponential import FRAC as SCORE_FRAC
from protocols.linear import scale
from protocols.opening import open_masked
from protocols.party import Party, Protocol_, parallel
from protocols.product import Cached
from protocols.ring import known
from protocols.rotary import Rotation, frac_of, rotate
from protocols.rowrange import RowRange
from protocols.rows import Rows, reach
from protocols.sequences import Stack, gather, put
from protocols.shares import Shares, Wire
from protocols.softmax import LARGEST, WEIGHT_FRAC, WIDEST, AttentionRings
from protocols.softmax import attention as of_wires
from protocols.truncation import rescale

V_FRAC = 13
SUM_FRAC = 13
QKV_FRACS = (INPUT_FRAC, MATRIX_FRAC)  # input and weight of the map to q, k, v
TEMPERED_FRACS = (FRAC, 14)  # the same where its ring is full
WIDEST_SUMS, WIDEST_SHIFTED = 50, 62  # of the sums of v where no maximum is taken; and where offsets were learned for that
LARGEST_SCORE = 100.0  # seen at calibration


class CausalAttention(Node):
    """The causal attention of all heads as one region: q, k, v side by side (B, T, 3 d) -> heads merged (B, T, d).

    With `kv_heads` groups of heads share keys and values: (B, T, d + 2 kv_heads d_k). With a `rotation` q and k are turned by their
    positions first, each party's shares by itself, and the table of that takes `scale`.

    Query i of head h is multiplied by inverse_temperature[h, i], which already holds 1 / sqrt(d_k), where the model has a
    temperature: a private parameter (H, n_positions). Otherwise by the public `scale`; the lowering leaves it at 1, since it folds
    1 / sqrt(d_k) into the private columns that make q, or multiplies q before the node where no linear map makes it.

    With `row_offsets` a column more for each head, (B, T, 3 d + H), is added to all scores of its query, so that they need no maximum.
    """

    op = "attention"
    optional: ClassVar[tuple[str, ...]] = ("inverse_temperature",)
    encoded: ClassVar[tuple[str, ...]] = ("inverse_temperature",)
    state = ("keys", "values")
    taped = True
    peaks_kept: ClassVar[tuple[str, ...]] = ("score", *ROW_PARTS)
    inexact: ClassVar[Mapping[str, str]] = {"score": "_float_scores"}
    opens = "product"
    any_length = True
    batches = True
    of_wires: ClassVar[Callable[..., Protocol_[Shares]]] = staticmethod(of_wires)
    heads: int
    head_dim: int
    scale: float
    last_query: bool
    kv_heads: int
    rotation: Rotation | None
    row_offsets: bool

    class Attributes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
        """Its sizes, whether the last position alone asks, heads of keys and values (0: as many as of queries), and how q and k turn."""

        heads: int
        head_dim: int
        scale: float = 1.0
        last_query: bool = False
        kv_heads: int = 0
        rotation: Rotation | None = None
        row_offsets: bool = False

    class Plan(AttentionPlan, frozen=True, kw_only=True):
        """Its rings."""

    plan: Plan

    @property
    def width(self) -> int:
        """d, of all heads together."""
        return self.heads * self.head_dim

    @property
    def groups(self) -> tuple[int, int]:
        """(heads of keys and values, heads of queries for each)."""
        kept = self.kv_heads or self.heads
        return kept, self.heads // kept

    @property
    def _offsets_at(self) -> int:
        """Where the columns of q, k and v end."""
        return self.width + 2 * self.groups[0] * self.head_dim

    # ---- shapes and floats

    def attributes(self) -> dict[str, Any]:
        """Without what only some models have, so that the others' graphs are as they were."""
        found = super().attributes()
        return {key: value for key, value in found.items() if key not in ("kv_heads", "rotation", "row_offsets") or value}

    def check(self) -> None:
        temperature = self.parameter_shapes.get("inverse_temperature")
        if self.kv_heads < 0 or self.heads % (self.kv_heads or self.heads):
            raise self.fail(f"{self.heads} heads cannot share {self.kv_heads} evenly")
        if self.rotation is not None and (
            self.rotation.width != self.head_dim or temperature is not None or not 2.0**-20 < self.scale <= 1
        ):
            raise self.fail("its rotation does not fit")
        if self.heads < 1 or self.head_dim < 1 or (temperature is not None and (len(temperature) != 2 or temperature[0] != self.heads)):
            raise self.fail("inverse_temperature must be (H, n_positions)")

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = shapes[0]
        temperature = self.parameter_shapes.get("inverse_temperature")
        if (
            len(shape) != 3
            or shape[2] != self._offsets_at + (self.heads if self.row_offsets else 0)
            or (temperature is not None and shape[1] > temperature[1])
        ):
            raise self.fail(f"input {list(shape)} does not hold q, k, v of {self.heads} heads of {self.head_dim}")
        return (shape[0], 1 if self.last_query else shape[1], self.width)

    def last_position_of(self) -> Node | None:
        values = {**self.attributes(), "last_query": True, "inverse_temperature": self.maybe("inverse_temperature")}
        return None if self.last_query else CausalAttention(self.name, self.layer, **values)

    def split_heads(self, qkv: Any) -> tuple[Any, Any, Any]:
        """(B, T, ...) -> q (B, H, T, d_k), k and v (B, kept heads, T, d_k); q not yet scaled, neither turned."""
        q, k, v = (self._columns(qkv, part) for part in range(3))
        return q, k, v

    def _columns(self, qkv: Any, index: int) -> Any:
        """q, k or v: (B, T, ...) -> (B, its heads, T, d_k)."""
        batch, length, _ = qkv.size()
        kept = self.groups[0]
        heads = kept if index else self.heads
        start = (self.heads + (index - 1) * kept) * self.head_dim if index else 0
        part = qkv[:, :, start : start + heads * self.head_dim]
        return part.reshape(batch, length, heads, self.head_dim).permute(0, 2, 1, 3)

    def turned_and_scaled(self, q: Any, k: Any) -> tuple[Any, Any]:
        """q and k (B, heads, T, d_k), turned, q with the temperatures and the constant applied."""
        if self.rotation is not None:
            q, k = (turned_floats(part, self.rotation, 0) for part in (q, k))
        temperature = self.maybe("inverse_temperature")
        if temperature is not None:
            q = q.mul(temperature[:, : q.size(2)].unsqueeze(-1))  # (H, T, 1)
        return (q if self.scale == 1.0 else q.mul(self.scale)), k

    def for_queries(self, part: Any) -> Any:
        """k or v (B, kept heads, T, d_k) for each head of queries."""
        shared = self.groups[1]
        return part if shared == 1 else part[:, torch.arange(self.groups[0]).repeat_interleave(shared)]

    def _float_scores(self, qkv: Any, q: Any, k: Any) -> Any:
        """(B, H, T, T), of q and k as `turned_and_scaled` gives them."""
        scores = q.matmul(self.for_queries(k).transpose(2, 3))
        return scores.add(qkv[:, :, self._offsets_at :].permute(0, 2, 1).unsqueeze(-1)) if self.row_offsets else scores

    def generic(self, qkv: Any, *others: Any) -> Any:
        q, k, v = self.split_heads(qkv)
        q, k = self.turned_and_scaled(q, k)
        scores = self._float_scores(qkv, q, k)
        mixed = last_axis_softmax(scores, causal=True).matmul(self.for_queries(v))  # (B, H, T, d_k)
        merged = mixed.permute(0, 2, 1, 3).reshape(qkv.size(0), qkv.size(1), self.width)  # (B, T, d)
        return last_of(merged) if self.last_query else merged

    # ---- shares

    def protocol(self, x: PrivinfTensor, *others: PrivinfTensor) -> Protocol_[Shares]:
        party, runtime, rings, several = x.party, x.runtime, self.plan.rings, x.runtime.batch
        batch, count, _ = x.shares.shape
        last = self.last_query and not runtime.every
        asked, end = 1 if last else count, runtime.offset + count
        if several is not None:
            asked = len(several.new) if last else count
        queries = [] if self.name in runtime.unread else [(yield from self._query(x, asked))]
        k = self._turned(party, self._part(x, 1), runtime.windows(count))
        k = yield from rescale(party, k, bits=rings.qk_bits, frac=rings.k_frac)
        before: Mapping[str, Any] = runtime.state.get(self.name, {})
        columns = min(reach(end), runtime.fills) if runtime.fills and several is None and count == 1 < end else 0
        filled = ((columns,) if columns else ()) if several is None else several.columns

        def joined(part: str, wire: Wire) -> tuple[Cached | Stack, Cached | Stack]:
            if several is None:
                return Cached.extended(party, (self.name, part), before.get(part), wire, columns)
            if several.settled:
                return (found := put(party, (self.name, part), before[part], wire, several.places, several.starts)), found
            return (found := gather(party, before.get(part), wire, several.segments, several.starts)), found

        def opened_values() -> Protocol_[Cached | Stack]:
            v = yield from rescale(party, self._part(x, 2), bits=rings.v_bits, frac=rings.v_frac)
            (wire,) = yield from open_masked(party, [v], keep=several is None)
            kept, read = joined("values", wire)
            self.keep(runtime, keys=keys, values=kept)
            return read

        opened, (k_wire,) = yield from parallel(open_masked(party, queries), open_masked(party, [k], keep=several is None))
        keys, keys_read = joined("keys", k_wire)
        if not opened:
            yield from opened_values()
            return x.shares
        rows = Rows((columns or end) - asked + 1, asked, 1) if several is None else several.layout(last)
        live = self._live(x, filled) if filled else None
        # what it takes to have values in a wider ring goes beside the scores; of a single row a round is worth more than the bytes
        shift = (
            {"offset": (yield from row_offsets(x, self.heads, self._offsets_at, asked, rings.score_bits, rings.score_frac))}
            if self.row_offsets
            else {}
        )
        out = yield from self.of_wires(party, opened[0], keys_read, opened_values(), rows, rings, at_once=rows.alone, live=live, **shift)
        # (B H, T, d_k) -> (B, T, d)
        return out.map(lambda v: v.reshape(batch, self.heads, asked, self.head_dim).transpose(1, 2).reshape(batch, asked, self.width))

    def _live(self, x: PrivinfTensor, filled: Sequence[int]) -> Any:
        """Of the row of a further token of each sequence, filled up to so many elements."""
        return live_rows(x, filled, self.plan.within)

    def _part(self, x: PrivinfTensor, index: int) -> Shares:
        """q, k or v: (B, T, ...) -> (B H, T, d_k); where heads share, q (B kept, shared, T, d_k), k and v (B kept, 1, T, d_k)."""
        count, apart = x.shares.shape[1], () if (shared := self.groups[1]) == 1 else (1 if index else shared,)
        part = x.shares.map(lambda v: self._columns(v, index).reshape(-1, *apart, count, self.head_dim))
        return replace(part, frac=part.frac + getattr(self.plan, "fine", 0)) if index else part

    def _turned(self, party: Party, x: Shares, windows: Sequence[tuple[int, int]], factor: float = 1.0) -> Shares:
        """Rows (..., T, d_k) at these positions, turned if there is a rotation, and then times a factor."""
        return x if self.rotation is None else rotate(x, self.rotation, windows, factor, varying=party.varying)

    def _query(self, x: PrivinfTensor, asked: int) -> Protocol_[Shares]:
        """The queries that are asked, the last or all of them, turned and scaled, (B H, asked, d_k) or (B kept, shared, asked, d_k)."""
        batch, count, _ = x.shares.shape
        q, several = self._part(x, 0), x.runtime.batch
        windows = x.runtime.windows(count, self.last_query and not x.runtime.every)
        if several is None:
            q = q.map(lambda v: v[..., count - asked :, :])
        elif asked < count:
            q = q.map(lambda v: v[..., several.lasts, :] if known(v) else v[..., : len(several.lasts), :])
        q = self._turned(x.party, q, windows, self.scale)
        if "inverse_temperature" in self.parameter_shapes:
            weight, places = x.runtime.weights[f"{self.name}.inverse_temperature"], [end for window in windows for end in window]
            apart, shape = q.map(lambda v: v.reshape(batch, self.heads, asked, self.head_dim)), q.shape
            q = yield from scale(x.party, apart, weight, bits=x.shares.bits, window=places)
            q = q.map(lambda v: v.reshape(shape))
        return (yield from rescale(x.party, q, bits=self.plan.qk_bits, frac=self.plan.q_frac))

    # ---- the ring plan

    def measure(self, inputs: tuple[Tensor, ...], output: Tensor) -> Iterator[tuple[str, Tensor]]:
        q, k, v = self.split_heads(inputs[0])
        q, k = self.turned_and_scaled(q, k)
        yield from (("q", q), ("k", k), ("v", v))
        scores = self._float_scores(inputs[0], q, k)
        yield "score", scores.tril()  # masked ones are never computed privately
        yield from measured_rows(scores)

    def bound_of(self, part: str, ranges: Mapping[str, float]) -> float:
        return bound_of_rows(part, self.plan.within) if part == "score" or part in ROW_PARTS else super().bound_of(part, ranges)

    def name_of(self, part: str) -> str:
        return "a score" if part == "score" else ROW_PARTS.get(part) or super().name_of(part)

    def make_plan(self, planning: Planning) -> Plan:
        seen = planning.ranges[self.name]["score_seen"]
        if seen > LARGEST_SCORE:
            raise RangeError(
                f"attention scores reach {seen:g}; the plan allows for {LARGEST_SCORE:g}",
                layer=self.name,
                remedy="train with a penalty on large scores, or calibrate on inputs closer to those in use",
            )
        q_frac, k_frac, qk_bits = self._scores(planning, within := self._within(planning))
        finer = self._finer(planning)
        product_bits = SUM_FRAC + finer + AttentionRings(within=within).reciprocal_frac + self._v_range(planning) + 2
        v_bits = self._sum_bits(planning, within) + finer
        if v_bits > 64 or product_bits > WIDEST:
            raise self.unfit(planning)
        out_bits, out_frac = planning.output_for_readers(self.name)
        rows = {} if within is None else {f"row_{name}": int(getattr(within, name)) for name in ROW_FIELDS}
        return self.Plan(
            qk_bits=qk_bits,
            q_frac=q_frac,
            k_frac=k_frac,
            v_bits=v_bits,
            v_frac=V_FRAC + finer,
            sum_frac=SUM_FRAC + finer,
            product_bits=product_bits,
            weight_frac=temperature_frac(self.head_dim, k_frac, finer),
            bits=planning.bits,
            frac=planning.frac,
            out_frac=out_frac,
            out_bits=out_bits,
            fine=planning.fine(self.name),
            score_fine=finer,
            **rows,
        )

    def _v(self, planning: Planning) -> float:
        return float(planning.ranges[self.name]["v"])

    def _v_range(self, planning: Planning) -> int:
        """The logarithm of v's range, 2, 6, 10, ...: rounded once, for every ring that follows from it."""
        return up(math.log2(max(self._v(planning), SMALLEST)) - 2) + 2

    def _sum_bits(self, planning: Planning, within: RowRange | None) -> int:
        """The ring of the weighted sums of v."""
        positions = max(planning.info.n_positions, 1)
        largest = LARGEST * positions if within is None else within.largest(positions)
        return WEIGHT_FRAC + V_FRAC + math.ceil(math.log2(largest)) + self._v_range(planning) + 2

    def _within(self, planning: Planning) -> RowRange | None:
        """The range of the rows at calibration, if rings and tables hold it, else none: a maximum. Of two, that with the narrower ring."""
        positions = max(planning.info.n_positions, 1)

        def fits(within: RowRange) -> bool:
            widest = max(self._sum_bits(planning, within), within.window.bits)
            return widest <= (WIDEST_SHIFTED if self.row_offsets else WIDEST_SUMS) and within.has_tables(positions)

        headrooms = HEADROOMS if self.row_offsets else HEADROOMS[-1:]
        return chosen(planning.ranges[self.name], headrooms, fits, lambda within: self._sum_bits(planning, within))

    def _scores(self, planning: Planning, within: RowRange | None) -> tuple[int, int, int]:
        """Fraction bits of q and of k, and the ring of both and of their product, whose truncation to the scores is a reduction."""
        q_frac, k_frac = score_fracs(self.head_dim, planning.ranges, self._finer(planning))
        return q_frac, k_frac, AttentionRings(within=within).score_bits + q_frac + k_frac - SCORE_FRAC

    def _finer(self, planning: Planning) -> int:
        """Fraction bits that its scores and v have besides; q and k too."""
        return finer(planning.ranges[self.name])

    def wants(self, planning: Planning, maker: str) -> Wanted:
        tempered = "inverse_temperature" in self.parameter_shapes
        q_frac, k_frac, bits = self._scores(planning, within := self._within(planning))
        finer = self._finer(planning)
        diagonal = temperature_frac(self.head_dim, k_frac, finer)
        more_q, more_k = (diagonal, 0) if tempered else (0, 0) if self.rotation is None else (frac_of(self.scale), frac_of(1.0))
        in_frac, weight_frac = TEMPERED_FRACS if tempered and not finer else (FRAC, MATRIX_FRAC) if tempered else QKV_FRACS
        weight_frac += finer_weights(planning.ranges.get(maker, {}))
        of_q = bits - q_frac + more_q
        if tempered and finer:  # no ring holds that: q is widened on its own, for a round
            of_q = up(math.log2(max(planning.ranges[self.name]["q"], SMALLEST))) + 2 + more_q
        headroom = max(of_q, bits - k_frac + more_k, self._v_range(planning) + 2)
        sums = self._sum_bits(planning, within) - V_FRAC
        # where v cannot have its ring without fraction bits of the weight, or some of its own, it is widened on its own, beside the scores
        spare = MOST_FINE if tempered else 0
        of_v = sums if max(headroom, sums + spare) + weight_frac + FRAC <= 64 else self._v_range(planning) + 2
        fine = (self.width, self._offsets_at, max(bits - k_frac + more_k, of_v))  # of k and v
        return Wanted(max(headroom, of_v + spare), in_frac, weight_frac, headroom, fine)

    def unfit(self, planning: Planning) -> RangeError:
        return RangeError(f"values of v up to {self._v(planning):g} do not fit a ring of 64 bits", layer=self.name)

    def encoding(self, key: str) -> tuple[int, int, bool]:
        return 64, self.plan.weight_frac, False

    def inner_wires(self, own: Mapping[str, float], source: float | None) -> Iterator[Shown]:
        plan = self.plan
        for part, bits, frac in (("q", plan.qk_bits, plan.q_frac), ("k", plan.qk_bits, plan.k_frac), ("v", plan.v_bits, plan.v_frac)):
            yield Shown(part, bits, frac, own.get(part))
        yield from shown_rows(plan.within, plan.score_fine, bool(own))
        yield Shown("sums of v", plan.product_bits, plan.sum_frac + plan.rings.reciprocal_frac, own.get("v"))
