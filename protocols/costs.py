"""What each protocol costs, as a formula of public shapes and rings.

Nothing here runs a protocol or asks for a correlation: `tests/test_protocol_costs.py` holds every formula against the
trace of the protocol and against the bytes and rounds counted on the wire.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil, comb

from protocols import exponential as exp
from protocols import reciprocal as rec
from protocols import softmax as soft
from protocols.comparison import MAX_DIGIT
from protocols.correlations import Role
from protocols.ring import packed_size
from protocols.rows import Rows
from protocols.softmax import AttentionRings

BOTH, DOWN, UP, NONE = "=", ">", "<", "-"  # an exchange; S to C alone; C to S alone; a round whose only part left early


@dataclass(frozen=True, slots=True)
class Declared:
    """Bytes between S and C online (both directions), from D, and from C ahead of the query; and who sends in each round."""

    online: int = 0
    dealer: int = 0
    early: int = 0
    steps: str = ""

    def __add__(self, after: Declared) -> Declared:
        return Declared(self.online + after.online, self.dealer + after.dealer, self.early + after.early, self.steps + after.steps)

    def beside(self, other: Declared) -> Declared:
        """Both at once: their k-th rounds are one."""
        steps = ""
        for pair in zip_longest(self.steps, other.steps, fillvalue=NONE):
            senders = {*pair} - {NONE}
            steps += senders.pop() if len(senders) == 1 else BOTH if senders else NONE
        both = self + other
        return Declared(both.online, both.dealer, both.early, steps)

    @property
    def rounds(self) -> int:
        """As the client sees them: the depth of the chain of dependent messages that ends there.

        `linear` alone has none: nothing comes back. Its message counts once S answers with something that waited for it.
        """
        server = client = 0
        for step in self.steps:
            at_server = max(server, client + 1) if step in (BOTH, UP) else server
            client = max(client, server + 1) if step in (BOTH, DOWN) else client
            server = at_server
        return client


def dealt(*parts: tuple[int, int]) -> Declared:
    """(count, bits) of each part that D sends."""
    return Declared(dealer=sum(packed_size(count, bits) for count, bits in parts))


def exchanged(*parts: tuple[int, int]) -> Declared:
    """(count, bits) of each part of one exchange."""
    return Declared(online=2 * sum(packed_size(count, bits) for count, bits in parts), steps=BOTH)


def _total(costs: Iterable[Declared]) -> Declared:
    return sum(costs, Declared())


def linear(rows: int, inputs: int, outputs: int, bits: int, *, early: bool = False) -> Declared:
    """x W for x (rows, inputs): an element per input from C, an element per output from D."""
    sent = packed_size(rows * inputs, bits)
    dealer = packed_size(rows * outputs, bits)
    return Declared(dealer=dealer, early=sent, steps=NONE) if early else Declared(sent, dealer, steps=UP)


def scale(count: int, bits: int, *, early: bool = False) -> Declared:
    """x * w for x of `count` elements."""
    return linear(1, count, count, bits, early=early)


def lookup(count: int, vocabulary: int, width: int, bits: int) -> Declared:
    """Rows of a table: `linear` on one-hot rows."""
    return linear(count, vocabulary, width, bits)


def open_masked(*values: tuple[int, int], early: Sequence[bool] = ()) -> Declared:
    """(count, bits) of each value: it goes both ways; C's part of an early one has gone before."""
    sizes = [packed_size(count, bits) for count, bits in values]
    ahead = sum(size for size, is_early in zip(sizes, early, strict=False) if is_early)
    alone = len(early) == len(values) and all(early)
    return Declared(online=2 * sum(sizes) - ahead, early=ahead, steps=DOWN if alone else BOTH)


def reveal(count: int, bits: int, to: Role) -> Declared:
    """One share, one way."""
    return Declared(online=packed_size(count, bits), steps=DOWN if to is Role.CLIENT else UP)


def rescale(count: int, bits: int, shift: int, to_bits: int, *, early: bool = False) -> Declared:
    """From a ring of `bits` to one of `to_bits`, dropping `shift` fraction bits: nothing if the wrap drops out."""
    if to_bits <= bits - shift:
        return Declared()
    return open_masked((count, 1), early=(early,)) + dealt((count, to_bits - (bits - shift)))


def multiply(count: int, bits: int) -> Declared:
    """`count` products of opened wires; also `matmul_wires`, `scores` and `weighted`, by the elements of their result."""
    return dealt((count, bits))


def scores(heads: int, rows: Rows, bits: int) -> Declared:
    """The elements of q k^T that the rows hold."""
    return multiply(heads * rows.count, bits)


def weighted(heads: int, rows: Rows, width: int, bits: int) -> Declared:
    """p v: a row of `width` for each row."""
    return multiply(heads * rows.number * width, bits)


def compare(count: int, bits: int, *, masks: int | None = None, single: bool = False) -> Declared:
    """`count` comparisons of `bits` bits with `masks` different R (one each if not given).

    D: one-hots of the digits of each R; the products of two or more of the ANDs' variables, 3 2^(n-1) - 2n - 1 for n digits.
    """
    low = bits - 1
    number = 1 if single else max(1, ceil(low / MAX_DIGIT))
    widths = [low // number + (k < low % number) for k in range(number)]
    hot = count if masks is None else masks
    cost = dealt(*((hot, 2**width) if width <= 6 else (hot * 2 ** (width - 6), 64) for width in widths))
    if number > 1:
        products = 3 * 2 ** (number - 1) - 2 * number - 1
        joint = [min(60, products - at) for at in range(0, products, 60)]  # 60 to an element
        cost += exchanged((count, 2 * (number - 1))) + dealt(*((count, width) for width in joint))
    return cost + exchanged((count, 1))


def levels(rows: Rows) -> list[Counter[int]]:
    """The groups of each level of a tournament, by size."""
    lengths = Counter(rows.first + rows.step * k for k in range(rows.number))
    found = []
    while (longest := max(lengths)) > 1:
        radix = 4
        if rows.number == 1 and longest <= 4096:
            radix = ceil(longest / 8 ** (depth(longest, 8) - 1))
        elif rows.number > 1 and longest <= 2 * 4 ** (depth(longest, 4) - 1):
            radix = 2
        groups: Counter[int] = Counter()
        after: Counter[int] = Counter()
        for length, number in lengths.items():
            groups[radix] += number * (length // radix)
            groups[length % radix] += number
            after[ceil(length / radix)] += number
        found.append(Counter({size: number for size, number in groups.items() if size and number}))
        lengths = after
    return found


def depth(length: int, radix: int) -> int:
    """Levels of groups of `radix` that a row of this length takes."""
    return 0 if length == 1 else 1 + depth(ceil(length / radix), radix)


def _contest(heads: int, rows: Rows, groups: Counter[int], bits: int, shared_bits: int, wires: Sequence[int]) -> Declared:
    """All comparisons in the groups of a level; the products of rhos in `shared_bits`, and times each of the wires' masks."""
    cost, pairs = Declared(), heads * sum(number * comb(size, 2) for size, number in groups.items())
    single = rows.number == 1 and bits <= 16 and pairs * 2 ** (bits - 1) // 8 <= 2**20
    for size, number in groups.items():
        if size > 1:
            products = heads * number * (size - 1) * (2 ** (size - 1) - 1)
            one = compare(heads * number * comb(size, 2), bits, single=single)
            cost = cost.beside(one + dealt((products, shared_bits), *((products, wire) for wire in wires)))
    return cost


def row_maximum(heads: int, rows: Rows, bits: int) -> Declared:
    """Per level: comparisons of all pairs of each group, then an opening of the winners."""
    return _total(
        _contest(heads, rows, groups, bits, bits, [bits]) + open_masked((heads * groups.total(), bits)) for groups in levels(rows)
    )


def row_argmax(heads: int, length: int, bits: int, place_bits: int) -> Declared:
    """The same with the place as a second wire, known to both at the first level; the last level opens nothing."""
    rows = Rows(length, 1, 0)
    cost, found = Declared(), levels(rows)
    for number, groups in enumerate(found):
        last = number + 1 == len(found)
        wires = ([place_bits] if number else []) + ([] if last else [bits])
        cost += _contest(heads, rows, groups, bits, max(bits, place_bits), wires)
        if not last:
            cost += open_masked((heads * groups.total(), bits), (heads * groups.total(), place_bits))
    return cost


def exponential(count: int) -> Declared:
    """D: a one-hot, the factor, and the factor times a mask."""
    return dealt((count, 2**exp.HIGH), (count, exp.OUT_BITS), (count, exp.OUT_BITS)) + exchanged((count, exp.OUT_BITS))


def exponentials(heads: int, rows: Rows, bits: int, *, early: bool = False) -> Declared:
    """Opening, maximum, exponential, extension."""
    count, upper = heads * rows.count, soft.SCORE_BITS - soft.DROP
    return (
        open_masked((count, soft.SCORE_BITS), early=(early,))
        + dealt((count, upper))
        + row_maximum(heads, rows, upper)
        + exponential(count)
        + rescale(count, exp.OUT_BITS, exp.OUT_FRAC - soft.WEIGHT_FRAC, soft.NARROW)
        + rescale(count, soft.NARROW, 0, bits)
    )


def reciprocal(count: int, from_bits: int, from_frac: int, bound: float, bits: int, frac: int) -> Declared:
    """`count` reciprocals below `bound`, from one ring to another, by tables of 512 lines for three octaves each."""
    number = next(p for p in range(1, 9) if 511 * 8 ** (p - 1) / 128 >= bound)
    ring, wide, cost = from_frac - 7 + 3 * (number - 1) + 9, bits + rec.EXTRA, Declared()
    if ring > from_bits:
        cost = rescale(count, from_bits, 0, ring)
    chosen = [(count, number - 1)] if number > 1 else []
    cost += open_masked((count, ring)) + dealt((8 * number * count, 64), (4 * (2**number - 1) * count, wide))
    return cost + exchanged((2 * number * count, wide), *chosen)


def _inverse(heads: int, rows: Rows, from_bits: int, bits: int) -> Declared:
    """The reciprocals of the rows' sums, opened."""
    count, bound = heads * rows.number, soft.LARGEST * rows.columns
    return reciprocal(count, from_bits, soft.WEIGHT_FRAC, bound, bits, soft.RECIPROCAL_FRAC) + open_masked((count, bits))


def softmax(heads: int, rows: Rows, from_bits: int, from_frac: int, bits: int, frac: int, *, early: bool = False) -> Declared:
    """Rescaling, exponentials, their opening beside the reciprocals, rescaling."""
    count = heads * rows.count
    product = soft.WEIGHT_FRAC + soft.RECIPROCAL_FRAC
    ring = product + 3
    first = rescale(count, from_bits, from_frac - exp.FRAC, soft.SCORE_BITS, early=early)
    still_early = early and first == Declared()
    return (
        first
        + exponentials(heads, rows, ring, early=still_early)
        + open_masked((count, ring)).beside(_inverse(heads, rows, ring, ring))
        + multiply(count, ring)
        + rescale(count, ring, product - frac, bits)
    )


def attention(heads: int, width: int, rows: Rows, rings: AttentionRings) -> Declared:
    """From opened q, k and v to the normalised sums."""
    outputs = heads * rows.number * width
    sums = (
        open_masked((heads * rows.count, rings.v_bits))
        + weighted(heads, rows, width, rings.v_bits)
        + rescale(outputs, rings.v_bits, soft.WEIGHT_FRAC + rings.v_frac - rings.sum_frac, rings.product_bits)
        + open_masked((outputs, rings.product_bits))
    )
    return (
        scores(heads, rows, rings.qk_bits)
        + rescale(heads * rows.count, rings.qk_bits, rings.q_frac + rings.k_frac - exp.FRAC, soft.SCORE_BITS)
        + exponentials(heads, rows, rings.v_bits)
        + sums.beside(_inverse(heads, rows, rings.v_bits, rings.product_bits))
        + multiply(outputs, rings.product_bits)
        + rescale(outputs, rings.product_bits, rings.sum_frac + soft.RECIPROCAL_FRAC - rings.out_frac, rings.out_bits)
    )
