"""The cost of a prompt and one output token, predicted by walking the client's program on shapes; and the ring plan, wire by wire."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from privinf.graph.info import InputSpec
from privinf.graph.private import Runtime
from privinf.lowering.lowered import Lowered
from privinf.lowering.program import costs, module_output, next_token, setup_bytes
from privinf.lowering.steps import steps
from protocols.correlations import Role
from protocols.errors import ConfigError
from protocols.party import Party, Trace
from protocols.ring import blank


def explain(
    lowered: Lowered, seq: int = 1, *, logits: bool = False, new_tokens: int = 1, chunk: int = 0, cached: int = 0
) -> dict[str, Any]:
    """{`total`, `ops`, `plan`, `wires`}: bytes are payload.

    `online_bytes` and `rounds` are as the client counts them, `dealer_bytes` is all that D sends.
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
        module_output(lowered.graph, runtime, [shape_of(spec) for spec in info.inputs])
    plan = [{"name": node.name, "op": node.op, **node.plan.record()} for node in lowered.graph.nodes]
    return {**costs(trace, setup_bytes(runtime)), "plan": plan, "wires": wires(lowered)}


def shape_of(spec: InputSpec) -> Tensor:
    """An input of a lowered module, without values."""
    return torch.empty([size or 1 for size in spec.shape], dtype=torch.int64 if spec.kind == "ids" else torch.float32, device="meta")


def wires(lowered: Lowered) -> list[dict[str, Any]]:
    """Every encoded weight and every wire, in the graph's order: {`layer`, `op`, `wire`, `bits`, `frac`, `range`, `from`}.

    `range` is the largest size that the plan provides for, and `from` what it follows from: the weights, the calibration with its
    headroom, or the protocol, which takes this much whatever the model. In a client's graph, which has neither weights nor ranges,
    both are None.
    """
    calibration = f"calibration x {lowered.headroom:g}"
    found = []
    for name, node, inputs in lowered.graph.named_nodes():
        source = lowered.ranges.get(inputs[0], {}).get("out")
        layer, op = node.label
        for wire, bits, frac, bound, origin in node.wires(lowered.ranges.get(name, {}), source):
            entry = {"layer": layer, "op": op, "wire": wire, "bits": bits, "frac": frac, "range": bound}
            found.append({**entry, "from": None if bound is None else origin or calibration})
    return found
