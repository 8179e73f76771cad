"""Every protocol's declared cost against its trace and against what was counted on the wire, exactly."""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import protocols
from protocols.ceiling import cost_row_ceiling, row_ceiling
from protocols.comparison import CompareMask, compare, cost_compare
from protocols.correlations import Role
from protocols.declared import Declared
from protocols.exponential import cost_exponential, exponential
from protocols.linear import Weight, cost_linear, cost_lookup, cost_scale, linear, lookup, scale
from protocols.max_plus import cost_max_plus, cost_max_plus_attention, max_plus, max_plus_attention
from protocols.maximum import cost_row_argmax, cost_row_maximum, row_argmax, row_maximum
from protocols.opening import cost_open_masked, cost_reveal, open_masked, reveal
from protocols.party import Party, Protocol_
from protocols.product import (
    Cached,
    cost_matmul_wires,
    cost_multiply,
    cost_scores,
    cost_weighted,
    matmul_wires,
    multiply,
    scores,
    weighted,
)
from protocols.reciprocal import cost_reciprocal, reciprocal
from protocols.relu_attention import ReluRings, cost_relu_attention, relu_attention
from protocols.rowrange import RowRange, further
from protocols.rows import Rows, Stacked
from protocols.sequences import (
    cost_gather,
    cost_put,
    cost_scores_of_sequences,
    cost_weighted_of_sequences,
    gather,
    put,
    scores_of_sequences,
    weighted_of_sequences,
)
from protocols.softmax import (
    AttentionRings,
    attention,
    bounded_exponentials,
    cost_attention,
    cost_bounded_exponentials,
    cost_exponentials,
    cost_softmax,
    exponentials,
    softmax,
)
from protocols.truncation import cost_rescale, rescale
from tests.support.two_party import execute, input_of, offline_walk


@dataclass
class Case:
    """A program, what it should cost, and the weights that it reads."""

    name: str
    declared: Declared
    program: Callable[[Party], Protocol_[Any]]
    weights: dict[str, tuple[Weight, Tensor]] = field(default_factory=dict)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def opened(party: Party, *values: tuple[tuple[int, ...], int, int]) -> Protocol_[list[Any]]:
    """Wires of zeros: (shape, bits, fraction bits)."""
    return (yield from open_masked(party, [input_of(party, zeros(*shape), bits, frac) for shape, bits, frac in values]))


def opening(*values: tuple[tuple[int, ...], int, int]) -> Declared:
    return cost_open_masked(*((zeros(*shape).numel(), bits) for shape, bits, _ in values))


def linear_case(rows: int, n: int, m: int, bits: int, early: bool, transposed: bool = False) -> Case:
    weight = Weight("w", (m, n) if transposed else (n, m), bits + 3, 5)

    def program(party: Party) -> Protocol_[Any]:
        x = input_of(party, zeros(rows, n), bits + 1, 3, early=early)
        yield from linear(party, x, weight, bits=bits, transposed=transposed)

    declared = cost_linear(rows, n, m, bits, early=early)
    return Case(f"linear {rows}x{n}x{m} {bits} {early} {transposed}", declared, program, {"w": (weight, zeros(*weight.shape))})


def scale_case(heads: int, rows: int, width: int, bits: int, early: bool) -> Case:
    weight = Weight("w", (heads, rows + 4), bits, 5)

    def program(party: Party) -> Protocol_[Any]:
        x = input_of(party, zeros(heads, rows, width), bits, 3, early=early)
        yield from scale(party, x, weight, bits=bits, window=(2, rows + 2))

    declared = cost_scale(heads * rows * width, bits, early=early)
    return Case(f"scale {heads}x{rows}x{width} {bits} {early}", declared, program, {"w": (weight, zeros(heads, rows + 4))})


def lookup_case(count: int, vocabulary: int, width: int, bits: int) -> Case:
    table = Weight("t", (vocabulary, width), bits + 2, 5)

    def program(party: Party) -> Protocol_[Any]:
        ids = None if party.is_server or offline_walk(party) else torch.arange(count) % vocabulary
        yield from lookup(party, ids, count, table, bits=bits)

    declared = cost_lookup(count, vocabulary, width, bits)
    return Case(f"lookup {count} of {vocabulary}x{width} {bits}", declared, program, {"t": (table, zeros(vocabulary, width))})


def open_case(*values: tuple[int, int, bool]) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        yield from open_masked(party, [input_of(party, zeros(count), bits, 0, early=early) for count, bits, early in values])

    declared = cost_open_masked(*((count, bits) for count, bits, _ in values), early=[early for *_, early in values])
    return Case(f"open {values}", declared, program)


def reveal_case(count: int, bits: int, to: Role) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        yield from reveal(party, input_of(party, zeros(count), bits, 0), to=to)

    return Case(f"reveal {count} {bits} {to}", cost_reveal(count, bits, to), program)


def rescale_case(count: int, bits: int, shift: int, to_bits: int, early: bool, nonnegative: bool) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        x = input_of(party, zeros(count), bits, shift, early=early)
        yield from rescale(party, x, bits=to_bits, frac=0, nonnegative=nonnegative)

    declared = cost_rescale(count, bits, shift, to_bits, early=early)
    return Case(f"rescale {count} {bits}-{shift} to {to_bits} {early} {nonnegative}", declared, program)


def chain_case(early: bool) -> Case:
    """linear, then an exact truncation and an opening of C's early share, then an answer: the rounds that a chain has."""
    weight = Weight("w", (5, 3), 40, 8)

    def program(party: Party) -> Protocol_[Any]:
        y = yield from linear(party, input_of(party, zeros(2, 5), 40, 12, early=early), weight, bits=40)
        z = yield from rescale(party, y, bits=38, frac=12)
        yield from open_masked(party, [y, z])
        yield from reveal(party, z, to=Role.CLIENT)

    declared = cost_linear(2, 5, 3, 40, early=early) + cost_rescale(6, 40, 8, 38, early=True)
    declared += cost_open_masked((6, 40), (6, 38), early=(True, False)) + cost_reveal(6, 38, Role.CLIENT)
    return Case(f"chain {early}", declared, program, {"w": (weight, zeros(5, 3))})


def product_case(left: tuple[int, ...], right: tuple[int, ...], bits: int, rows: Rows | None = None) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        x, y = yield from opened(party, (left, bits, 3), (right, bits, 4))
        multiply(party, x, y, bits, rows)

    count = zeros(*left).numel() if rows else torch.broadcast_shapes(left, right).numel()
    declared = opening((left, bits, 3), (right, bits, 4)) + cost_multiply(count, bits)
    return Case(f"multiply {left} {right} {bits} {rows}", declared, program)


def matmul_case(left: tuple[int, ...], right: tuple[int, ...], bits: int) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        x, y = yield from opened(party, (left, bits, 3), (right, bits, 4))
        matmul_wires(party, x, Cached.join(None, y), bits)

    declared = opening((left, bits, 3), (right, bits, 4))
    declared += cost_matmul_wires(zeros(*left[:-2]).numel(), left[-2], right[-1], bits)
    return Case(f"matmul {left} {right} {bits}", declared, program)


def rows_case(heads: int, rows: Rows, width: int, bits: int) -> Case:
    q, k, p = (heads, rows.number, width), (heads, rows.columns, width), (heads, rows.count)

    def program(party: Party) -> Protocol_[Any]:
        x, y, z = yield from opened(party, (q, bits, 3), (k, bits, 4), (p, bits, 2))
        scores(party, x, Cached.join(None, y), rows, bits)
        weighted(party, z, Cached.join(None, y), rows, bits)

    declared = opening((q, bits, 3), (k, bits, 4), (p, bits, 2))
    declared += cost_scores(heads, rows, bits) + cost_weighted(heads, rows, width, bits)
    return Case(f"scores and weighted {heads} {rows.fields()} {width} {bits}", declared, program)


def sequences_case(heads: int, rows: Stacked, width: int, bits: int) -> Case:
    q, k, p = (heads, rows.number, width), (heads, sum(part.columns for part in rows.parts), width), (heads, rows.count)
    starts, one = [sum(part.columns for part in rows.parts[:at]) for at in range(len(rows.parts))], (heads, 1, width)

    def program(party: Party) -> Protocol_[Any]:
        x, y, z, row = yield from opened(party, (q, bits, 3), (k, bits, 4), (p, bits, 2), (one, bits, 4))
        stack = put(party, ("", ""), gather(party, None, y, [(1, 0, k[1])], starts), row, [k[1] - 1], starts)
        scores_of_sequences(party, x, stack, rows, bits)
        weighted_of_sequences(party, z, stack, rows, bits)

    declared = opening((q, bits, 3), (k, bits, 4), (p, bits, 2), (one, bits, 4)) + cost_gather() + cost_put()
    declared += cost_scores_of_sequences(heads, rows, bits) + cost_weighted_of_sequences(heads, rows, width, bits)
    return Case(f"sequences {heads} {rows.fields()} {width} {bits}", declared, program)


def compare_case(shape: tuple[int, ...], r_shape: tuple[int, ...], bits: int, single: int = 0) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        (r,) = yield from opened(party, (r_shape, bits, 0))
        c = r.masked.expand(shape) if not r.masked.is_meta else torch.empty(shape, dtype=torch.int64, device="meta")
        yield from compare(party, c, CompareMask(r.name, shape, r_shape, bits, single))

    cost = cost_compare(zeros(*shape).numel(), bits, masks=zeros(*r_shape).numel(), single=bool(single))
    return Case(f"compare {shape} {r_shape} {bits} {single}", opening((r_shape, bits, 0)) + cost, program)


def maximum_case(heads: int, rows: Rows, bits: int) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        (x,) = yield from opened(party, ((heads, rows.count), bits, 0))
        yield from row_maximum(party, x, rows)

    declared = opening(((heads, rows.count), bits, 0)) + cost_row_maximum(heads, rows, bits)
    return Case(f"maximum {heads} {rows.fields()} {bits}", declared, program)


def argmax_case(heads: int, length: int, bits: int, sequences: int = 1) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        (x,) = yield from opened(party, ((heads, sequences * length), bits, 0))
        yield from row_argmax(party, x, Rows(length, 1, 0).times(sequences))

    declared = opening(((heads, sequences * length), bits, 0)) + cost_row_argmax(heads, length, bits, sequences)
    return Case(f"argmax {heads} {length} {bits} {sequences}", declared, program)


def ceiling_case(heads: int, rows: Rows) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        (x,) = yield from opened(party, ((heads, rows.count), 21, 12))
        yield from row_ceiling(party, x, rows, 12)

    return Case(f"ceiling {heads} {rows.fields()}", opening(((heads, rows.count), 21, 12)) + cost_row_ceiling(heads, rows), program)


def exponential_case(heads: int, rows: Rows) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        x, m = yield from opened(party, ((heads, rows.count), 21, 12), ((heads, rows.number), 10, 1))
        yield from exponential(party, x, m, rows, 11)

    declared = opening(((heads, rows.count), 21, 12), ((heads, rows.number), 10, 1)) + cost_exponential(heads * rows.count)
    return Case(f"exponential {heads} {rows.fields()}", declared, program)


def exponentials_case(heads: int, rows: Rows, bits: int, early: bool) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        yield from exponentials(party, input_of(party, zeros(heads, rows.count), 21, 12, early=early), rows, bits)

    return Case(f"exponentials {heads} {rows.fields()} {bits} {early}", cost_exponentials(heads, rows, bits, early=early), program)


def bounded_case(heads: int, rows: Rows, bits: int, within: RowRange, at_once: bool) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        x = input_of(party, zeros(heads, rows.count), 21, 12)
        yield from bounded_exponentials(party, x, rows, bits, within, at_once=at_once)

    declared = cost_bounded_exponentials(heads, rows, bits, within, at_once=at_once)
    return Case(f"bounded exponentials {heads} {rows.fields()} {bits} {within} {at_once}", declared, program)


def reciprocal_case(count: int, ring: tuple[int, int], bound: float, bits: int, frac: int, exact: float | None = None) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        yield from reciprocal(party, input_of(party, torch.ones(1, count), *ring), bound=bound, bits=bits, frac=frac, exact=exact)

    return Case(f"reciprocal {count} {ring} {bound} {bits} {frac} {exact}", cost_reciprocal(count, *ring, bound, bits, exact), program)


def softmax_case(heads: int, rows: Rows, ring: tuple[int, int], to: tuple[int, int], early: bool = False) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        x = input_of(party, zeros(heads, rows.count), *ring, early=early)
        yield from softmax(party, x, rows, bits=to[0], frac=to[1])

    return Case(f"softmax {heads} {rows.fields()} {ring} {to} {early}", cost_softmax(heads, rows, *ring, *to, early=early), program)


def attention_case(heads: int, width: int, rows: Rows, rings: AttentionRings, at_once: bool = False) -> Case:
    q, k, v = (heads, rows.number, width), (heads, rows.columns, width), (heads, rows.columns, width)
    wires = (q, rings.qk_bits, rings.q_frac), (k, rings.qk_bits, rings.k_frac), (v, rings.v_bits, rings.v_frac)

    def program(party: Party) -> Protocol_[Any]:
        x, y, z = yield from opened(party, *wires)
        yield from attention(party, x, Cached.join(None, y), Cached.join(None, z), rows, rings, at_once=at_once)

    declared = opening(*wires) + cost_attention(heads, width, rows, rings, at_once=at_once)
    return Case(f"attention {heads} {width} {rows.fields()} {rings.v_bits} {at_once}", declared, program)


def relu_attention_case(heads: int, width: int, rows: Rows, rings: ReluRings) -> Case:
    q, k = (heads, rows.number, width), (heads, rows.columns, width)
    wires = (q, rings.qk_bits, rings.q_frac), (k, rings.qk_bits, rings.k_frac), (k, rings.v_bits, rings.v_frac)

    def program(party: Party) -> Protocol_[Any]:
        x, y, z = yield from opened(party, *wires)
        yield from relu_attention(party, x, Cached.join(None, y), Cached.join(None, z), rows, rings)

    return Case(
        f"relu attention {heads} {width} {rows.fields()} {rings.mean_bits}",
        opening(*wires) + cost_relu_attention(heads, width, rows, rings),
        program,
    )


def max_plus_case(count: int, inner: int, outputs: int, bits: int, early: bool = False) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        weight = zeros(inner, outputs) if party.is_server else None
        yield from max_plus(party, input_of(party, zeros(count, inner), bits, 12, early=early), weight, outputs)

    declared = cost_max_plus(count, inner, outputs, bits, early=early)
    return Case(f"max-plus {count} {inner} {outputs} {bits} {early}", declared, program)


def max_plus_attention_case(heads: int, width: int, rows: Rows, bits: int, early: bool = False) -> Case:
    def program(party: Party) -> Protocol_[Any]:
        shapes = (heads, rows.number, width), (heads, rows.columns, width), (heads, rows.columns, width)
        q, k, v = (input_of(party, zeros(*shape), bits, 12, early=early) for shape in shapes)
        yield from max_plus_attention(party, q, k, v, rows)

    declared = cost_max_plus_attention(heads, width, rows, bits, early=early)
    return Case(f"max-plus attention {heads} {width} {rows.fields()} {bits} {early}", declared, program)


ONE, CAUSAL, CACHED, EQUAL = Rows(1, 1, 0), Rows(1, 7, 1), Rows(10, 3, 1), Rows(5, 3, 0)
RANGES = [RowRange(6, 10, 6, True), RowRange(2, 4, 4, False), RowRange(6, 8, 6, True, 2), RowRange(2, 4, 4, True, 1)]
LAYOUTS = [ONE, CAUSAL, CACHED, EQUAL, Rows(1, 4, 0), Rows(2, 1, 0), Rows(3, 2, 0), Rows(17, 1, 0), Rows(1, 33, 1)]
STACKED = [Stacked.of([Rows(1, 1, 1)]), Stacked.of([CACHED, CAUSAL, Rows(5, 1, 1)]), Stacked.of([Rows(9, 1, 1), Rows(4, 1, 1)])]
CASES = [
    *(
        linear_case(*shape, bits, early)
        for shape in ((1, 1, 1), (3, 5, 7), (2, 8, 3))
        for bits in (1, 21, 33, 61)
        for early in (False, True)
    ),
    linear_case(3, 5, 7, 20, False, transposed=True),
    *(scale_case(*shape, bits, early) for shape in ((1, 1, 1), (3, 5, 7)) for bits in (17, 64) for early in (False, True)),
    *(lookup_case(*shape) for shape in ((1, 1, 1, 9), (3, 11, 5, 20), (2, 257, 3, 15))),
    *(open_case((count, bits, early)) for count in (1, 7, 64) for bits in (1, 9, 42, 64) for early in (False, True)),
    open_case((3, 5, True), (4, 41, False)),
    open_case((3, 5, True), (4, 41, True)),
    *(reveal_case(count, bits, to) for count in (1, 13) for bits in (3, 32) for to in Role),
    *(
        rescale_case(count, *ring, early, nonnegative)
        for count in (1, 9)
        for ring in ((33, 12, 21), (40, 16, 40), (18, 0, 44), (64, 20, 64), (37, 3, 35))
        for early in (False, True)
        for nonnegative in (False, True)
    ),
    chain_case(False),
    chain_case(True),
    *(product_case(*shapes, bits) for shapes in (((1,), (1,)), ((2, 3, 1), (1, 5)), ((4, 7), (4, 1))) for bits in (13, 40)),
    *(product_case((2, rows.count), (2, rows.number), 39, rows) for rows in LAYOUTS),
    *(matmul_case(*shapes, 27) for shapes in (((1, 1), (1, 1)), ((2, 3, 4), (2, 4, 5)))),
    *(rows_case(3, rows, 5, 29) for rows in LAYOUTS),
    *(sequences_case(3, rows, 5, 29) for rows in STACKED),
    *(compare_case((3, 2), (3, 2), bits) for bits in (1, 2, 7, 8, 10, 13, 14, 19, 20, 25, 26, 31, 32, 38, 43)),
    compare_case((5, 4, 9), (5, 4, 1), 13),
    compare_case((5, 4, 9), (5, 4, 1), 6),
    *(compare_case((5, 4, 3), (5, 4, 1), bits, single=1) for bits in (1, 7, 8, 12, 16)),
    *(maximum_case(2, rows, bits) for rows in [*LAYOUTS, *STACKED] for bits in (7, 10, 21)),
    *(argmax_case(2, length, bits) for length in (1, 2, 3, 4, 5, 9, 16, 17, 65) for bits in (5, 16, 20)),
    argmax_case(1, 4500, 16),
    *(argmax_case(1, length, 16, 3) for length in (1, 5, 65)),
    *(exponential_case(3, rows) for rows in LAYOUTS[:4]),
    *(exponentials_case(2, rows, 44, early) for rows in LAYOUTS for early in (False, True)),
    *(reciprocal_case(5, (44, 16), bound, 40, 20) for bound in (1.0, 1.66, 2.0, 3.0, 17.5, 512.0, 513.0, 1699.0, 4096.0)),
    reciprocal_case(3, (30, 9), 7.0, 33, 15),
    reciprocal_case(3, (48, 16), 7000.0, 44, 20, exact=20.0),
    reciprocal_case(3, (48, 16), 900.0, 57, 20, exact=3.0),
    *(
        bounded_case(2, rows, bits, within, once)
        for rows in LAYOUTS[:4]
        for bits in (40, 47)
        for within in RANGES
        for once in (False, True)
    ),
    *(softmax_case(2, rows, (33, 24), (30, 20)) for rows in LAYOUTS),
    softmax_case(2, CAUSAL, (21, 12), (39, 36)),
    softmax_case(2, CAUSAL, (33, 24), (30, 20), early=True),
    softmax_case(2, CAUSAL, (30, 24), (30, 20), early=True),
    softmax_case(1, Rows(1, 600, 0), (33, 24), (30, 20)),
    *(attention_case(2, 5, rows, AttentionRings()) for rows in LAYOUTS),
    attention_case(2, 3, CAUSAL, AttentionRings(qk_bits=30, q_frac=13, k_frac=9, v_bits=48, product_bits=44, out_bits=25, out_frac=13)),
    attention_case(1, 2, Rows(400, 2, 1), AttentionRings()),
    *(
        attention_case(2, 5, CAUSAL, AttentionRings(v_bits=46, score_fine=2, within=within))
        for within in (None, replace(RANGES[0], fine=2))
    ),
    *(attention_case(2, 5, rows, AttentionRings(v_bits=46, within=within)) for rows in LAYOUTS for within in RANGES),
    *(relu_attention_case(2, 5, rows, rings) for rows in LAYOUTS for rings in (ReluRings(), ReluRings(mean_bits=40))),
    *(max_plus_case(*shape, bits, early) for shape in ((1, 1, 1), (3, 5, 2), (2, 33, 3)) for bits in (14, 21) for early in (False, True)),
    *(max_plus_attention_case(2, width, rows, 20, early) for rows in LAYOUTS for width in (1, 5) for early in (False, True)),
    attention_case(2, 5, Rows(20, 1, 1), AttentionRings(v_bits=47, out_bits=36, out_frac=14, sum_frac=13)),
    *(attention_case(2, 5, Rows(20, 1, 1), AttentionRings(v_bits=43, within=within), True) for within in (None, *RANGES)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_declared_cost(case: Case) -> None:
    outcome = execute(lambda party: party.run(case.program(party)), case.weights)
    declared, traced, counted = case.declared, outcome.predicted, outcome.counted
    want = (declared.online, declared.rounds, declared.dealer, declared.early)
    assert want == (traced.online_bytes, traced.rounds, traced.dealer_bytes, traced.peer_offline_bytes)
    assert want == (counted["online"]["payload"], counted["online"]["rounds"], len(outcome.dealt), counted["offline"]["payload"])


def test_softmax_stays_within_its_budget() -> None:
    """Per unmasked element at the size of GPT-2: from the scores to the opened input of the product with V."""
    heads, rows = 12, Rows(1, 128, 1)
    region = cost_exponentials(heads, rows, 44) + cost_open_masked((heads * rows.count, 44))
    assert region.online / (heads * rows.count) < 29
    assert region.rounds == 11
    # without a maximum, for rows like those of random weights, and for scores that need a wider range
    for digit, bits, most in ((1, 38, 24), (2, 39, 24.8), (4, 41, 26.3)):
        within = RowRange(2 + further(digit), 4 + further(digit), 4, True, digit)
        assert bits == 16 + 13 + 4 + math.ceil(math.log2(within.largest(1024)))
        bounded = cost_bounded_exponentials(heads, rows, bits, within) + cost_open_masked((heads * rows.count, bits))
        assert bounded.online / (heads * rows.count) <= most
        assert bounded.dealer < region.dealer
        assert bounded.rounds == 4


def test_a_protocol_declares_its_cost_beside_it() -> None:
    """A protocol is a public function of a party; those that neither send nor take a correlation are named here."""
    local, found = {"unmasked", "add_server_constant"}, {}
    for module in (import_module(each.name) for each in pkgutil.walk_packages(protocols.__path__, "protocols.")):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            takes = inspect.signature(function).parameters.get("party")
            if function.__module__ == module.__name__ and not name.startswith("_") and takes is not None and takes.annotation == "Party":
                found[name] = hasattr(module, f"cost_{name}")
    assert {name for name, declared in found.items() if not declared} == local
    assert {"linear", "open_masked", "rescale", "compare", "multiply", "attention", "layer_norm"} <= {*found}
