"""The ring plan: the ring and the fraction bits of every wire and every weight, from value ranges.

A node's plan is a small dict of public integers. Widths that follow from value ranges are rounded up to multiples of 4,
so that they say little about the weights. Notation: a value below 2^m in size with f fraction bits needs f + m + 2 bits
where it is rescaled to a wider ring (one bit of sign, one of headroom; `protocols.truncation`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from privinf.crypten_adapter import Graph
from protocols.activation import EDGE, PRODUCT_BITS
from protocols.comparison import MAX_BITS
from protocols.errors import RangeError
from protocols.exponential import FRAC as SCORE_FRAC
from protocols.linear import Weight
from protocols.matrix import WIDEST
from protocols.norm import centred
from protocols.softmax import LARGEST, RECIPROCAL_FRAC, SCORE_BITS, WEIGHT_FRAC

FRAC = 15  # of activations between nodes
DIAGONAL_FRAC = 14
# Rounding to f fraction bits is off by 2^-f / sqrt(6) (standard deviation; truncation) or 2^-f / sqrt(12) (encoding). A linear map
# multiplies that of x by the norm of a column, that of its weight by the norm of x, which is the larger one; a ring pays for the sum
# of the two, and rounding x to fewer fraction bits before the map is a reduction, for nothing.
INPUT_FRAC, MATRIX_FRAC = 14, 16
CURVED_FRAC = 13  # of what ReLU and GELU give to a linear map; GELU's own error is 2^-12
QKV_FRACS = (13, 14)  # input and weight of the map to q, k, v
TEMPERED_FRACS = (FRAC, 14)  # the same where its ring is full anyway
LEAST_QKV_FRAC = 8  # of a weight where v is too large for those; 2^-9 |x| is then the error of q, k and v
TABLE_FRAC = 14  # of the embedding's table
HEAD_INPUT_FRAC, TIED_INPUT_FRAC = 14, 13  # of what the head reads; its matrix has TABLE_FRAC, and may be the embedding's table
COMPARED_FRAC = 14  # of what ReLU and GELU compare
QK_FRAC = 26  # of q and k together
V_FRAC = 13
SUM_FRAC = 13
LOGIT_FRAC = 8  # what is compared, and what a client may be given
SMALLEST = 2.0**-8  # of a range: smaller ones are not told apart
LARGEST_SCORE = 100.0  # seen at calibration; softmax is right up to 120
_COMPARED = ("relu", "gelu")


def up(bits: float) -> int:
    """Rounded up to a multiple of 4."""
    return 4 * math.ceil(bits / 4)


def _bits(name: str, frac: int, bound: float) -> int:
    bits = up(frac + math.log2(max(bound, SMALLEST)) + 2)
    if bits > 64:
        raise RangeError(f"values up to {bound:g} with {frac} fraction bits do not fit a ring of 64 bits", layer=name)
    return bits


def plan_rings(graph: Graph, ranges: Mapping[str, Mapping[str, float]], info: Any) -> dict[str, dict[str, Any]]:
    """The plan of every node: `ranges` gives the largest size (headroom included) of each node's `out`, and of `q`, `k`, `v`, `score`.

    RangeError where a value cannot fit: a score above LARGEST_SCORE at calibration, or a wire of more than 64 bits.
    """
    plans: dict[str, dict[str, Any]] = {}
    for name, node, inputs in graph.named_nodes():
        bound = float(ranges[name]["out"])
        plan: dict[str, Any] = {}
        if node.op == "embedding":
            # the output is a row of the table: its range is known, not measured
            plan = {"ring": _bits(name, TABLE_FRAC, float(node.value("weight").abs().max())), "weight_frac": TABLE_FRAC}
        elif node.op == "linear":
            source = graph._modules.get(inputs[0])
            in_frac = CURVED_FRAC if source is not None and source.op in _COMPARED else INPUT_FRAC
            plan = {"ring": _bits(name, in_frac + MATRIX_FRAC, bound), "in_frac": in_frac, "weight_frac": MATRIX_FRAC}
            readers = _readers(graph, name)
            if name in graph.output_names and info.input_kind == "ids":
                # the head: what is compared is a reduction of the product
                out_bits = _bits(name, LOGIT_FRAC, bound)
                in_frac = TIED_INPUT_FRAC if getattr(node, "tied_to", None) else HEAD_INPUT_FRAC
                plan = {"ring": out_bits + in_frac + TABLE_FRAC - LOGIT_FRAC, "in_frac": in_frac}
                plan |= {"weight_frac": TABLE_FRAC, "out_frac": LOGIT_FRAC, "out_bits": out_bits}
            elif readers and all(r.op == "attention" for r in readers):
                plan = _qkv(graph, name, readers[0], ranges, info)
            elif readers and all(r.op in _COMPARED for r in readers):
                # straight into the ring that is opened, by a reduction
                opened = max(PRODUCT_BITS if r.op == "gelu" else _compare_bits(name, bound) for r in readers)
                ring = max(plan["ring"], up(opened + INPUT_FRAC + MATRIX_FRAC - COMPARED_FRAC))
                plan |= {"ring": ring, "out_frac": COMPARED_FRAC, "out_bits": opened}
        elif node.op == "attention":
            plan = _attention(name, node, ranges[name], info)
        elif node.op in _COMPARED:
            largest = float(ranges.get(inputs[0], {}).get("out", bound))
            compared = _compare_bits(name, largest, PRODUCT_BITS if node.op == "gelu" else MAX_BITS)
            # what it reads is opened in this ring, whatever made it
            plan = {"compare_bits": compared, "opened": PRODUCT_BITS if node.op == "gelu" else compared}
        elif node.op == "layer_norm":
            plan = {"size_bits": up(math.log2(float(ranges[name]["squares"])))}
            ring, _ = centred(plan["size_bits"])
            largest = float(ranges.get(inputs[0], {}).get("out", 1.0))
            if ring > 62:
                raise RangeError(
                    f"a LayerNorm's sum of squares may reach 2^{plan['size_bits']}, which no ring of 64 bits holds", layer=name
                )
            plan["input_bits"] = _bits(name, FRAC + 24, largest)
        elif node.op in ("scale", "mul_constant", "mul", "matmul", "softmax"):
            plan = {"ring": _bits(name, FRAC + DIAGONAL_FRAC if node.op == "scale" else 2 * FRAC, bound)}
            if node.op == "scale":
                plan["weight_frac"] = DIAGONAL_FRAC
        if "weight_frac" in plan and node.op in ("embedding", "linear") and _is_small(node, plan["weight_frac"]):
            plan["small"] = 1
        plans[name] = plan
    widest = max((max(_input_bits(p, FRAC), *(p.get(key, 0) for key in ("input_bits", "out_bits"))) for p in plans.values()), default=0)
    canonical = max(up(widest), *(_bits(name, FRAC, float(ranges[name]["out"])) for name in plans))
    for name, plan in plans.items():
        plan["bits"], plan["frac"] = canonical, FRAC
        if graph.node(name).op in ("attention", *_COMPARED):
            # straight into the ring of the linear maps that read it
            readers = _readers(graph, name)
            linear = readers and all(reader.op == "linear" for reader in readers)
            plan["out_frac"] = INPUT_FRAC if linear else FRAC
            plan["out_bits"] = max(_input_bits(plans[reader.name], INPUT_FRAC) for reader in readers) if linear else canonical
    _tie(graph, plans)
    return plans


def _is_small(node: Any, frac: int) -> bool:
    """Whether an encoded weight is one limb (`protocols.matrix`): at 14 fraction bits below 128, as every weight should be."""
    return float(node.value("weight").abs().max()) * 2.0**frac < (1 << (WIDEST - 1)) - 1


def _input_bits(plan: Mapping[str, Any], frac: int) -> int:
    """The ring that a node's input with `frac` fraction bits needs before it is rounded to those that the node reads."""
    return max(int(plan.get("ring", 0)) + frac - int(plan.get("in_frac", frac)), int(plan.get("opened", 0)) + frac - COMPARED_FRAC)


def _readers(graph: Graph, name: str) -> list[Any]:
    """The nodes that read a value, through those that only take its last position."""
    found = []
    for reader in graph.consumers(name):
        found += _readers(graph, reader) if graph.node(reader).op == "last_position" else [graph.node(reader)]
    return found


def _compare_bits(name: str, bound: float, most: int = MAX_BITS) -> int:
    # GELU compares with its edges too, whatever the range
    bits = _bits(name, COMPARED_FRAC, max(bound, EDGE))
    if bits > most:
        raise RangeError(f"values up to {bound:g} are too large to be compared in {most} bits", layer=name)
    return bits


def _v_range(bound: float) -> int:
    """The logarithm of v's range, 2, 6, 10, ...: rounded once, for every ring that follows from it."""
    return up(math.log2(max(bound, SMALLEST)) - 2) + 2


def _v_bits(bound: float, info: Any) -> int:
    """The ring of the weighted sums of v."""
    return WEIGHT_FRAC + V_FRAC + math.ceil(math.log2(LARGEST * max(info.n_positions, 1))) + _v_range(bound) + 2


def _scores(node: Any) -> tuple[int, int, int]:
    """Fraction bits of q and of k, and the ring of both and of their product, whose truncation to the scores is a reduction.

    q comes divided by the root of d_k and k does not: a rounding of q is multiplied by that much more than one of k.
    """
    q_frac = (QK_FRAC + round(math.log2(node.head_dim) / 2) + 1) // 2
    return q_frac, QK_FRAC - q_frac, SCORE_BITS + QK_FRAC - SCORE_FRAC


def _qkv(graph: Graph, name: str, reader: Any, ranges: Mapping[str, Mapping[str, float]], info: Any) -> dict[str, Any]:
    """A linear map whose output is opened for attention: its ring is wide enough for every later truncation to be a reduction."""
    tempered = "inverse_temperature" in reader.parameter_shapes
    q_frac, k_frac, bits = _scores(reader)
    v_bits = _v_bits(float(ranges[reader.name]["v"]), info)
    in_frac, most = TEMPERED_FRACS if tempered else QKV_FRACS
    for weight_frac in range(most, LEAST_QKV_FRAC - 1, -1):
        frac = in_frac + weight_frac
        ring = frac + max(bits - q_frac + (DIAGONAL_FRAC if tempered else 0), bits - k_frac, v_bits - V_FRAC)
        if ring + FRAC - in_frac <= 64:
            return {"ring": ring, "weight_frac": weight_frac, "in_frac": in_frac, "raw": 1}
    raise RangeError(f"values of v up to {ranges[reader.name]['v']:g} do not fit a ring of 64 bits", layer=reader.name)


def _attention(name: str, node: Any, found: Mapping[str, float], info: Any) -> dict[str, Any]:
    if found["score_seen"] > LARGEST_SCORE:
        raise RangeError(
            f"attention scores reach {found['score_seen']:g}; the plan allows for {LARGEST_SCORE:g}",
            layer=name,
            remedy="train with a penalty on large scores, or calibrate on inputs closer to those in use",
        )
    bound = float(found["v"])
    v_bits = _v_bits(bound, info)
    if v_bits > 64:
        raise RangeError(f"values of v up to {bound:g} do not fit a ring of 64 bits", layer=name)
    q_frac, k_frac, qk_bits = _scores(node)
    return {
        "qk_bits": qk_bits,
        "q_frac": q_frac,
        "k_frac": k_frac,
        "v_bits": v_bits,
        "v_frac": V_FRAC,
        "sum_frac": SUM_FRAC,
        "product_bits": SUM_FRAC + RECIPROCAL_FRAC + _v_range(bound) + 2,
        "weight_frac": DIAGONAL_FRAC,
    }


def _tie(graph: Graph, plans: dict[str, dict[str, Any]]) -> None:
    """A head that is the embedding's table, transposed, gets the table's encoding: one weight, one mask."""
    for node in graph.nodes:
        table = getattr(node, "tied_to", None)
        if table is not None:
            plans[table]["weight_bits"] = max(plans[node.name]["ring"], plans[table].get("weight_bits", plans[table]["ring"]))


def weights_of(graph: Graph) -> dict[str, tuple[Weight, Any, str]]:
    """Every encoded matrix or diagonal: name -> (public record, node, parameter). Biases and positions are added by S, unencoded."""
    found: dict[str, tuple[Weight, Any, str]] = {}
    for node in graph.nodes:
        for key in ("weight", "inverse_temperature"):
            if key not in node.parameter_shapes or node.op in ("position_bias", "bias") or getattr(node, "tied_to", None):
                continue
            bits = node.plan.get("weight_bits", node.plan.get("ring", 64))
            name = f"{node.name}.{key}"
            record = Weight(name, node.parameter_shapes[key], bits, node.plan["weight_frac"], bool(node.plan.get("small")))
            found[name] = (record, node, key)
    return found
