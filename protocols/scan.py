"""A linear recurrence over positions in its dual form: a masked product of shared matrices, with a state that does not grow.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), the state space duality of Mamba-2: h_t = a_t h_(t-1) + u_t b_t x_t^T,
y_t = c_t h_t, for one scalar a_t in [0, 1] a head and position. Over positions s <= r at once Y = (L o (C B^T)) X + decayed C h_before,
where L_rs = a_(s+1) ... a_r. Decays are public (as in Sun et al., "Retentive Network", arXiv 2307.08621) or e^-z of shared z >= 0.

H heads, T positions, N the state's rows, P a head's width. B and C are common to all heads. The layout of E_rq = a_q ... a_r, q <= r, is
that of causal rows; L_rs is E_r(s+1), and 1 on the diagonal. With `convex` u = 1 - a, and u_s L_rs = E_r(s+1) - E_rs: no product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from protocols.declared import Declared
from protocols.exponential import FRAC as EXPONENT_FRAC
from protocols.exponential import Window, cost_exponential, exponential
from protocols.memo import Memo
from protocols.opening import cost_open_masked, open_masked
from protocols.party import Party, Protocol_, parallel
from protocols.product import Cached, cost_matmul_wires, cost_multiply, cost_scores, cost_weighted, matmul_wires, multiply, scores, weighted
from protocols.ring import blank, in_a_row, known, like, nbytes
from protocols.rows import Rows
from protocols.shares import Hidden, Shares, Wire
from protocols.truncation import cost_rescale, rescale

X_FRAC, B_FRAC, C_FRAC = 14, 13, 13
SCORE_FRAC = 14  # of c b once it is rounded
PUBLIC_FRAC, DECAY_FRAC = 22, 16  # of public decays, and of shared ones where they are opened
INTO_STATE, FROM_STATE, WEIGHT_FRAC = 15, 13, 15  # of decayed b, of decayed c, and of decayed scores
FINEST = 5  # fraction bits that x may have besides, in exchange for those of what it is multiplied by
STATE_FRAC = 16
OUT = WEIGHT_FRAC + X_FRAC  # of the output, before it is rounded
WINDOW = Window.saturating(16, 1)
LOWEST = 240  # of what decays multiply to, in nats, within one block: `exponential` is right to 248
LONGEST = 128  # positions of a block: scores grow with its square
LARGEST_SHIFT = 16
_tables = Memo(64 * 2**20)


@dataclass(frozen=True)
class ScanRings:
    """`score_bits`: of c b. `weight_bits`: of products with a decay. `wide_bits`: of output and state. `block`: positions at once.

    `finer`: fraction bits of x beyond X_FRAC, by which decayed scores and decayed b have fewer: the products' are the same. A small x is
    off by the same part of a unit at each position where a text repeats itself, and a sum over these by as many times as much.
    """

    score_bits: int = 34
    weight_bits: int = 40
    wide_bits: int = 40
    block: int = LONGEST
    finer: int = 0

    @property
    def x_frac(self) -> int:
        """Of x where it is opened."""
        return X_FRAC + self.finer

    @property
    def weight_frac(self) -> int:
        """Of decayed scores where they are opened."""
        return WEIGHT_FRAC - self.finer

    @property
    def into_state(self) -> int:
        """Of decayed b where it is opened."""
        return INTO_STATE - self.finer

    @property
    def opened(self) -> int:
        """The ring in which b and c are opened."""
        return max(self.score_bits, self.weight_bits)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class State(Hidden):
    """What a recurrence keeps between passes, as one party's share of it."""

    shares: Shares

    def __repr__(self) -> str:
        return f"State({self.shares})"

    def shape_only(self) -> State:
        """For walks that know no values."""
        return State(Shares(blank(*self.shares.shape), self.shares.bits, self.shares.frac))


@_tables.kept(nbytes)
def powers(shifts: tuple[int, ...], count: int) -> Tensor:
    """(H, count): (1 - 2^-shift)^n for n < count, with PUBLIC_FRAC fraction bits; in integers, so that both parties hold the same."""
    found = []
    for shift in shifts:
        value, row = 1 << 60, []
        for _ in range(count):
            row.append((value + (1 << (59 - PUBLIC_FRAC))) >> (60 - PUBLIC_FRAC))
            value -= value >> shift
        found.append(row)
    return torch.tensor(found, dtype=torch.int64)


@_tables.kept(nbytes)
def _public(shifts: tuple[int, ...], count: int) -> Tensor:
    """(H, N): u_s L_rs of public decays, rows packed."""
    ahead = powers(shifts, count + 1)
    rows = Rows(1, count, 1)
    apart = (torch.arange(count)[:, None] - torch.arange(count)).clamp(min=0)  # (T, T): r - s
    return rows.pack(ahead[:, apart] - ahead[:, apart + 1])


@dataclass(frozen=True)
class _Decayed:
    """What decays have multiplied, of one block: scores (H, N), c (H, T, N), b (H, N, T), and the state before it (H, N, P)."""

    weights: Shares | None
    reading: Shares | None
    writing: Shares
    left: Shares | None


@dataclass(frozen=True)
class _Wires:
    """Of one block: x (H, T, P), b and c (1, T, N), the state before it (H, N, P), if there is one."""

    x: Wire
    b: Wire
    c: Wire
    h: Wire | None

    @staticmethod
    def of(opened: list[Wire]) -> _Wires:
        """As they were opened."""
        x, b, c, *h = opened
        return _Wires(x, b, c, h[0] if h else None)


@dataclass(frozen=True)
class _Block:
    """One block's values: x (H, T, P), b and c (1, T, N), z (H, T) of shared decays, the state before it; and how the walk is done."""

    x: Shares
    b: Shares
    c: Shares
    z: Shares | None
    h: Shares | None
    how: Scan

    @property
    def rows(self) -> Rows:
        """Of its scores, and of decays."""
        return self.how.rows(self.x.shape[1])

    def run(self, party: Party) -> Protocol_[tuple[Shares | None, Shares]]:
        """Its output (H, T, P) with OUT fraction bits in the wide ring, if it is wanted, and the state after it."""
        rings, asked = self.how.rings, self.rows.number
        x, b, c = yield from parallel(
            rescale(party, self.x, bits=rings.wide_bits, frac=rings.x_frac),
            rescale(party, self.b, bits=rings.opened, frac=B_FRAC),
            rescale(party, self.c.map(lambda v: v[:, -asked:]), bits=rings.opened, frac=C_FRAC),
        )
        opening = open_masked(party, [x, b, c, *([] if self.h is None else [self.h])])
        if self.z is None:
            wires = _Wires.of((yield from opening))
            decayed = yield from self._by_public(party, b, c, wires)
        else:
            opened, e = yield from parallel(opening, self._exponentials(party, self.z))
            wires = _Wires.of(opened)
            decayed = yield from self._by_shared(party, e, wires)
        return (yield from self._products(party, decayed, wires))

    def _scores(self, party: Party, wires: _Wires) -> Protocol_[Shares | None]:
        """c b, rounded, (1, N); none where no output is wanted."""
        if not self.how.output:
            return None
        s = scores(party, wires.c, Cached.join(None, wires.b), self.rows, self.how.rings.score_bits)
        return (yield from rescale(party, s, bits=self.how.rings.weight_bits, frac=SCORE_FRAC))

    # ---- public decays

    def _by_public(self, party: Party, b: Shares, c: Shares, wires: _Wires) -> Protocol_[_Decayed]:
        shifts, count, rings = self.how.shifts, self.x.shape[1], self.how.rings
        ahead = powers(shifts, count + 1)
        at_end = (ahead[:, :-1] - ahead[:, 1:]).flip(1)[..., None]  # (H, T, 1): u L of the last row
        left, todo = None, [self._decayed(party, b, at_end, rings.into_state)]
        if self.h is not None:
            part = (ahead[:, -1, None, None] + (1 << (PUBLIC_FRAC - DECAY_FRAC - 1))) >> (PUBLIC_FRAC - DECAY_FRAC)  # (H, 1, 1)
            left = self.h.times(like(part, self.h.value), DECAY_FRAC)
            todo += [self._decayed(party, c, ahead[:, -self.rows.number :, None], FROM_STATE)] if self.how.output else []
        s, *rest = yield from parallel(self._scores(party, wires), *todo)
        weights = None
        if s is not None:
            within = _public(shifts, count) if self.how.wanted == "all" else at_end[..., 0]
            product = s.times(like(within, s.value), PUBLIC_FRAC)
            weights = yield from rescale(party, product, bits=rings.wide_bits, frac=rings.weight_frac)
        return _Decayed(weights, rest[1] if len(rest) > 1 else None, rest[0].map(lambda v: v.transpose(1, 2)), left)

    def _decayed(self, party: Party, x: Shares, decays: Tensor, frac: int) -> Protocol_[Shares]:
        """b or c (1, T, N) times public decays (H, T, 1)."""
        product = x.narrow(self.how.rings.weight_bits).times(like(decays, x.value), PUBLIC_FRAC)
        return rescale(party, product, bits=self.how.rings.wide_bits, frac=frac)

    # ---- shared decays

    def _exponentials(self, party: Party, z: Shares) -> Protocol_[Shares]:
        """E (H, N), packed, in the window's ring."""
        rows = self.rows

        def differences(z: Tensor) -> Tensor:
            if z.is_meta:
                return blank(z.shape[0], rows.count)
            total = z.cumsum(1)
            return rows.pack((total - z)[:, None, :] - total[:, -rows.number :, None])  # (H, r, q): -(z_q + ... + z_r)

        d = yield from rescale(party, z.map(differences), bits=WINDOW.score_bits, frac=EXPONENT_FRAC)
        (wire,) = yield from open_masked(party, [d])
        return (yield from exponential(party, wire, None, rows, 0, window=WINDOW))

    def _parts(self, party: Party, e: Shares) -> list[tuple[Shares, int]]:
        """Of E, with the ring that each has when it is opened, and in this order, what is needed of

        u L (H, N), packed; what is left of the state (H, T, 1), and at the end (H, 1, 1); the last row of u L (H, T, 1).
        """
        rows, rings, heads, count, reads = self.rows, self.how.rings, e.shape[0], self.x.shape[1], self.h is not None
        if known(e.value):
            whole = rows.unpack(e.value)  # (H, T, T), or its last row
            after = torch.cat([whole[..., 1:], torch.zeros_like(whole[..., :1])], -1)
            if party.is_server:
                after = after + (torch.eye(count, dtype=torch.int64, device=after.device)[-rows.number :] << e.frac)
            weights = after - whole if self.how.convex else after
            parts = [rows.pack(weights), whole[..., :1], whole[:, -1:, :1], weights[:, -1, :, None]]
        else:
            parts = [blank(heads, rows.count), blank(heads, rows.number, 1), blank(heads, 1, 1), blank(heads, count, 1)]
        wanted = (self.how.output, self.how.output and reads, reads, True)
        bits = (rings.weight_bits, rings.weight_bits, rings.wide_bits, rings.weight_bits)
        return [(e.with_value(part), ring) for part, ring, is_wanted in zip(parts, bits, wanted, strict=True) if is_wanted]

    def _by_shared(self, party: Party, e: Shares, wires: _Wires) -> Protocol_[_Decayed]:
        rings, rounded = self.how.rings, [rescale(party, part, bits=bits, frac=DECAY_FRAC) for part, bits in self._parts(party, e)]
        s, *decays = yield from parallel(self._scores(party, wires), *rounded)
        opened = yield from open_masked(party, [*decays, *([] if s is None else [s])])
        left, todo, found = None, list[Protocol_[Shares]](), iter(opened)

        def times(value: Wire, frac: int) -> Protocol_[Shares]:
            return rescale(party, multiply(party, next(found), value, rings.weight_bits), bits=rings.wide_bits, frac=frac)

        if s is not None:
            todo.append(times(opened[-1], rings.weight_frac))
        if s is not None and wires.h is not None:
            todo.append(times(wires.c, FROM_STATE))
        if wires.h is not None:
            left = multiply(party, next(found), wires.h, rings.wide_bits)
        todo.append(times(wires.b, rings.into_state))
        *first, writing = yield from parallel(*todo)
        weights, reading, *_ = [*first, None, None]
        return _Decayed(weights, reading, writing.map(lambda v: v.transpose(1, 2)), left)

    # ---- what follows from both

    def _products(self, party: Party, decayed: _Decayed, wires: _Wires) -> Protocol_[tuple[Shares | None, Shares]]:
        bits, x = self.how.rings.wide_bits, Cached.join(None, wires.x)
        values = [value for value in (decayed.writing, decayed.weights, decayed.reading) if value is not None]
        writing, *opened = yield from open_masked(party, values)
        after = matmul_wires(party, writing, x, bits)  # (H, N, P)
        if decayed.left is not None:
            more = decayed.left.frac - after.frac
            after = after.times(1 << more, more) + decayed.left
        y = weighted(party, opened[0], x, self.rows, bits) if opened else None
        if y is not None and len(opened) > 1 and wires.h is not None:
            y = y + matmul_wires(party, opened[1], Cached.join(None, wires.h), bits)
        return y, (yield from rescale(party, after, bits=bits, frac=STATE_FRAC))


@dataclass(frozen=True)
class Scan:
    """How a recurrence is done: its rings; the `shifts` of public decays 1 - 2^-shift, one a head, or none where they are shared.

    `convex`: u = 1 - a, which public decays always have; else u = 1. `wanted`: all of y, the last position's, or the state alone.
    """

    rings: ScanRings
    shifts: tuple[int, ...] = ()
    convex: bool = True
    wanted: Literal["all", "last", "none"] = "all"

    @property
    def output(self) -> bool:
        """Whether any of y is wanted."""
        return self.wanted != "none"

    def rows(self, count: int) -> Rows:
        """Of a block of so many positions: all that is computed of its decays, and of its scores if there are any."""
        return Rows(1, count, 1) if self.wanted == "all" else Rows(count, 1, 1)


def scan(
    party: Party, x: Shares, b: Shares, c: Shares, z: Shares | None, state: State | None, how: Scan
) -> Protocol_[tuple[Shares | None, State]]:
    """y_t = c_t h_t for h_t = a_t h_(t-1) + u_t b_t x_t^T, over new positions after a `state`; and the state after them.

    x (H, T, P), b and c (1, T, N); y (H, T, P), or (H, 1, P), with OUT fraction bits in the wide ring. a is public, or e^-z of shared
    z (H, T) >= 0.

    Steps, block by block: x, b, c and the state are opened; scores c b^T, (1, N) for causal rows, are multiplied by u L, b by its last row,
    c by what is left of the state; public ones are integers that each party multiplies its shares by. Shared ones: each exponent
    -(z_q + ... + z_r) is a sum of shares, opened, and its exponential is taken without a maximum; it is opened as a factor. The three
    products are opened; y and the next state are products of opened matrices. The state is kept in shares, and opened anew under a
    fresh mask by each pass, so that what a token moves does not depend on how many there were.
    Domain: rings as planned (|y| and |h| two bits below the wide one, and so on); z of a block sum to less than 240.
    Error: of a public decay 2^-23, of a shared one 5.7e-5 of it and 2^-15; of a score 2^-14, of what is opened 2^-13 to 2^-16 each.
    Rounds: with public decays 4 a block, with shared ones 6, where nothing reduces. Learns: uniform values, both; lengths.
    """
    count, block, found = x.shape[1], how.rings.block, list[Shares]()
    h = None if state is None else state.shares
    for start in range(0, count, block):
        x_, b_, c_, z_ = (
            None if value is None else value.map(lambda v: v[:, start : start + block])  # noqa: B023  used within the loop alone
            for value in (x, b, c, z)
        )
        assert x_ is not None and b_ is not None and c_ is not None
        here = replace(how, wanted="none") if how.wanted == "last" and start + block < count else how
        y, h = yield from _Block(x_, b_, c_, z_, h, here).run(party)
        found += [] if y is None else [y]
    assert h is not None
    joined = None
    if found:
        one = found[0]
        joined = one if len(found) == 1 else one.with_value(in_a_row([y.value for y in found], 1))
    return joined, State(h)


def cost_scan(heads: int, count: int, width: int, size: int, how: Scan, *, first: bool) -> Declared:
    """`count` positions of heads of `width` with a state of `size` rows, from inputs that reduce; `first`: there is no state before."""
    found = Declared()
    for start in range(0, count, how.rings.block):
        length = min(how.rings.block, count - start)
        here = replace(how, wanted="none") if how.wanted == "last" and start + length < count else how
        found = found + _cost_block(heads, length, width, size, here, reads=not first or start > 0)
    return found


def _cost_block(heads: int, count: int, width: int, size: int, how: Scan, *, reads: bool) -> Declared:
    rings, rows, output = how.rings, how.rows(count), how.output
    wide, weight, weights, state = rings.wide_bits, rings.weight_bits, heads * rows.count, heads * size * width
    written, read = heads * count * size, heads * rows.number * size  # decayed b, and decayed c
    factors = [(count * size, rings.opened), (rows.number * size, rings.opened)]
    opening = cost_open_masked((heads * count * width, wide), *factors, *[(state, wide)] * reads)
    scored = Declared()
    if output:
        shift = B_FRAC + C_FRAC - SCORE_FRAC
        scored = cost_scores(1, rows, rings.score_bits) + cost_rescale(rows.count, rings.score_bits, shift, weight)
    if how.shifts:
        factor = B_FRAC + PUBLIC_FRAC
        decayed = scored.beside(cost_rescale(written, weight, factor - rings.into_state, wide))
        if output and reads:
            decayed = decayed.beside(cost_rescale(read, weight, factor - FROM_STATE, wide))
        if output:
            decayed = decayed + cost_rescale(weights, weight, SCORE_FRAC + PUBLIC_FRAC - rings.weight_frac, wide)
        found = opening + decayed
    else:
        exponents = cost_open_masked((weights, WINDOW.score_bits)) + cost_exponential(weights, WINDOW.bits, WINDOW.low)
        found = opening.beside(exponents) + _cost_of_shared(heads, count, how, scored, (written, read), state, reads=reads)
    opened = [(written, wide), *[(weights, wide)] * output, *[(read, wide)] * (output and reads)]
    products = cost_matmul_wires(heads, size, width, wide)
    if output:
        products = products + cost_weighted(heads, rows, width, wide)
        products = products + (cost_matmul_wires(heads, rows.number, width, wide) if reads else Declared())
    shift = (DECAY_FRAC + STATE_FRAC if reads else OUT) - STATE_FRAC
    return found + cost_open_masked(*opened) + products + cost_rescale(state, wide, shift, wide)


def _cost_of_shared(heads: int, count: int, how: Scan, scored: Declared, factors: tuple[int, int], state: int, *, reads: bool) -> Declared:
    """Of what shared decays take from their exponentials to what they have multiplied."""
    rings, rows, output = how.rings, how.rows(count), how.output
    wide, weight, weights = rings.wide_bits, rings.weight_bits, heads * rows.count
    parts = [
        *[(weights, weight)] * output,
        *[(heads * rows.number, weight)] * (output and reads),
        *[(heads, wide)] * reads,
        (heads * count, weight),
    ]
    rounded = scored
    for size, bits in parts:
        rounded = rounded.beside(cost_rescale(size, WINDOW.bits, WINDOW.out_frac - DECAY_FRAC, bits))
    multiplied, products = Declared(), Declared()
    for size, frac, kept, is_there in (
        (weights, SCORE_FRAC, rings.weight_frac, output),
        (factors[1], C_FRAC, FROM_STATE, output and reads),
        (factors[0], B_FRAC, rings.into_state, True),
    ):
        if is_there:
            products = products + cost_multiply(size, weight)
            multiplied = multiplied.beside(cost_rescale(size, weight, DECAY_FRAC + frac - kept, wide))
    left = cost_multiply(state, wide) if reads else Declared()
    return rounded + cost_open_masked(*parts, *[(rows.count, weight)] * output) + products + left + multiplied
