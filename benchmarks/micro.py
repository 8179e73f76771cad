"""Single protocols: programs over three roles in one process, through the in-memory twin of the transport.

Bytes and rounds are the twin's meter (payload); both parties, and the dealer if there is one, share this process, so that seconds are
comparable between commits, not with other systems. Without a dealer the two make what he would deal, by real transfers and ciphertexts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.networks import Network
from privinf.trust import DEALER, TWO_PARTY
from protocols import reference
from protocols.activation import gelu, relu
from protocols.comparison import CompareMask, compare
from protocols.lattice.lattice import Lattice
from protocols.linear import Weight, linear, lookup
from protocols.maximum import row_argmax, row_maximum
from protocols.norm import layer_norm
from protocols.opening import open_masked
from protocols.ot.transfers import Transfers
from protocols.party import Party, Protocol_
from protocols.ring import encode
from protocols.rows import Rows
from protocols.shares import Shares
from protocols.softmax import WEIGHT_FRAC, bounded_exponentials, exponentials, softmax
from protocols.truncation import rescale
from tests.support.alone import Alone, sealed
from tests.support.two_party import Dealt, Session, Source, Weights, input_of, offline_walk

Held = dict[str, tuple[Weight, Tensor]]


@dataclass
class Case:
    """One protocol on `elements` elements. `program` gives shares; `exact` what they should be, reals."""

    name: str
    elements: int
    program: Callable[[Party], Protocol_[Any]]
    exact: Callable[[], Tensor] | None = None
    weights: Held = field(default_factory=dict)


@dataclass
class Figures:
    """Of one case, per element where it says so; bytes are both directions."""

    online_bytes: float
    dealer_bytes: float
    offline_bytes: float
    rounds: int
    offline_rounds: int
    error: float | None
    seconds: list[float]
    offline_seconds: list[float]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Test values, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * scale


def _linear() -> Case:
    x, w = normal(128, 256), normal(256, 256, scale=1 / 16)
    weight = Weight("w", (256, 256), 40, 14)

    def program(party: Party) -> Protocol_[Any]:
        return (yield from linear(party, input_of(party, x, 40, 14), weight, bits=40))

    return Case("linear 128 x 256 x 256, per input", x.numel(), program, lambda: x @ w, {"w": (weight, encode(w, 14))})


def _lookup() -> Case:
    table = normal(3072, 256)
    weight, ids = Weight("t", (3072, 256), 24, 14), torch.arange(128) * 7 % 3072

    def program(party: Party) -> Protocol_[Any]:
        known = None if party.is_server or offline_walk(party) else ids
        return (yield from lookup(party, known, 128, weight, bits=24))

    return Case("look-up of 128 rows of 3072 x 256, per row", 128, program, lambda: table[ids], {"t": (weight, encode(table, 14))})


def _truncation(name: str, to_bits: int) -> Case:
    x = normal(65536)

    def program(party: Party) -> Protocol_[Any]:
        return (yield from rescale(party, input_of(party, x, 44, 28), bits=to_bits, frac=14))

    return Case(name, x.numel(), program, lambda: x)


def _comparison() -> Case:
    x = normal(16384, scale=8.0)

    def program(party: Party) -> Protocol_[Any]:
        (wire,) = yield from open_masked(party, [input_of(party, x, 21, 12)])
        shape = tuple(x.shape)
        yield from compare(party, wire.masked, CompareMask(wire.name, shape, shape, 21))

    return Case("comparison, 21 bits, opening included", x.numel(), program)


def _maximum() -> Case:
    rows = Rows(1, 128, 1)

    def program(party: Party) -> Protocol_[Any]:
        (wire,) = yield from open_masked(party, [input_of(party, normal(4, rows.count, scale=8.0), 10, 1)])
        yield from row_maximum(party, wire, rows)

    return Case("maximum of causal rows, 10 bits, opening included", 4 * rows.count, program)


def _argmax() -> Case:
    x, rows = normal(1, 3072, scale=4.0), Rows(3072, 1, 0)

    def program(party: Party) -> Protocol_[Any]:
        (wire,) = yield from open_masked(party, [input_of(party, x, 24, 8)])
        return (yield from row_argmax(party, wire, rows))

    return Case("argmax of 3072, opening included", 3072, program)


def _exponential() -> Case:
    rows = Rows(1, 128, 1)
    x = normal(4, rows.count, scale=2.0)

    def program(party: Party) -> Protocol_[Any]:
        return (yield from exponentials(party, input_of(party, x, 21, 12), rows, 44))

    return Case("exponentials of causal rows (4, 128, 128)", x.numel(), program)


def _softmax(scale: float) -> Case:
    rows = Rows(1, 128, 1)
    x = normal(4, rows.count, scale=scale)

    def program(party: Party) -> Protocol_[Any]:
        return (yield from softmax(party, input_of(party, x, 33, 24), rows, bits=32, frac=14))

    return Case(f"softmax, causal (4, 128, 128), scores of deviation {scale:g}", x.numel(), program, lambda: reference.softmax(x, rows))


def _activation(name: str) -> Case:
    x = normal(16384, scale=4.0)

    def program(party: Party) -> Protocol_[Any]:
        shares = input_of(party, x, 40, 12)
        if name == "ReLU":
            return (yield from relu(party, shares, compare_bits=20, bits=40))
        return (yield from gelu(party, shares, "tanh", compare_bits=21, bits=40))

    exact = functional.relu(x) if name == "ReLU" else functional.gelu(x, approximate="tanh")
    return Case(f"{name}, opening included", x.numel(), program, lambda: exact)


def _layer_norm() -> Case:
    x = normal(128, 256)

    def program(party: Party) -> Protocol_[Any]:
        return (yield from layer_norm(party, input_of(party, x, 60, 12), epsilon=1e-5, size_bits=12, bits=40))

    return Case("LayerNorm of 128 x 256, opening included", x.numel(), program, lambda: functional.layer_norm(x, (256,)))


def cases() -> list[Case]:
    """All of them."""
    return [
        _linear(),
        _lookup(),
        _truncation("truncate-reduce, 44 to 30 bits", 30),
        _truncation("exact truncation, 44 to 44 bits", 44),
        _comparison(),
        _maximum(),
        _argmax(),
        _exponential(),
        _softmax(2.0),
        _softmax(10.0),
        _activation("ReLU"),
        _activation("GELU"),
        _layer_norm(),
    ]


def _alone(weights: Weights, device: str) -> Source:
    return Alone(weights, device, Transfers, Lattice, held=sealed)


SOURCES = {DEALER: Dealt, TWO_PARTY: _alone}


def run_case(case: Case, samples: int = 1, trust: str = DEALER) -> Figures:
    """Runs it `samples` times; the seconds are those from the first party's online walk to the end, and offline those before it."""
    session, seconds, before = Session(case.weights, source=SOURCES[trust]), [], []
    for _ in range(samples):
        started: list[float] = []
        began = time.perf_counter()

        def begin(party: Party, started: list[float] = started) -> None:
            started.append(time.perf_counter())

        outcome = session.run(lambda party: party.run(case.program(party)), begin)
        seconds.append(time.perf_counter() - min(started))
        before.append(min(started) - began)
    error = None
    if case.exact is not None and isinstance(outcome.server, Shares):
        difference = outcome.value() - case.exact().double()
        if not outcome.server.frac:  # ring elements: the representative does not matter
            difference = reference.wrap(difference.round().long(), outcome.server.bits)
        error = float(difference.abs().max())
    counted = outcome.counted
    return Figures(
        counted["online"]["payload"] / case.elements,
        len(outcome.dealt) / case.elements,
        counted["offline"]["payload"] / case.elements,
        counted["online"]["rounds"],
        counted["offline"]["rounds"],
        error,
        seconds,
        before,
    )


def softmax_bytes(network: Network, seq: int, trust: str = DEALER) -> float:
    """Bytes an element, both directions, from a network's scores to the opened input of the product with v, in its own rings.

    With a dealer those online, of a layer; without, what is made before them too, the heads of all layers at once, as in a pass.
    """
    nodes = [node for node in network.lowered.graph.nodes if node.op == "attention"]
    node, heads = nodes[0], sum(node.heads for node in nodes) if trust == TWO_PARTY else nodes[0].heads
    rows, rings = Rows(1, seq, 1), node.plan.rings
    bits, within = rings.v_bits, rings.within
    x = normal(heads, rows.count, scale=2.0)

    def program(party: Party) -> Protocol_[Any]:
        score = yield from rescale(party, input_of(party, x, rings.qk_bits, rings.q_frac + rings.k_frac), bits=rings.score_bits, frac=12)
        if within is None:
            e = yield from exponentials(party, score, rows, bits)
        else:
            e = yield from bounded_exponentials(party, score, rows, bits, within)
        yield from open_masked(party, [Shares(e.value, bits, WEIGHT_FRAC, e.early)])

    found = run_case(Case("softmax to the opened weights", x.numel(), program), trust=trust)
    return found.online_bytes + (found.offline_bytes if trust == TWO_PARTY else 0.0)
