"""The cost of a prompt and one output token, predicted by walking the client's program on shapes; and the ring plan, wire by wire."""

from __future__ import annotations

from typing import Any

from privinf.graph.private import Runtime
from privinf.lowering.lowered import Lowered
from privinf.lowering.program import Label, costs, module_output, next_token, next_tokens, setup_bytes, shape_of
from privinf.lowering.steps import steps
from privinf.trust import DEALER, ENCRYPTED, ONE_HOT, TWO_PARTY
from protocols.correlations import Role
from protocols.errors import ConfigError
from protocols.party import Cost, Party, Tables, Trace
from protocols.ring import blank


def explain(
    lowered: Lowered,
    seq: int = 1,
    *,
    logits: bool = False,
    scores: bool = False,
    new_tokens: int = 1,
    chunk: int = 0,
    cached: int = 0,
    trust: str = DEALER,
    embedding: str | None = None,
    batch: int = 1,
    stock: int = 0,
) -> dict[str, Any]:
    """{`total`, `ops`, `plan`, `wires`, `trust`}: bytes are payload.

    `online_bytes` and `rounds` are as the client counts them, `dealer_bytes` is all that D sends. `seq` is the number of prompt tokens (a
    lowered module has the one shape that it was lowered for), and `new_tokens` how many follow, each but the last a pass of its own. The
    prompt goes through passes of at most `chunk` positions (0: one), after `cached` positions that both parties hold already. With a
    `batch` all of it is of so many sequences, which go through each pass together. With `scores` there are rounded logits of
    every position of the prompt. ConfigError if all that does not fit the context.

    Where the two are alone (`trust="two-party"`), `offline_bytes` and `offline_rounds` are what they exchange before the passes, as the
    client counts them; most of it is of no operator, and `kinds` says what of: {`kind`, `count`, `offline_bytes`, `transfers`} each, and of
    what makes transfers. `setup_bytes` are those of a client that has kept nothing. `embedding="encrypted"`: with a dealer too, rows of
    the table are taken from ciphertexts, which set-up brings beside the masked weights.

    `stock`: the passes take their rows from a stock for so many positions, as far as it goes, and making it is not in `total`. What that
    takes stands under `stock`: {`rows`, `maps`, `offline_bytes`, `offline_rounds`, `used`, `used_bytes`}, the last two the positions that
    these passes take of it and their part of its bytes.
    """
    info, trace = lowered.info, Trace(Role.CLIENT)
    _check(trust, embedding, stock)
    runtime = Runtime.of(lowered.graph, Party(Role.CLIENT, trace), fills=0 if trust == TWO_PARTY else info.n_positions)
    alone = _Alone(lowered, trace, stock) if trust == TWO_PARTY else None
    sealed = alone is None and embedding == ENCRYPTED
    runtime.party.tables = alone.tables if alone else _tables() if sealed else None
    if info.is_language_model:
        if not 1 <= seq <= cached + seq + new_tokens - 1 <= info.n_positions:
            told = f"{cached} cached positions and a prompt of {seq} tokens do" if cached else f"a prompt of {seq} tokens does"
            raise ConfigError(f"{told} not fit the model's context of {info.n_positions}")
        if cached:
            _pass(lowered, runtime, cached, batch, logits=logits)
            trace.costs.clear()
            if alone:
                alone.cached()
        for count, output in steps(seq, new_tokens, chunk):
            _pass(lowered, runtime, count, batch, logits=scores or (logits and output), output=output or scores, every=scores)
            if alone:
                alone.passed()
    elif chunk or cached or batch > 1:
        raise ConfigError("this model is no language model; it has no prompt in pieces, nothing cached and no batches")
    else:
        module_output(lowered.graph, runtime, [shape_of(spec) for spec in info.inputs])
        if alone:
            alone.passed()
    plan = [{"name": node.name, "op": node.op, **node.plan.record()} for node in lowered.graph.nodes]
    found = costs(trace, _setup(lowered, sealed)) if alone is None else alone.costs()
    return {**found, "plan": plan, "wires": wires(lowered), "trust": trust}


def _check(trust: str, embedding: str | None, stock: int) -> None:
    if stock and trust != TWO_PARTY:
        raise ConfigError("a stock of rows is for two parties alone", remedy="give --trust two-party, or leave the stock out")
    if trust == TWO_PARTY and embedding == ONE_HOT:
        raise ConfigError("two parties alone have an encrypted embedding", remedy="leave the embedding out")


def _pass(lowered: Lowered, runtime: Runtime, count: int, batch: int, *, logits: bool, output: bool = True, every: bool = False) -> None:
    """So many new positions of each sequence."""
    if batch == 1:
        next_token(lowered.graph, runtime, blank(1, count), logits=logits, output=output, every=every)
    else:
        new = [(number, count) for number in range(batch)]
        next_tokens(lowered.graph, runtime, blank(1, batch * count), new, logits=logits, output=output, every=every)


def _tables() -> Tables:
    from privinf.lowering.joint import tables_alone  # not where nothing of it is asked for: it loads kernels

    return tables_alone(Role.CLIENT, {}, traced=True)


def _setup(lowered: Lowered, sealed: bool) -> dict[Label, int]:
    """Bytes of the masked weights, and of the encrypted tables."""
    if not sealed:
        return setup_bytes(lowered.graph)
    from privinf.lowering.encrypted import Sealing

    found = setup_bytes(lowered.graph, Sealing.needless(lowered))
    for part in Sealing.tables(lowered).parts.values():
        found[part.label] += part.size
    return found


class _Alone:
    """What is added to a trace, pass by pass, where server and client make the correlations themselves."""

    def __init__(self, lowered: Lowered, trace: Trace, stock: int) -> None:
        from privinf.lowering.joint import Forecast  # not where nothing of it is asked for: it loads kernels
        from privinf.lowering.stocking import Supply

        self._lowered, self._trace, self._forecast = lowered, trace, Forecast(by_kind=True)
        self._stock = Supply(lowered, stock) if stock else None
        self.tables = self._forecast.tables
        self._kinds = self._early = 0  # those of the passes so far

    def passed(self) -> None:
        """One more pass is in the trace."""
        trace = self._trace
        kinds = trace.kinds[self._kinds :]
        self._forecast.make(kinds, trace.early[self._early :], self._stock.take(kinds) if self._stock else ())
        self._kinds, self._early = len(trace.kinds), len(trace.early)

    def cached(self) -> None:
        """The pass in the trace has been before, and what it cost does not count."""
        stock, self._stock = self._stock, None
        self.passed()
        self._stock = stock
        self._forecast.forget()

    def costs(self) -> dict[str, Any]:
        """The contract's `total` and `ops`, and what a stock takes."""
        from privinf.lowering.encrypted import Sealing
        from privinf.lowering.joint import BEGIN, PREPROCESS

        setup: dict[tuple[str, str], int] = {}
        for part in Sealing.of(self._lowered).parts.values():
            setup[part.label] = setup.get(part.label, 0) + part.size
        begun, made, early = self._forecast.begun, self._forecast.made, 0
        for cost in self._trace.costs.values():
            cost.dealer_bytes, early = 0, early + cost.peer_offline_bytes
        for label, cost in ((BEGIN, Cost()), (PREPROCESS, Cost(peer_offline_bytes=made.online_bytes - early))):
            self._trace.costs[label] = cost
        setup[BEGIN] = begun.online_bytes
        found = {**costs(self._trace, setup, {PREPROCESS: made.rounds}), "kinds": self._forecast.kinds}
        return {**found, "stock": self._stock.record()} if self._stock else found


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
