"""What the parties run on a graph: a pass over new positions, the choice of a token, a module's output; and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.graph.planning import FRAC, LOGIT_FRAC
from privinf.graph.private import PrivinfTensor, Runtime
from privinf.lowering.setup import packed_bytes
from protocols.correlations import Role
from protocols.maximum import row_argmax
from protocols.opening import open_masked, private_input, reveal
from protocols.party import Protocol_, Trace
from protocols.ring import blank, decode, encode
from protocols.rows import Rows
from protocols.shares import Shares
from protocols.truncation import rescale

OUTPUT_FRAC = 10  # of a lowered module's revealed output


def _moved(runtime: Runtime, x: Tensor) -> Tensor:
    """An input where the party computes; what is not known yet stays a shape."""
    return x if x.is_meta else x.to(runtime.device)


def _back(x: Tensor) -> Tensor:
    """A revealed output where its reader expects it."""
    return x if x.is_meta else x.cpu()


def _filling(graph: Graph) -> tuple[set[str], frozenset[str]]:
    """The nodes that bring the state up to date, and of them those with state whose result none of these reads."""
    run: set[str] = set()
    read: set[str] = set()
    for name, node, inputs in reversed(list(graph.named_nodes())):
        if name in read or node.state:
            run.add(name)
            read.update(inputs)
    return run, frozenset(name for name in run - read)


def next_token(graph: Graph, runtime: Runtime, ids: Tensor, *, logits: bool, output: bool = True, observe: Any = None) -> Tensor | None:
    """One pass over new positions, ids (1, n); at C the next token's id (1,), or with `logits` the rounded logits (1, V).

    Elsewhere `ids` is a meta tensor of the same shape, and the result None. The state grows by n positions. Without `output`
    that is all: nothing is revealed, and what only the output needs is not computed.
    """
    only, runtime.unread = (None, frozenset[str]()) if output else _filling(graph)
    found = graph(PrivinfTensor(runtime, ids=_moved(runtime, ids)), observe=observe, only=only)
    if not output:
        runtime.offset += ids.shape[1]
        return None
    out, party = found.shares, runtime.party

    def choose() -> Protocol_[Tensor | None]:
        if logits:
            value = yield from reveal(party, out, to=Role.CLIENT)
            return None if value is None or value.is_meta else decode(value, out.bits, LOGIT_FRAC)
        size = out.shape[-1]
        bits = max(1, (size - 1).bit_length())
        (wire,) = yield from open_masked(party, [out])
        place = yield from row_argmax(party, wire, Rows(size, 1, 0), bits)
        return (yield from reveal(party, place.narrow(bits), to=Role.CLIENT))

    with party.label("", "reveal" if logits else "argmax"):
        result = party.run(choose())
    runtime.offset += ids.shape[1]
    return None if result is None else _back(result.reshape(1, -1) if logits else result.reshape(1))


def module_output(graph: Graph, runtime: Runtime, inputs: Sequence[Tensor], *, observe: Any = None) -> Tensor | None:
    """A lowered module on C's real inputs; at C its output, rounded to 2^-10; None at S, where the inputs are meta tensors."""
    party, bits = runtime.party, max(node.plan.bits for node in graph.nodes)

    def private(x: Tensor) -> PrivinfTensor:
        x = _moved(runtime, x)
        if not x.is_floating_point():  # ids of an embedding, which only the client knows
            return PrivinfTensor(runtime, ids=x)
        value = blank(*x.shape) if x.is_meta else encode(x, FRAC)
        return PrivinfTensor(runtime, private_input(value, bits, FRAC, own=not party.is_server))

    out = graph(*(private(x) for x in inputs), observe=observe).shares

    def finish() -> Protocol_[Tensor | None]:
        frac = min(OUTPUT_FRAC, out.frac)  # a vocabulary's head has fewer already
        rounded: Shares = yield from rescale(party, out, bits=out.bits - (out.frac - frac), frac=frac)
        shown = yield from reveal(party, rounded, to=Role.CLIENT)
        return None if shown is None or shown.is_meta else _back(decode(shown, rounded.bits, frac).float())

    with party.label("", "reveal"):
        return party.run(finish())


def setup_bytes(runtime: Runtime) -> dict[str, int]:
    """Bytes of each masked weight, sent once."""
    return {name: packed_bytes(w) for name, w in runtime.weights.items()}


def costs(trace: Trace, setup: dict[str, int] | None = None) -> dict[str, Any]:
    """A trace's costs as the contract's `total` and `ops`."""
    fields = ("online_bytes", "rounds", "dealer_bytes", "peer_offline_bytes", "setup_bytes", "macs")
    ops: list[dict[str, Any]] = []
    for (layer, op), cost in trace.costs.items():
        prefix = f"{layer}.{op}." if layer else f"{op}."
        own = sum(size for name, size in (setup or {}).items() if name.startswith(prefix))
        values = (cost.online_bytes, cost.rounds, cost.dealer_bytes, cost.peer_offline_bytes, own, cost.macs)
        ops.append({"layer": layer, "op": op, **dict(zip(fields, values, strict=True))})
    return {"total": {name: sum(op[name] for op in ops) for name in fields}, "ops": ops}
