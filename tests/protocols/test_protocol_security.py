"""What a party receives is uniform and says nothing: neither by its values, nor by its sizes, nor by what the dealer is asked for."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protocols import prg
from protocols.activation import gelu, relu
from protocols.ceiling import row_ceiling
from protocols.comparison import CompareMask, compare
from protocols.correlations import Role, unpack_parts
from protocols.exponential import exponential
from protocols.linear import Weight, linear, lookup, scale, weight_mask
from protocols.max_plus import max_plus, max_plus_attention
from protocols.maximum import row_argmax, row_maximum, upper_wire
from protocols.norm import layer_norm
from protocols.opening import open_masked, private_input, reveal
from protocols.party import Item, Offline, Online, Party, Protocol_
from protocols.prg import derive, new_seed
from protocols.product import Cached
from protocols.reciprocal import reciprocal
from protocols.relu_attention import ReluRings, relu_attention
from protocols.ring import encode, reduce, signed
from protocols.rows import Rows, Stacked
from protocols.sequences import gather, put
from protocols.shares import Shares
from protocols.softmax import AttentionRings, attention, softmax
from protocols.truncation import rescale
from tests.support.two_party import Outcome, Session, mask_weight, offline_walk, run, uniform

Z = 7.5
"""Where a test fails, in standard deviations: by chance with probability 6.4e-14, two-sided. A run of this file makes fewer
than 10^5 tests (every bit of every part is one), so that it fails by chance less than once in 10^8 runs."""


def suspicion(x: Tensor, bits: int) -> str:
    """Why these are no uniform elements of Z_2^bits, or nothing: every bit's frequency, and a chi-square on the upper bits."""
    flat = reduce(x.reshape(-1), bits)
    count = len(flat)
    octets = flat.contiguous().numpy().view(np.uint8).reshape(count, 8)
    for bit, ones in enumerate(np.unpackbits(octets, axis=1, bitorder="little").sum(0)[:bits].tolist()):
        if abs(2 * ones - count) > Z * math.sqrt(count):
            return f"bit {bit} of {bits} is 1 in {ones} of {count}"
    top = min(bits, max(1, int(math.log2(max(2, count / 40)))), 8)  # at least 40 expected in a bin
    seen = torch.bincount((flat >> (bits - top)) & ((1 << top) - 1), minlength=1 << top).double()
    expected = count / (1 << top)
    chi, freedom = float(((seen - expected) ** 2 / expected).sum()), (1 << top) - 1
    # Wilson and Hilferty: the cube root is close to normal
    score = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return f"chi-square {chi:.1f} at {freedom} degrees of freedom" if score > Z else ""


def suspicions(outcome: Outcome) -> list[str]:
    """Of all that either party received: from the other, online and ahead of the query, and from the dealer.

    Besides the elements, the differences of neighbours: two elements under one mask would differ by a constant.
    """
    seen = [(f"{role.value} item {k}", part, x) for role in Role for k, (part, x) in enumerate(outcome.received[role])]
    at = 0
    for kind in outcome.kinds:
        parts = kind.shared_parts()
        tensors = unpack_parts(memoryview(outcome.dealt)[at : at + kind.shared_bytes], parts)
        at += kind.shared_bytes
        seen += [(f"dealt {type(kind).__name__} part {k}", p, x) for k, (p, x) in enumerate(zip(parts, tensors, strict=True))]
    found = []
    for name, part, x in seen:
        if part.count < 2:
            continue
        flat = x.reshape(-1)
        for what, values in (("", flat), (" differences", flat[1::2] - flat[: len(flat) - 1 : 2])):
            reason = suspicion(values, part.bits)
            if reason:
                found.append(f"{name}{what}: {reason}")
    return found


def plain(party: Party, x: Tensor, bits: int, frac: int, owner: Role, *, early: bool = False) -> Shares:
    """A secret that is all in one party's share: nothing but the protocol's own masks hides it."""
    known = isinstance(party.engine, Online) or (early and not party.is_server and isinstance(party.engine, Offline))
    value = private_input(x, bits, frac, own=party.role is owner) if known else Shares(x.to("meta"), bits, frac)
    return replace(value, early=early)


BATCH = 4096
GROUPS = 512  # of rows
Program = Callable[[Party], Protocol_[Any]]
Weights = dict[str, tuple[Weight, Tensor]]


def programs(owner: Role, secret: float) -> dict[str, tuple[Program, Weights]]:
    """Each protocol on a batch of one and the same secret, all of it in the owner's share."""

    def same(*shape: int, value: float = secret, frac: int = 12) -> Tensor:
        return encode(torch.full(shape, value, dtype=torch.float64), frac)

    matrix, vector = Weight("w", (3, 4), 40, 10), Weight("v", (2, 4), 40, 10)
    weights: Weights = {"w": (matrix, same(3, 4, frac=10)), "v": (vector, same(2, 4, frac=10))}
    table = Weight("t", (7, 2), 20, 10)
    tables: Weights = {"t": (table, same(7, 2, frac=10))}
    rows, single = Rows(1, 6, 1), Rows(9, 1, 0)

    def linear_(party: Party) -> Protocol_[Any]:
        yield from linear(party, plain(party, same(BATCH, 3), 40, 12, owner), matrix, bits=37)

    def linear_early(party: Party) -> Protocol_[Any]:
        y = yield from linear(party, plain(party, same(BATCH, 3), 40, 12, owner, early=True), matrix, bits=40)
        z = yield from rescale(party, y, bits=40, frac=12)
        yield from open_masked(party, [y, z])

    def scale_(party: Party) -> Protocol_[Any]:
        yield from scale(party, plain(party, same(2, 3, BATCH), 40, 12, owner), vector, bits=37, window=(1, 4))

    def lookup_(party: Party) -> Protocol_[Any]:
        ids = None if party.is_server or offline_walk(party) else torch.full((BATCH,), round(abs(secret)) % 7)
        yield from lookup(party, ids, BATCH, table, bits=19)

    def opening(party: Party) -> Protocol_[Any]:
        secrets = [plain(party, same(BATCH), bits, 12, owner, early=early) for bits in (1, 21, 64) for early in (False, True)]
        yield from open_masked(party, secrets)

    def rescaling(party: Party) -> Protocol_[Any]:
        for bits, to_bits in ((40, 40), (18, 44)):
            yield from rescale(party, plain(party, same(BATCH), bits, 12, owner), bits=to_bits, frac=12 if to_bits > bits else 3)

    def comparing(party: Party) -> Protocol_[Any]:
        for bits, single in ((6, 0), (13, 0), (31, 0), (9, 1)):
            (w,) = yield from open_masked(party, [plain(party, same(BATCH, frac=1), bits, 1, owner)])
            c = w.masked[:, None] if not offline_walk(party) else torch.empty((BATCH, 1), dtype=torch.int64, device="meta")
            yield from compare(party, c, CompareMask(w.name, (BATCH, 1), (BATCH, 1), bits, single))

    def maximum(party: Party) -> Protocol_[Any]:
        (w,) = yield from open_masked(party, [plain(party, same(GROUPS, rows.count), 21, 12, owner)])
        yield from row_maximum(party, upper_wire(party, w, 11), rows)

    def bound(party: Party) -> Protocol_[Any]:
        (w,) = yield from open_masked(party, [plain(party, same(GROUPS // 64, single.count), 21, 12, owner)])
        yield from row_ceiling(party, w, single, 12)

    def argmax(party: Party) -> Protocol_[Any]:
        (w,) = yield from open_masked(party, [plain(party, same(GROUPS, single.count), 21, 12, owner)])
        place = yield from row_argmax(party, w, single)
        yield from reveal(party, place, to=Role.CLIENT)

    def exp(party: Party) -> Protocol_[Any]:
        inputs = [plain(party, same(GROUPS, rows.count), 21, 12, owner), plain(party, same(GROUPS, rows.number, frac=1), 10, 1, owner)]
        x, m = yield from open_masked(party, inputs)
        yield from exponential(party, x, m, rows, 11)

    def inverse(party: Party) -> Protocol_[Any]:
        yield from reciprocal(party, plain(party, same(BATCH, 2, value=1 + abs(secret)), 40, 12, owner), bound=9.0, bits=40, frac=20)

    def soft(party: Party) -> Protocol_[Any]:
        yield from softmax(party, plain(party, same(GROUPS, rows.count), 33, 12, owner), rows, bits=30, frac=20)

    def attend(party: Party) -> Protocol_[Any]:
        shapes = ((GROUPS, 6, 2), 33), ((GROUPS, 6, 2), 33), ((GROUPS, 6, 2), 44)
        q, k, v = yield from open_masked(party, [plain(party, same(*shape), bits, 12, owner) for shape, bits in shapes])
        yield from attention(party, q, Cached.join(None, k), Cached.join(None, v), rows, AttentionRings())

    def attend_by_relu(party: Party) -> Protocol_[Any]:
        shapes = ((GROUPS, 6, 2), 33), ((GROUPS, 6, 2), 33), ((GROUPS, 6, 2), 44)
        q, k, v = yield from open_masked(party, [plain(party, same(*shape), bits, 12, owner) for shape, bits in shapes])
        yield from relu_attention(party, q, Cached.join(None, k), Cached.join(None, v), rows, ReluRings())

    def tropical(party: Party) -> Protocol_[Any]:
        q, k, v = (plain(party, same(GROUPS, 6, 2), 24, 12, owner) for _ in range(3))
        yield from max_plus_attention(party, q, k, v, rows)
        weight = torch.full((2, 3), 1 << 12) if party.is_server else None
        yield from max_plus(party, plain(party, same(GROUPS, 2), 24, 12, owner), weight, 3)

    def attend_in_batches(party: Party) -> Protocol_[Any]:
        shapes = ((GROUPS, 3, 2), 33), ((GROUPS, 6, 2), 33), ((GROUPS, 6, 2), 44), ((GROUPS, 2, 2), 33)
        q, k, v, row = yield from open_masked(party, [plain(party, same(*shape), bits, 12, owner) for shape, bits in shapes])
        keys, values = (gather(party, None, wire, [(1, 3, 3), (1, 0, 3)], (3, 0)) for wire in (k, v))
        keys = put(party, ("", ""), keys, row, (1, 5), (3, 0))
        yield from attention(party, q, keys, values, Stacked.of([Rows(2, 2, 1), Rows(3, 1, 1)]), AttentionRings())

    def normalised(party: Party) -> Protocol_[Any]:
        x = plain(party, same(GROUPS, 8) * torch.arange(1, 9), 56, 12, owner)
        yield from layer_norm(party, x, epsilon=1e-5, size_bits=14, bits=40)

    def activations(party: Party) -> Protocol_[Any]:
        yield from relu(party, plain(party, same(BATCH), 40, 12, owner), compare_bits=20, bits=40)
        yield from gelu(party, plain(party, same(BATCH), 40, 12, owner), "tanh", compare_bits=20, bits=40)

    return {
        "linear": (linear_, weights),
        "linear early": (linear_early, weights),
        "scale": (scale_, weights),
        "lookup": (lookup_, tables),
        "open": (opening, {}),
        "rescale": (rescaling, {}),
        "compare": (comparing, {}),
        "maximum": (maximum, {}),
        "bound": (bound, {}),
        "argmax": (argmax, {}),
        "exponential": (exp, {}),
        "reciprocal": (inverse, {}),
        "softmax": (soft, {}),
        "attention": (attend, {}),
        "max-plus products": (tropical, {}),
        "attention by ReLU": (attend_by_relu, {}),
        "attention of several sequences": (attend_in_batches, {}),
        "activations": (activations, {}),
        "normalised": (normalised, {}),
    }


NAMES = list(programs(Role.SERVER, 1.0))


@pytest.mark.parametrize("owner", Role)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_party_receives_is_uniform(name: str, owner: Role) -> None:
    for secret in (0.0, 2.75):
        program, weights = programs(owner, secret)[name]
        assert suspicions(run(program, weights)) == []


def test_the_test_of_uniformity_sees_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls: a message without a mask, one mask for all, a mask that is short of a bit, and a generator that prefers a bit by 4 %."""

    def bare(party: Party) -> Protocol_[Any]:
        yield [Item(plain(party, torch.full((BATCH,), 12345), 40, 0, Role.CLIENT).value, 40)]

    def reused(party: Party) -> Protocol_[Any]:
        (one,) = yield from open_masked(party, [plain(party, torch.zeros(1, dtype=torch.int64), 40, 0, Role.CLIENT)])
        hidden = one.mask + torch.arange(BATCH) % 2 if not offline_walk(party) else torch.empty(BATCH, dtype=torch.int64, device="meta")
        yield [Item(hidden, 40)]

    assert suspicions(run(bare)) and any("differences" in reason for reason in suspicions(run(reused)))
    honest = prg.Stream.uniform
    opening = programs(Role.CLIENT, 2.75)["open"][0]
    assert not suspicions(run(opening))
    with monkeypatch.context() as patch:
        patch.setattr(prg.Stream, "uniform", lambda self, shape, bits, device="cpu": honest(self, shape, bits, device) >> 1)
        assert suspicions(run(opening))
    generator = torch.Generator().manual_seed(1)
    biased = uniform(1 << 16, bits=33) | ((torch.rand(1 << 16, generator=generator) < 0.08).long() << 5)
    assert "bit 5 of 33" in suspicion(biased, 33)
    twins = uniform(1 << 16, bits=20)
    assert "chi-square" in suspicion((twins & ~(1 << 19)) | (twins << 1 & 1 << 19), 20)


@pytest.mark.parametrize("name", NAMES)
def test_shape_is_all_that_sizes_order_and_kinds_depend_on(name: str) -> None:
    """Two secrets and two sets of weights: the same messages in the same order, and the same requests to the dealer."""
    outcomes = []
    for secret in (0.0, -3.25):
        program, weights = programs(Role.CLIENT, secret)[name]
        outcomes.append(run(program, weights))
    first, second = outcomes
    assert first.kinds == second.kinds and len(first.dealt) == len(second.dealt)
    for role in Role:
        assert [part for part, _ in first.received[role]] == [part for part, _ in second.received[role]]
    timeless = [[{k: v for k, v in o.counted[p].items() if k != "seconds"} for p in ("offline", "online")] for o in outcomes]
    assert timeless[0] == timeless[1]


def test_one_session_never_opens_two_values_under_one_mask() -> None:
    """Two passes over the same secrets: what is sent differs as two independent uniform messages do."""
    session, x = Session(), torch.full((BATCH,), 77)

    def program(party: Party) -> Any:
        def protocol() -> Protocol_[Any]:
            y = plain(party, x, 40, 0, Role.CLIENT)
            yield from open_masked(party, [y])
            return (yield from rescale(party, y, bits=44, frac=0))

        return party.run(protocol())

    first, second = session.run(program), session.run(program)
    for role in Role:
        for (part, a), (_, b) in zip(first.received[role], second.received[role], strict=True):
            assert not suspicion(a - b, part.bits) and not suspicion(a ^ b, part.bits)


# ---- weights


def test_two_lowerings_do_not_give_the_weights_away() -> None:
    """W~ of nearly equal weights under two seeds: their difference is uniform. Under one seed (never done) it would be W - W'."""
    record = Weight("h.0.attn.c_attn.weight", (300, 200), 36, 20)
    w = encode(torch.randn(300, 200, dtype=torch.float64), 20)
    near = w + torch.randint(-1, 2, w.shape)
    seed, other = new_seed(), new_seed()
    assert not suspicion(mask_weight(w, seed, record), 36)
    assert not suspicion(mask_weight(w, seed, record) - mask_weight(near, other, record), 36)
    assert torch.equal(signed(mask_weight(w, seed, record) - mask_weight(near, seed, record), 36), w - near)


@pytest.mark.parametrize("change", [{"bits": 37}, {"frac": 19}, {"name": "h.1.attn.c_attn.weight"}, {"shape": (200, 300)}])
def test_another_encoding_has_another_mask(change: dict[str, Any]) -> None:
    record, seed = Weight("h.0.attn.c_attn.weight", (300, 200), 36, 20), new_seed()
    a, b = weight_mask(seed, record), weight_mask(seed, replace(record, **change))
    assert not suspicion(a.reshape(-1) - b.reshape(-1), 36) and not suspicion(a.reshape(-1) - 2 * b.reshape(-1), 36)
    assert not suspicion(a - weight_mask(derive(seed, "x"), record), 36)


# ---- sources of randomness

ROOT = Path(__file__).resolve().parents[2]
SECURE_ROOMS = sorted([*(ROOT / "protocols").rglob("*.py"), *(ROOT / "privinf" / "party").rglob("*.py")])


def insecure(source: str) -> list[str]:
    """Uses of `random`, numpy.random or a torch generator in a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            head, *rest = name.split(".")
            drawn = rest and (rest[-1].startswith(("rand", "bernoulli", "multinomial", "normal_")) or rest[0] in ("random", "Generator"))
            in_place = rest and rest[-1] in ("random_", "uniform_", "normal_", "bernoulli_", "exponential_", "manual_seed")
            if name == "random" or name.startswith("random.") or (head in ("torch", "np", "numpy") and drawn) or in_place:
                found.append(name)
    return found


def test_secure_rooms_draw_from_the_generator_alone() -> None:
    assert len(SECURE_ROOMS) > 15
    for path in SECURE_ROOMS:
        assert insecure(path.read_text()) == [], path.name


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from random import choice",
        "import numpy as np\nx = np.random.default_rng()",
        "from numpy.random import default_rng",
        "import torch\nx = torch.randint(5, (3,))",
        "import torch\nx = torch.randn(3)",
        "from torch import rand",
        "import torch\nx = torch.empty(3).uniform_()",
        "import torch\ntorch.Generator()",
        "import torch\nx = torch.random.fork_rng()",
    ],
)
def test_the_lint_sees_insecure_sources(source: str) -> None:
    assert insecure(source)
