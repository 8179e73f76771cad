"""What the parties run on a graph: a pass over new positions, the choice of a token, a module's output; and its cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.graph.batch import Batch
from privinf.graph.info import InputSpec
from privinf.graph.planning import FRAC, LOGIT_FRAC, SHOWN_FRAC
from privinf.graph.private import PrivinfTensor, Runtime, weights_of
from privinf.lowering.setup import packed_bytes
from protocols.correlations import Role
from protocols.errors import ConfigError
from protocols.maximum import place_of, row_argmax
from protocols.opening import open_masked, private_input, reveal
from protocols.party import Party, Protocol_, Trace
from protocols.ring import blank, decode, encode
from protocols.rows import Rows
from protocols.shares import Shares
from protocols.truncation import rescale

Label = tuple[str, str]  # layer and operator


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


def next_token(
    graph: Graph, runtime: Runtime, ids: Tensor, *, logits: bool, output: bool = True, every: bool = False, observe: Any = None
) -> Tensor | None:
    """One pass over new positions, ids (1, n); at C the next token's id (1,), or with `logits` the rounded logits (1, V).

    Elsewhere `ids` is a meta tensor of the same shape, and the result None. The state grows by n positions. Without `output`
    that is all: nothing is revealed, and what only the output needs is not computed. With `every` there are rounded logits of every
    new position, (n, V).
    """
    runtime.every = ids.shape[1] if every and output else 0
    return _tokens(graph, runtime, ids, logits, output, observe)


def next_tokens(
    graph: Graph,
    runtime: Runtime,
    ids: Tensor,
    new: Sequence[tuple[int, int]],
    *,
    ended: Collection[int] = (),
    logits: bool = False,
    output: bool = True,
    every: bool = False,
    observe: Any = None,
) -> Tensor | None:
    """One pass over new positions of several sequences: `new` are their numbers and how many of the ids (1, n), in order, are each one's.

    At C the next token's id of each (B,), or with `logits` the rounded logits (B, V). A number that is not cached yet begins a sequence,
    and those in `ended` are forgotten. With `every` there are rounded logits of every new position, (n, V). The rounds are one
    sequence's, the bytes the sum. ConfigError where an operator is for one alone.
    """
    if (node := unbatched(graph)) is not None:
        raise ConfigError("this operator takes one sequence at a time", layer=node.name, remedy="ask for one after the other")
    runtime.batch = (runtime.batch or Batch()).step(new, ended, runtime.fills)
    assert runtime.batch.rows == ids.shape[1], "ids for every new position"
    runtime.every = ids.shape[1] if every and output else 0
    return _tokens(graph, runtime, ids, logits, output, observe)


def unbatched(graph: Graph) -> Any:
    """A node that cannot take several sequences, or None."""
    return next((node for node in graph.nodes if not (node.batches or node.rowwise)), None)


def _tokens(graph: Graph, runtime: Runtime, ids: Tensor, logits: bool, output: bool, observe: Any) -> Tensor | None:
    """See `next_token`."""
    only, runtime.unread = (None, frozenset[str]()) if output else _filling(graph)
    found = graph(PrivinfTensor(runtime, ids=_moved(runtime, ids)), observe=observe, only=only)
    if not output:
        runtime.offset += ids.shape[1]
        return None
    out, party = found.shares, runtime.party

    def choose() -> Protocol_[Tensor | None]:
        rounded = yield from _reduced(party, out, SHOWN_FRAC if logits else LOGIT_FRAC)
        if logits:
            value = yield from reveal(party, rounded, to=Role.CLIENT)
            return None if value is None or value.is_meta else decode(value, rounded.bits, rounded.frac)
        number, size = out.shape  # of sequences, and the vocabulary's
        rows = Rows(size, 1, 0).times(number)
        (wire,) = yield from open_masked(party, [rounded.map(lambda x: x.reshape(1, -1))])
        place = yield from row_argmax(party, wire, rows)
        found = yield from reveal(party, place, to=Role.CLIENT)
        return found if found is None or found.is_meta else place_of(found, rows)

    with party.label("", "reveal" if logits else "argmax"):
        result = party.run(choose())
    runtime.offset += ids.shape[1]
    return None if result is None else _back(result.reshape(-1, out.shape[-1]) if logits else result.reshape(-1))


def _reduced(party: Party, x: Shares, frac: int) -> Protocol_[Shares]:
    """With at most so many fraction bits, in a ring that is narrower by as many as are dropped: local."""
    frac = min(frac, x.frac)
    return (yield from rescale(party, x, bits=x.bits - (x.frac - frac), frac=frac))


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
        rounded = yield from _reduced(party, out, SHOWN_FRAC)
        shown = yield from reveal(party, rounded, to=Role.CLIENT)
        return None if shown is None or shown.is_meta else _back(decode(shown, rounded.bits, rounded.frac).float())

    with party.label("", "reveal"):
        return party.run(finish())


def shape_of(spec: InputSpec) -> Tensor:
    """An input of a lowered module, without values."""
    return torch.empty([size or 1 for size in spec.shape], dtype=torch.int64 if spec.kind == "ids" else torch.float32, device="meta")


def setup_bytes(graph: Graph, without: Collection[str] = ()) -> dict[Label, int]:
    """Bytes of the masked weights, each sent once and some not, by the layer and operator that they are of."""
    found: dict[Label, int] = {}
    for name, (weight, node, _) in weights_of(graph).items():
        found[node.label] = found.get(node.label, 0) + (0 if name in without else packed_bytes(weight))
    return found


def costs(trace: Trace, setup: Mapping[Label, int], offline_rounds: Mapping[Label, int] | None = None) -> dict[str, Any]:
    """A trace's costs as the contract's `total` and `ops`.

    With `offline_rounds`, where the two parties are alone, `offline_bytes` are what they exchange before the query, and these its rounds.
    """
    ops: list[dict[str, Any]] = []
    for label, cost in trace.costs.items():
        found = {"online_bytes": cost.online_bytes, "rounds": cost.rounds, "dealer_bytes": cost.dealer_bytes}
        found |= {"peer_offline_bytes": cost.peer_offline_bytes, "setup_bytes": setup.get(label, 0), "macs": cost.macs}
        if offline_rounds is not None:
            found |= {"offline_bytes": cost.peer_offline_bytes, "offline_rounds": offline_rounds.get(label, 0)}
        ops.append({"layer": label[0], "op": label[1], **found})
    fields = [name for name in ops[0] if name not in ("layer", "op")]
    return {"total": {name: sum(op[name] for op in ops) for name in fields}, "ops": ops}
