"""The cost of a prompt and one output token, predicted by walking the client's program on shapes; and the ring plan, wire by wire."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from privinf.lowering.calibrate import power_of_two
from privinf.lowering.lowered import Lowered
from privinf.lowering.plan import COMPARED_FRAC, FRAC
from privinf.lowering.private_tensor import Runtime, label_of
from privinf.lowering.program import costs, module_output, next_token, setup_bytes
from privinf.lowering.steps import steps
from protocols.correlations import Role
from protocols.errors import ConfigError
from protocols.exponential import FRAC as SCORE_FRAC
from protocols.norm import centred
from protocols.party import Party, Trace
from protocols.ring import blank
from protocols.softmax import RECIPROCAL_FRAC, SCORE_BITS


def explain(
    lowered: Lowered, seq: int = 1, *, logits: bool = False, new_tokens: int = 1, chunk: int = 0, cached: int = 0
) -> dict[str, Any]:
    """{`total`, `ops`, `plan`, `wires`}: bytes are payload; `online_bytes` and `rounds` as the client counts them, `dealer_bytes` all that
    D sends.

    `seq` is the number of prompt tokens (a lowered module has the one shape that it was lowered for), and `new_tokens` how many
    follow, each but the last one a pass of its own. The prompt goes through passes of at most `chunk` positions (0: one), after
    `cached` positions that both parties hold already. ConfigError if all that does not fit the context.
    """
    info, trace = lowered.info, Trace(Role.CLIENT)
    runtime = Runtime.of(lowered.graph, Party(Role.CLIENT, trace))
    if info.is_language_model:
        if not 1 <= seq <= cached + seq + new_tokens - 1 <= info.n_positions:
            told = f"{cached} cached positions and a prompt of {seq} tokens do" if cached else f"a prompt of {seq} tokens does"
            raise ConfigError(f"{told} not fit the model's context of {info.n_positions}")
        if cached:
            next_token(lowered.graph, runtime, blank(1, cached), logits=logits)
            trace.costs.clear()
        for count, output in steps(seq, new_tokens, chunk):
            next_token(lowered.graph, runtime, blank(1, count), logits=logits and output, output=output)
    elif chunk or cached:
        raise ConfigError("this model is no language model; it has no prompt in pieces, and nothing cached")
    else:
        kinds = {"ids": torch.int64, "float": torch.float32}
        shaped = [torch.empty([size or 1 for size in spec.shape], dtype=kinds[spec.kind], device="meta") for spec in info.inputs]
        module_output(lowered.graph, runtime, shaped)
    plan = [{"name": node.name, "op": node.op, **node.plan} for node in lowered.graph.nodes]
    return {**costs(trace, setup_bytes(runtime)), "plan": plan, "wires": wires(lowered)}


def wires(lowered: Lowered) -> list[dict[str, Any]]:
    """Every encoded weight and every wire, in the graph's order: {`layer`, `op`, `wire`, `bits`, `frac`, `range`, `from`}.

    `range` is the largest size that the plan provides for, and `from` what it follows from: the weights, the calibration with its
    headroom, or the protocol, which takes this much whatever the model. In a client's graph, which has neither weights nor ranges,
    both are None.
    """
    seen = f"calibration x {lowered.headroom:g}"
    found = []
    for name, node, inputs in lowered.graph.named_nodes():
        own, source = lowered.ranges.get(name, {}), lowered.ranges.get(inputs[0], {}).get("out")
        layer, op = label_of(node)
        for wire, bits, frac, bound, origin in _wires(node, own, source, seen):
            entry = {"layer": layer, "op": op, "wire": wire, "bits": bits, "frac": frac, "range": bound}
            found.append({**entry, "from": None if bound is None else origin})
    return found


def _wires(node: Any, own: Mapping[str, float], source: float | None, seen: str) -> Iterator[tuple[str, int, int, float | None, str]]:
    """`own` are the node's ranges and `source` is the range of what it reads."""
    plan, out = node.plan, own.get("out")
    if "weight_frac" in plan and not getattr(node, "tied_to", None):
        for key in ("weight", "inverse_temperature"):
            if key in node.parameter_shapes:
                largest = power_of_two(float(node.value(key).abs().max())) if node.has_values else None
                yield key, plan.get("weight_bits", plan.get("ring", 64)), plan["weight_frac"], largest, "weights"
                out, seen = (largest, "weights") if node.op == "embedding" else (out, seen)
    if node.op == "attention":
        for part, ring in (("q", "qk"), ("k", "qk"), ("v", "v")):
            yield part, plan[f"{ring}_bits"], plan[f"{part}_frac"], own.get(part), seen
        yield "scores", SCORE_BITS, SCORE_FRAC, 2.0 ** (SCORE_BITS - 2 - SCORE_FRAC), "protocol"
        yield "sums of v", plan["product_bits"], plan["sum_frac"] + RECIPROCAL_FRAC, own.get("v"), seen
    elif node.op == "layer_norm":
        bits, frac = centred(plan["size_bits"])
        yield "squares", bits, 2 * frac, own.get("squares"), seen
    elif node.op in ("relu", "gelu"):
        yield "opened", plan["opened"], COMPARED_FRAC, source, seen
        yield "compared", plan["compare_bits"], COMPARED_FRAC, source, seen
    elif "ring" in plan and node.op != "embedding":
        yield "product", plan["ring"], plan.get("in_frac", FRAC) + plan.get("weight_frac", FRAC), out, seen
    if not plan.get("raw"):
        yield "output", plan.get("out_bits", plan["bits"]), plan.get("out_frac", plan["frac"]), out, seen
