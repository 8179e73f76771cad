"""The silent extension: its kernels against their twins, its correlation on every output, its choices' and blocks' statistics."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest

from protocols.ot import kernels
from protocols.ot.silent import KEPT, Extender, Memory, places
from protocols.ot.words import Words
from protocols.security import KAPPA, LPN, LPN_EMP, LPN_WEIGHT, LPN_WIDE, Lpn
from tests.ot import plain

ONE = np.uint64(1)
TINY = Lpn(70, 4, 200)  # more than two batches


def words(*shape: int) -> Words:
    return np.frombuffer(os.urandom(8 * int(np.prod(shape))), np.uint64).reshape(shape).copy()


def pair(lpn: Lpn) -> tuple[Extender, Extender, Words]:
    delta, q = words(2), words(lpn.seed, 2)
    delta[0] |= ONE
    q[:, 0] &= plain.EVEN
    t = q ^ (words(lpn.seed) & ONE)[:, None] * delta
    return Extender(lpn, b"session", q, delta), Extender(lpn, b"session", t, None), delta


@pytest.mark.parametrize("w", [1, 2, 17])
def test_transpose(w: int) -> None:
    rows, out = words(128, w), np.empty(128 * w, np.uint64)
    kernels.transpose(rows, out)
    assert np.array_equal(out.reshape(-1, 2), plain.transpose(rows))


@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize("trees", [1, 5])
def test_a_level(m: int, trees: int) -> None:
    n = 16
    nodes, aes, left = words(trees, n, 2), words(trees, m, 2), words(trees, 2)
    hashed = words(trees * m * 2)
    kernels.to_hash(nodes.reshape(-1), m, trees, n, hashed)
    assert np.array_equal(hashed.reshape(trees, m, 2), plain.to_hash(nodes, m))
    level, sums = plain.expand(nodes[:, :m], hashed.reshape(trees, m, 2), aes)
    kernels.expand(nodes.reshape(-1), m, trees, n, hashed, aes.reshape(-1), left)
    assert np.array_equal(nodes[:, : 2 * m], level) and np.array_equal(left, sums)

    hole, bits, keys = words(trees) % np.uint64(m), words(trees) & ONE, words(trees, 2)
    before = nodes[:, : 2 * m].copy()
    if m == 1:  # the root is the hole: nothing was known
        total = np.zeros((trees, 2), np.uint64)
    else:  # right children are x ^ left, so both sides' sum is that of the nodes before; the hole was 0
        for tree, at in enumerate(hole.astype(int)):
            before[tree, at + m] = before[tree, at]
        nodes[:, : 2 * m] = before
        total = np.bitwise_xor.reduce(before, 1)
    level, holes = plain.repair(before, hole, bits, keys)
    kernels.repair(nodes.reshape(-1), m, trees, n, left, total, hole, bits, keys)
    assert np.array_equal(nodes[:, : 2 * m], level) and np.array_equal(hole, holes)
    assert np.array_equal(total, np.bitwise_xor.reduce(level, 1))


@pytest.mark.parametrize("receives", [False, True])
def test_leaves(receives: bool) -> None:
    nodes, hole = words(5, 16, 2), words(5) % np.uint64(16)
    expected = plain.finish(nodes, hole if receives else None)
    kernels.finish(nodes.reshape(-1), 5, 16, hole if receives else hole[:0], receives)
    assert np.array_equal(nodes, expected)


@pytest.mark.parametrize("lpn", [TINY, LPN_EMP, LPN_WIDE])
def test_encode(lpn: Lpn) -> None:
    noise, secret, out = words(500, 2), words(lpn.dimension, 2), words(1000)
    at = places(lpn)[:500]
    kernels.encode(noise.reshape(-1), at, secret.reshape(-1), out)
    assert np.array_equal(out.reshape(-1, 2), plain.encode(noise, at, secret))


def test_places_are_even() -> None:
    for lpn in (LPN, TINY):
        at = plain.read_places(places(lpn))
        assert at.shape == (lpn.outputs, LPN_WEIGHT) and int(at.max()) < lpn.dimension
        counts = np.bincount(at.reshape(-1), minlength=lpn.dimension)
        mean = at.size / lpn.dimension
        assert abs(counts - mean).max() < 9 * mean**0.5  # each is Poisson; nine deviations


@pytest.mark.parametrize("lpn", [TINY, LPN_EMP, LPN])
def test_every_output_is_a_correlated_transfer(lpn: Lpn) -> None:
    sender, receiver, delta = pair(lpn)
    seen = []
    for _ in range(3):
        message, q = sender.send()
        t = receiver.receive(message)
        choice = t[:, 0] & ONE
        assert q.shape == t.shape == (lpn.net, 2) and message.shape == (lpn.trees, lpn.height, 2)
        assert not (q[:, 0] & ONE).any() and np.array_equal(q ^ t, choice[:, None] * delta)
        seen.append((message, q, choice))
    if lpn is LPN:
        for _, q, choice in seen:
            assert abs(choice.mean() - 0.5) < 4 / lpn.net**0.5  # eight deviations
            ones = np.unpackbits(q.view(np.uint8), bitorder="little").reshape(-1, 128).mean(0)
            assert abs(ones[1:] - 0.5).max() < 4 / lpn.net**0.5
        agree = (seen[0][2] == seen[1][2]).mean()
        assert abs(agree - 0.5) < 4 / lpn.net**0.5
        assert len({q.tobytes() for _, q, _ in seen}) == len({m.tobytes() for m, _, _ in seen}) == 3


def test_memory_is_used_again_once_all_of_it_is_back() -> None:
    memory = Memory(20)
    whole = memory.lend(12)
    first, second = whole[:4].reshape(2, 2), whole[4:12].reshape(4, 2)
    memory.give_back(first)
    assert memory.lend(12) is not whole
    memory.give_back(words(4, 2))  # nothing of its own
    memory.give_back(second[1:])
    assert memory.lend(12) is not whole
    memory.give_back(second[:1])
    assert memory.lend(12) is whole
    memory.give_back(first)
    with pytest.raises(AssertionError, match="twice"):
        memory.give_back(whole[:10])
    lent = [memory.lend(20) for _ in range(2 * KEPT)]
    for each in lent:
        memory.give_back(each[:])
    assert len(memory._free) == KEPT


def test_sets_hold_what_they_say() -> None:
    for lpn in (LPN, LPN_EMP, LPN_WIDE):
        assert lpn.outputs == lpn.trees * 2**lpn.height and lpn.net == lpn.outputs - lpn.dimension - lpn.trees * lpn.height > 0
    assert LPN.dimension >= LPN_EMP.dimension and LPN.outputs <= LPN_EMP.outputs  # no easier than that


def core(at: np.ndarray, dimension: int, step: int = 256) -> int:
    """Columns left when the least read ones go, some at a time, with the outputs that read them, while outputs suffice."""
    width, order = at.shape[1], np.argsort(at.reshape(-1), kind="stable")
    starts = np.searchsorted(at.reshape(-1)[order], np.arange(dimension + 1))
    readers, degrees = order // width, np.diff(starts)
    alive, used, columns, outputs = np.ones(len(at), bool), np.ones(dimension, bool), dimension, len(at)
    while outputs >= columns:
        out = np.argpartition(np.where(used, degrees, len(at)), step)[:step]
        used[out] = False
        gone = np.unique(np.concatenate([readers[starts[k] : starts[k + 1]] for k in out]))
        gone = gone[alive[gone]]
        alive[gone] = False
        degrees = degrees - np.bincount(at[gone].reshape(-1), minlength=dimension)
        columns, outputs = columns - step, outputs - len(gone)
    return columns + step


def test_sparse_rows_leave_no_small_core() -> None:
    """Domain reduction (arXiv 2407.19215): all outputs of the core without an error, and as much work as it has columns for each try."""

    def bits(columns: int) -> float:
        return -LPN.trees * math.log2(1 - columns / LPN.outputs) + math.log2(columns)

    found = core(plain.read_places(places(LPN)), LPN.dimension)
    assert LPN.dimension / 2 < found < LPN.dimension and bits(found) > KAPPA
    assert bits(53972) < 100  # what that leaves of a secret of 5 << 14
