"""The toolbox over shared secrets: carries, bits of a sum, one-hots, bits times values, products. All are protocols of both parties.

Everything is exact, and what either party learns is what the transfers show it: uniform words. Costs are given for one element,
both directions, beside the transfers' own: a correlated transfer of l bits takes l + 1 bits and two messages, an AND of shared bits
4 bits and one round. Values that are blank stay blank, so that all of it runs on shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.ring import blank, parity, reduce, shift_right
from protocols.rounds import Protocol_, parallel
from protocols.sources.two_party.pair import Pair, Secret
from protocols.sources.two_party.sketch import sketch

__all__ = [
    "Secret",
    "and_",
    "bit_to_arithmetic",
    "bits_of_sum",
    "carry",
    "crossed",
    "entries",
    "one_hot",
    "one_hot_of_sum",
    "product",
    "select",
    "select_words",
    "sign_value",
    "times_sign",
    "upper",
]

RIPPLE = 31  # bits of a sum up to which the carry ripples, a round a bit: a quarter of the bytes
QUICK = 5  # the same where rounds count more
WORD_BITS = 6  # a one-hot of so many bits is one word


def bit(x: Tensor, at: int) -> Tensor:
    """A bit of every word."""
    return (x >> at) & 1


def crossed(pair: Pair, protocol: Callable[[Role], Protocol_[Tensor]], *, xor: bool = False) -> Protocol_[Tensor]:
    """The sum (or XOR) of a transfer in each direction, `protocol(sender)`, side by side."""
    first, second = yield from parallel(protocol(Role.SERVER), protocol(Role.CLIENT))
    shared: Tensor = first ^ second if xor else first + second
    return shared


def one_sided(pair: Pair, sender: Role, at_sender: Tensor, at_receiver: Tensor) -> tuple[Tensor, Tensor]:
    """(sender's value, receiver's value) as this party passes them: its own, and a blank for the peer's."""
    if pair.role is sender:
        return at_sender, blank(*at_receiver.shape)
    return blank(*at_sender.shape), at_receiver


def and_(pair: Pair, x: Secret, y: Secret) -> Protocol_[Secret]:
    """x & y, bit by bit, of XOR-shared words of one width. One round; 4 bits a bit."""
    assert x.xor and y.xor and x.bits == y.bits
    value = yield from pair.transfers.ands(x.value, y.value, x.bits)
    return Secret(value, x.bits, True)


def _private(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """This party's XOR shares of (S's number, C's number), of which its own is x."""
    zero = torch.zeros_like(x)
    return (x, zero) if pair.is_server else (zero, x)


def _ripple(pair: Pair, x: Tensor, bits: int) -> Protocol_[tuple[Tensor, Tensor]]:
    """(words of the carries into bits 0 .. bits - 1, the carry out) of the sum of both parties' numbers below 2^bits; `bits` rounds.

    The carry into the next bit is c ^ (a ^ c)(b ^ c): one AND a bit.
    """
    a, b = _private(pair, x)
    into, c = torch.zeros_like(x), torch.zeros_like(x)
    for at in range(bits):
        step = yield from pair.transfers.ands(bit(a, at) ^ c, bit(b, at) ^ c, 1)
        c = c ^ step
        if at + 1 < bits:
            into = into | (c << (at + 1))
    return into, c


def _runs(bits: int, level: int) -> list[tuple[int, int, int]]:
    """(first node, nodes, the place that they look at) of each run of a level of Sklansky's adder."""
    half = 1 << level
    return [(at, min(half, bits - at), at - 1) for at in range(half, bits, 2 * half)]


def _sklansky(pair: Pair, x: Tensor, bits: int) -> Protocol_[tuple[Tensor, Tensor]]:
    """The same in 1 + log2(bits) rounds, for about log2(bits) ANDs a bit: all nodes of a level are the bits of one word."""
    a, b = _private(pair, x)
    propagate = x  # a ^ b, shared as it is held
    generate = yield from pair.transfers.ands(a, b, bits)
    level = 0
    while 1 << level < bits:
        runs = _runs(bits, level)
        # G_i ^= P_i G_j for every node; P_i &= P_j where a later level looks at it
        tasks = [(run, generate) for run in runs] + [(run, propagate) for run in runs if run[0] >= 2 << level]
        left, right, width = torch.zeros_like(x), torch.zeros_like(x), 0
        for (first, count, looks), word in tasks:
            ones = (1 << count) - 1
            left = left | (((propagate >> first) & ones) << width)
            right = right | ((-bit(word, looks) & ones) << width)
            width += count
        done = yield from pair.transfers.ands(left, right, width)
        width, extra, updated = 0, torch.zeros_like(x), propagate
        for (first, count, _), word in tasks:
            ones = (1 << count) - 1
            piece = ((done >> width) & ones) << first
            if word is generate:
                extra = extra | piece
            else:
                updated = (updated & ~(ones << first)) | piece
            width += count
        generate, propagate = generate ^ extra, updated
        level += 1
    return reduce(generate << 1, bits), bit(generate, bits - 1)


def _added(pair: Pair, x: Tensor, bits: int, quick: bool = False) -> Protocol_[tuple[Tensor, Tensor]]:
    x = reduce(x, bits)
    return (yield from (_ripple if bits <= (QUICK if quick else RIPPLE) else _sklansky)(pair, x, bits))


def carry(pair: Pair, x: Tensor, bits: int) -> Protocol_[Secret]:
    """Whether the sum of both parties' numbers, each below 2^bits (reduced here), is 2^bits or more; an XOR-shared bit.

    Rounds: `bits` up to 31, then 1 + log2(bits). ANDs: `bits`, or about bits log2(bits).
    """
    assert 0 < bits < 64
    _, out = yield from _added(pair, x, bits)
    return Secret(out, 1, True)


def bits_of_sum(pair: Pair, x: Secret, bits: int, *, quick: bool = False) -> Protocol_[Secret]:
    """The bits of an additive secret modulo 2^bits, an XOR-shared word. Costs: those of `carry` for one bit less.

    `quick`: of few elements for which many others would wait, in 1 + log2(bits) rounds from 6 bits on.
    """
    assert not x.xor and bits <= x.bits
    own = reduce(x.value, bits)
    if bits == 1:
        return Secret(own, 1, True)
    into, out = yield from _added(pair, own, bits - 1, quick)
    return Secret(own ^ into ^ (out << (bits - 1)), bits, True)


def select_words(pair: Pair, choice: Secret, words: Secret) -> Protocol_[Secret]:
    """choice * words for an XOR-shared bit and XOR-shared words. Two messages; 2 (bits + 1) bits."""
    assert choice.xor and words.xor

    def cross(sender: Role) -> Protocol_[Tensor]:
        delta, chosen = one_sided(pair, sender, words.value, choice.value)
        return pair.transfers.correlated(sender, chosen, delta, words.bits, xor=True)

    shared = yield from crossed(pair, cross, xor=True)
    return Secret(shared ^ (choice.value * words.value), words.bits, True)


def _halved(pair: Pair, hot: Tensor, size: int, choice: Tensor) -> Protocol_[Tensor]:
    """The entries of a one-hot of `size` entries (a word) where the choice is 1.

    Entry 0 does not travel: the entries' sum is the choice, since a one-hot's is 1.
    """
    if size == 1:
        return choice
    rest = yield from select_words(pair, Secret(choice, 1, True), Secret(shift_right(hot, 1, size), size - 1, True))
    return (rest.value << 1) | (choice ^ parity(rest.value, 64))


def doubled(pair: Pair, hot: Tensor, size: int, choice: Tensor) -> Protocol_[Tensor]:
    """The one-hot of twice as many entries, by the next bit of its index. Two messages; one transfer of size - 1 bits each way."""
    upper_half = yield from _halved(pair, hot, size, choice)
    return (hot ^ upper_half) | (upper_half << size)


def one_hot(pair: Pair, index: Secret, width: int, at: int = 0) -> Protocol_[Secret]:
    """The one-hot of bits at .. at + width - 1 of XOR-shared words: a word of 2^width bits, or (..., 2^(width - 6)) words of 64.

    By doubling, bit by bit, each a bit times a word both ways: 2 (width - 1) transfers of 2^(width + 1) - 4 bits in all up to
    6 bits, in 2 (width - 1) messages. A wider one is the lower word times each entry of the one-hot of the upper bits.
    """
    assert index.xor and at + width <= index.bits
    if width > WORD_BITS:
        low, high = yield from parallel(one_hot(pair, index, WORD_BITS, at), one_hot(pair, index, width - WORD_BITS, at + WORD_BITS))
        return (yield from _tensor(pair, low, entries(high, width - WORD_BITS)))
    x = bit(index.value, at)
    hot = (x << 1) | (x ^ 1 if pair.is_server else x)
    for k in range(1, width):
        hot = yield from doubled(pair, hot, 1 << k, bit(index.value, at + k))
    return Secret(hot, 1 << width, True)


def one_hot_of_sum(pair: Pair, own: Tensor, width: int) -> Protocol_[Secret]:
    """The one-hot of the sum of both parties' numbers modulo 2^width, a word of 2^width bits, width at most 6; or 7, two words (2, ...).

    As `one_hot`, the carry into a bit being found while the one-hot of the bits below it doubles: 2 width - 1 rounds.
    """
    assert 1 <= width <= WORD_BITS + 1
    a, b = _private(pair, own)
    x, into = bit(own, 0), torch.zeros_like(own)
    hot = (x << 1) | (x ^ 1 if pair.is_server else x)
    step = (yield from pair.transfers.ands(bit(a, 0), bit(b, 0), 1)) if width > 1 else into
    for k in range(1, width):
        into = into ^ step
        doubling = _halved(pair, hot, 1 << k, bit(own, k) ^ into)
        if k + 1 < width:
            upper_half, step = yield from parallel(doubling, pair.transfers.ands(bit(a, k) ^ into, bit(b, k) ^ into, 1))
        else:
            upper_half = yield from doubling
        if k == WORD_BITS:
            return Secret(torch.stack([hot ^ upper_half, upper_half]), 64, True)
        hot = (hot ^ upper_half) | (upper_half << (1 << k))
    return Secret(hot, 1 << width, True)


def entries(hot: Secret, width: int) -> Tensor:
    """(..., 2^width): the bits of a one-hot as `one_hot` makes it, one by one."""
    each = min(hot.bits, 64)
    if hot.value.is_meta:
        shape = tuple(hot.value.shape)
        return sketch((*shape[:-1], shape[-1] * each) if width > WORD_BITS else (*shape, each))
    bits = torch.arange(each, device=hot.value.device)
    return ((hot.value[..., None] >> bits) & 1).flatten(-2) if width > WORD_BITS else (hot.value[..., None] >> bits) & 1


def _tensor(pair: Pair, low: Secret, high: Tensor) -> Protocol_[Secret]:
    """The words low * high[..., j] for each entry of another one-hot; the last is what the others leave of their sum, low itself.

    And bit 0 of each, which does not travel, is what the others leave of the sum of its bits, the entry itself.
    """
    count = high.shape[-1] - 1
    rest = shift_right(low.value, 1, 64)[..., None].expand(*low.shape, count)
    done = yield from select_words(pair, Secret(high[..., :count], 1, True), Secret(rest, 63, True))
    words = (done.value << 1) | (high[..., :count] ^ parity(done.value, 64))
    last = low.value
    for k in range(count):
        last = last ^ words[..., k]
    return Secret(torch.cat([words, last[..., None]], -1), 64, True)


def bit_to_arithmetic(pair: Pair, x: Secret, bits: int) -> Protocol_[Secret]:
    """An XOR-shared bit as an additive secret modulo 2^bits: b_S + b_C - 2 b_S b_C. Two messages, one transfer of bits - 1."""
    assert x.xor and x.bits == 1
    if bits == 1:
        return Secret(x.value, 1)
    delta, choice = one_sided(pair, Role.SERVER, x.value, x.value)
    shared = yield from pair.transfers.correlated(Role.SERVER, choice, delta, bits - 1)
    return Secret(reduce(x.value - 2 * shared, bits), bits)


def select(pair: Pair, choice: Secret, x: Secret, bits: int) -> Protocol_[Secret]:
    """choice * x for an XOR-shared bit and an additive secret, modulo 2^bits. Two messages; two transfers of `bits`."""
    assert choice.xor and choice.bits == 1 and not x.xor and bits <= x.bits
    own, b = reduce(x.value, bits), choice.value

    def cross(sender: Role) -> Protocol_[Tensor]:
        # of b x_sender = b_sender x_sender + b_receiver (1 - 2 b_sender) x_sender the second
        delta, chosen = one_sided(pair, sender, reduce((1 - 2 * b) * own, bits), b)
        return pair.transfers.correlated(sender, chosen, delta, bits)

    shared = yield from crossed(pair, cross)
    return Secret(reduce(shared + b * own, bits), bits)


def times_sign(pair: Pair, sign: Tensor, x: Secret) -> Protocol_[Secret]:
    """s_S s_C x for an additive secret and signs (1 or -1), of which each party knows its own; the sign's shape may broadcast.

    Of s_S s_C x_sender, the receiver's sign chooses between one value of the sender's and its negative. Two messages; two transfers
    of `bits`: with one bit less the lowest bit of a share would be that of the party's share of x.
    """
    assert not x.xor
    own, negative = sign * x.value, ((1 - sign) >> 1).expand(x.shape)

    def cross(sender: Role) -> Protocol_[Tensor]:
        delta, choice = one_sided(pair, sender, reduce(-2 * own, x.bits), negative)
        return pair.transfers.correlated(sender, choice, delta, x.bits)

    shared = yield from crossed(pair, cross)
    return Secret(reduce(own + shared, x.bits), x.bits)


def sign_value(pair: Pair, sign: Tensor, bits: int) -> Protocol_[Secret]:
    """s_S s_C itself: one transfer of `bits`."""
    delta, choice = one_sided(pair, Role.SERVER, reduce(-2 * sign, bits), (1 - sign) >> 1)
    shared = yield from pair.transfers.correlated(Role.SERVER, choice, delta, bits)
    return Secret(reduce(shared + sign if pair.is_server else shared, bits), bits)


def product(pair: Pair, x: Secret, y: Secret, bits: int) -> Protocol_[Secret]:
    """x * y of additive secrets of one shape, modulo 2^bits: both cross terms, bit by bit of C's and of S's y."""
    assert not x.xor and not y.xor and bits <= min(x.bits, y.bits)
    a, b = reduce(x.value, bits), reduce(y.value, bits)

    def cross(sender: Role) -> Protocol_[Tensor]:
        first, second = one_sided(pair, sender, a, b)
        return pair.transfers.product(sender, first, second, bits, bits)

    shared = yield from crossed(pair, cross)
    return Secret(reduce(shared + a * b, bits), bits)


def upper(pair: Pair, x: Secret, shift: int, bits: int) -> Protocol_[Secret]:
    """x >> shift of the representative in [0, 2^x.bits), modulo 2^bits, exactly: both parties' own, and the carry from below."""
    assert not x.xor and bits <= x.bits - shift, (bits, x.bits, shift)
    own = reduce(shift_right(x.value, shift, x.bits), bits)
    if shift == 0:
        return Secret(own, bits)
    wrapped = yield from carry(pair, x.value, shift)
    extra = yield from bit_to_arithmetic(pair, wrapped, bits)
    return Secret(reduce(own + extra.value, bits), bits)


def joined(secrets: Sequence[Secret]) -> Secret:
    """Bits side by side in one word, lowest first; XOR-shared."""
    value, at = secrets[0].value, secrets[0].bits
    for secret in secrets[1:]:
        value, at = value | (secret.value << at), at + secret.bits
    return Secret(value, at, True)
