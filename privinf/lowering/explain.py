"""The cost of a prompt and one output token, predicted by walking the client's program on shapes."""

from __future__ import annotations

from typing import Any

from privinf.lowering.lowered import Lowered
from privinf.lowering.private_tensor import Runtime
from privinf.lowering.program import costs, module_output, next_token, setup_bytes
from protocols.correlations import Role
from protocols.errors import ConfigError
from protocols.party import Party, Trace
from protocols.ring import blank


def explain(lowered: Lowered, seq: int = 1, *, logits: bool = False, new_tokens: int = 1) -> dict[str, Any]:
    """{`total`, `ops`, `plan`}: bytes are payload; `online_bytes` and `rounds` as the client counts them, `dealer_bytes` all that D sends.

    `seq` is the number of prompt tokens (a lowered module has the one shape that it was lowered for), and `new_tokens` how many
    follow, each but the last one a pass of its own. ConfigError if they do not fit the context.
    """
    info, trace = lowered.info, Trace(Role.CLIENT)
    runtime = Runtime.of(lowered.graph, Party(Role.CLIENT, trace))
    if info.is_language_model:
        if not 1 <= seq <= seq + new_tokens - 1 <= info.n_positions:
            raise ConfigError(f"a prompt of {seq} tokens does not fit the model's context of {info.n_positions}")
        for count in (seq, *[1] * (new_tokens - 1)):
            next_token(lowered.graph, runtime, blank(1, count), logits=logits)
    else:
        module_output(lowered.graph, runtime, [blank(*(size or 1 for size in spec.shape)) for spec in info.inputs])
    plan = [{"name": node.name, "op": node.op, **node.plan} for node in lowered.graph.nodes]
    return {**costs(trace, setup_bytes(runtime)), "plan": plan}
