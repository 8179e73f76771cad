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

FRAC = 14  # of activations between nodes
MATRIX_FRAC = 14  # of matrices and diagonals
QK_FRAC = 12
QK_BITS = SCORE_BITS + 2 * QK_FRAC - SCORE_FRAC  # scores within 128 fit, and their truncation is a reduction
V_FRAC = 12
SUM_FRAC = 12
LOGIT_FRAC = 8  # what is compared, and what a client may be given
# what a linear map reads may be rounded to fewer fraction bits first, for nothing, so that its weight needs a narrower ring
QKV_INPUT_FRAC = 13
HEAD_INPUT_FRAC = 12
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
            plan = {"ring": _bits(name, FRAC, float(node.value("weight").abs().max())), "weight_frac": FRAC}
        elif node.op == "linear":
            plan = {"ring": _bits(name, FRAC + MATRIX_FRAC, bound), "weight_frac": MATRIX_FRAC}
            readers = _readers(graph, name)
            if name in graph.output_names and info.input_kind == "ids":
                # the head: what is compared is a reduction of the product
                out_bits = _bits(name, LOGIT_FRAC, bound)
                plan |= {"ring": out_bits + HEAD_INPUT_FRAC + MATRIX_FRAC - LOGIT_FRAC, "in_frac": HEAD_INPUT_FRAC}
                plan |= {"out_frac": LOGIT_FRAC, "out_bits": out_bits}
            elif readers and all(r.op == "attention" for r in readers):
                plan = _qkv(graph, name, readers[0], ranges, info)
            elif readers and all(r.op in _COMPARED for r in readers):
                # straight into the ring that is opened, by a reduction
                opened = max(PRODUCT_BITS if r.op == "gelu" else _compare_bits(name, bound) for r in readers)
                plan |= {"ring": max(plan["ring"], up(opened + MATRIX_FRAC)), "out_frac": FRAC, "out_bits": opened}
        elif node.op == "attention":
            plan = _attention(name, ranges[name], info, plans.get(inputs[0], {}))
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
            plan = {"ring": _bits(name, 2 * FRAC, bound)}
            if node.op == "scale":
                plan["weight_frac"] = MATRIX_FRAC
        if "weight_frac" in plan and node.op in ("embedding", "linear") and _is_small(node, plan["weight_frac"]):
            plan["small"] = 1
        plans[name] = plan
    widest = max((max(_input_bits(p), *(p.get(key, 0) for key in ("input_bits", "out_bits", "opened"))) for p in plans.values()), default=0)
    canonical = max(up(widest), *(_bits(name, FRAC, float(ranges[name]["out"])) for name in plans))
    for name, plan in plans.items():
        plan["bits"], plan["frac"] = canonical, FRAC
        if graph.node(name).op in ("attention", *_COMPARED):
            # straight into the ring of the linear maps that read it
            readers = _readers(graph, name)
            linear = readers and all(reader.op == "linear" for reader in readers)
            plan["out_bits"] = max(_input_bits(plans[reader.name]) for reader in readers) if linear else canonical
    _tie(graph, plans)
    return plans


def _is_small(node: Any, frac: int) -> bool:
    """Whether an encoded weight is one limb (`protocols.matrix`): at 14 fraction bits below 128, as every weight should be."""
    return float(node.value("weight").abs().max()) * 2.0**frac < (1 << (WIDEST - 1)) - 1


def _input_bits(plan: Mapping[str, Any]) -> int:
    """The ring that a node's input needs before it is rounded to the fraction bits that the node reads."""
    return int(plan.get("ring", 0)) + FRAC - int(plan.get("in_frac", FRAC))


def _readers(graph: Graph, name: str) -> list[Any]:
    """The nodes that read a value, through those that only take its last position."""
    found = []
    for reader in graph.consumers(name):
        found += _readers(graph, reader) if graph.node(reader).op == "last_position" else [graph.node(reader)]
    return found


def _compare_bits(name: str, bound: float, most: int = MAX_BITS) -> int:
    # GELU compares with its edges too, whatever the range
    bits = _bits(name, FRAC, max(bound, EDGE))
    if bits > most:
        raise RangeError(f"values up to {bound:g} are too large to be compared in {most} bits", layer=name)
    return bits


def _v_bits(bound: float, info: Any) -> float:
    """Bits of the weighted sums of v."""
    return WEIGHT_FRAC + V_FRAC + math.log2(max(1.0, bound * LARGEST * max(info.n_positions, 1))) + 2


def _qkv(graph: Graph, name: str, reader: Any, ranges: Mapping[str, Mapping[str, float]], info: Any) -> dict[str, Any]:
    """A linear map whose output is opened for attention: its ring is wide enough for every later truncation to be a reduction."""
    tempered = MATRIX_FRAC if "inverse_temperature" in reader.parameter_shapes else 0
    v_bits = _v_bits(float(ranges[reader.name]["v"]), info)
    for in_frac in (QKV_INPUT_FRAC, FRAC):
        frac = in_frac + MATRIX_FRAC
        ring = up(max(QK_BITS + frac + tempered - QK_FRAC, v_bits + frac - V_FRAC))
        if ring + FRAC - in_frac <= 64:
            return {"ring": ring, "weight_frac": MATRIX_FRAC, "in_frac": in_frac, "raw": 1}
    raise RangeError(f"values of v up to {ranges[reader.name]['v']:g} do not fit a ring of 64 bits", layer=reader.name)


def _attention(name: str, found: Mapping[str, float], info: Any, qkv: Mapping[str, Any]) -> dict[str, Any]:
    if found["score_seen"] > LARGEST_SCORE:
        raise RangeError(
            f"attention scores reach {found['score_seen']:g}; the plan allows for {LARGEST_SCORE:g}",
            layer=name,
            remedy="train with a penalty on large scores, or calibrate on inputs closer to those in use",
        )
    bound = float(found["v"])
    v_bits = up(_v_bits(bound, info))
    if qkv.get("raw"):
        # what a reduction leaves of the map's ring holds the sums, and is often narrower than the next multiple of 4
        v_bits = min(v_bits, qkv["ring"] - (qkv["in_frac"] + qkv["weight_frac"] - V_FRAC))
    if v_bits > 64:
        raise RangeError(f"values of v up to {bound:g} do not fit a ring of 64 bits", layer=name)
    return {
        "qk_bits": QK_BITS,
        "qk_frac": QK_FRAC,
        "v_bits": v_bits,
        "v_frac": V_FRAC,
        "sum_frac": SUM_FRAC,
        "product_bits": _bits(name, SUM_FRAC + RECIPROCAL_FRAC, bound),
        "weight_frac": MATRIX_FRAC,
        "out_frac": FRAC,
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
