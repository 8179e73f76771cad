"""What protocols ask of oblivious transfer: products of a private bit and a private value, of two private values, look-ups, and ANDs.

All of it stands on random correlated transfers (`pool`), hashed to pads (`pads`): the receiver says where its choices differ from the
random ones, the sender answers with masked values. Generators of rounds; one message each way, and one before where the pool has
too few. A party passes a blank for what it does not know. Values are read modulo 2^bits, and given so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.ot.pool import Pool, carrying
from protocols.ot.spending import Scaling, Table, Triples, look_up, parts, scale
from protocols.ot.words import Words, mask, tensor_of, words_of
from protocols.ring import blank
from protocols.rounds import Item, Protocol_, parallel


class Transfers:
    """One party's end, both directions. `traced`: counts alone, for `Trace`; tensors may then be blanks."""

    def __init__(self, role: Role, traced: bool = False) -> None:
        self.role, self.traced = role, traced
        self._pools = {sender: Pool(role, sender, traced) for sender in Role}

    def __repr__(self) -> str:
        return f"Transfers(role={self.role.value}, traced={self.traced}, values hidden)"

    @property
    def spent(self) -> int:
        """Transfers that were used, of both directions."""
        return sum(pool.spent for pool in self._pools.values())

    def trace(self) -> Transfers:
        """An end that is traced and holds as many transfers: what the next calls of this one cost."""
        found = Transfers(self.role, True)
        found._pools = {sender: pool.trace() for sender, pool in self._pools.items()}
        return found

    def start(self) -> Protocol_[None]:
        """Base transfers and seeds of the silent extension, both ways; once a session, before anything else. Three rounds, 4.0 MB."""
        yield from parallel(*(self._pools[sender].start() for sender in Role))

    def correlated(self, sender: Role, choice: Tensor, delta: Tensor, bits: int, *, xor: bool = False) -> Protocol_[Tensor]:
        """Shares of choice * delta, elementwise, one shape: choice 0 or 1 at the receiver, delta at the sender; 1 <= bits <= 64.

        Additive modulo 2^bits, or by XOR. One transfer an element: 1 bit to the sender, `bits` to the receiver. Source: ePrint 2013/552,
        section 5.3. Neither party learns anything.
        """
        return (yield from self._scaled(sender, delta, choice, bits, 1, xor))

    def product(self, sender: Role, x: Tensor, y: Tensor, bits: int, y_bits: int, drop: int = 0) -> Protocol_[Tensor]:
        """Additive shares of x * y modulo 2^bits, elementwise, one shape: x at the sender, 0 <= y < 2^y_bits at the receiver.

        Source: Gilboa, Two party RSA key generation (CRYPTO 1999): a correlated transfer for each bit of y, of bits - i bits for the i-th,
        since 2^i x needs no more. y_bits transfers an element: y_bits bits to the sender, y_bits (2 bits - y_bits + 1) / 2 to the
        receiver. Neither party learns anything.
        With `drop` of x y / 2^drop, x being read modulo 2^(bits + drop) <= 2^64: what each of the lowest bits of y chooses is rounded
        to the nearest, and takes `bits` bits, so that the sum is off by half of their number at most; the others are as above.
        """
        return (yield from self._scaled(sender, x, y, bits, min(y_bits, bits + drop), False, drop))

    def _scaled(self, sender: Role, x: Tensor, y: Tensor, bits: int, y_bits: int, xor: bool, drop: int = 0) -> Protocol_[Tensor]:
        """Shares of x y for y of `y_bits` bits, by parts of bounded size."""
        assert x.shape == y.shape and 1 <= bits <= 64 - drop and y_bits >= 1 and drop >= 0
        pool, n = self._pools[sender], x.numel()
        other = self._pools[pool.receiver]
        mine = None if self.traced else words_of(x if pool.sends else y).reshape(-1)
        share = np.zeros(0 if self.traced else n, np.uint64)
        for start, stop in parts(n, y_bits):
            how = Scaling(stop - start, bits, y_bits, xor, drop)
            if mine is None:
                yield from scale(pool, other, how, share, share)
            else:
                yield from scale(pool, other, how, mine[start:stop], share[start:stop])
        return blank(*x.shape) if self.traced else tensor_of(share & mask(bits)).reshape(x.shape)

    def chosen(self, sender: Role, choice: Tensor, words: Tensor, choice_bits: int, bits: int) -> Protocol_[Tensor]:
        """The receiver's choice (...) of the sender's words (..., 2^choice_bits) of `bits` bits; the sender gets zeros.

        Source: Naor and Pinkas, Oblivious transfer with adaptive queries (CRYPTO 1999): slot j is masked by the pads that the bits
        of j choose, each slot by bits of its own. choice_bits (1 to 6) transfers an element: as many bits to the sender,
        2^choice_bits * bits to the receiver, who learns the one word, the sender nothing.
        """
        slots, n = 1 << choice_bits, choice.numel()
        assert words.shape == (*choice.shape, slots) and 1 <= choice_bits <= 6 and 1 <= bits <= 64
        pool, found = self._pools[sender], []
        index = None if self.traced or pool.sends else words_of(choice).reshape(-1) & mask(choice_bits)
        table = words_of(words).reshape(n, slots) if pool.sends and not self.traced else None
        for start, stop in parts(n, choice_bits):
            how = Table(stop - start, choice_bits, bits)
            cut = [None if x is None else x[start:stop] for x in (index, table)]
            found.append((yield from look_up(pool, self._pools[pool.receiver], how, *cut)))
        if self.traced:
            return blank(*choice.shape)
        if pool.sends:
            return torch.zeros(choice.shape, dtype=torch.int64)
        return tensor_of(np.concatenate(found) if found else np.empty(0, np.uint64)).reshape(choice.shape)

    def ands(self, x: Tensor, y: Tensor, bits: int) -> Protocol_[Tensor]:
        """XOR shares of x & y, bit by bit over words of `bits` bits, from XOR shares; one round, 2 bits each way for each bit.

        Source: Beaver's triples, of random transfers of one bit in both directions (ePrint 2013/552, section 5.1): the sender's two
        pads r_0 and r_1 are its factor r_0 ^ r_1 and its share r_0, the receiver's bit its factor, its pad its share.
        Two transfers a bit, and no message for them. Neither party learns anything.
        """
        assert x.shape == y.shape and 1 <= bits <= 64
        n, shape = x.numel(), tuple(x.shape)
        found = []
        for start, stop in parts(n, bits):
            triples = [Triples(pool, stop - start, bits) for pool in self._pools.values()]
            yield from parallel(*(each.take() for each in triples))
            if self.traced:
                yield from carrying([Item(blank(stop - start), bits), Item(blank(stop - start), bits)], *self._pools.values())
                continue
            found.append((yield from self._and(triples, words_of(x).reshape(-1)[start:stop], words_of(y).reshape(-1)[start:stop], bits)))
        if self.traced:
            return blank(*shape)
        return tensor_of(np.concatenate(found) if found else np.empty(0, np.uint64)).reshape(shape)

    def _and(self, triples: Sequence[Triples], x: Words, y: Words, bits: int) -> Protocol_[Words]:
        """One part's, by its triples: a from the direction in which this party sends, b from the other, c from both."""
        (a,) = (each.factor for each in triples if each.pool.sends)
        (b,) = (each.factor for each in triples if not each.pool.sends)
        mine = [tensor_of(x ^ a), tensor_of(y ^ b)]
        theirs = yield from carrying([Item(value, bits) for value in mine], *self._pools.values())
        d, e = (words_of(one ^ other) for one, other in zip(mine, theirs, strict=True))
        z: Words = triples[0].share ^ triples[1].share ^ a & b ^ d & b ^ e & a
        if self.role is Role.SERVER:
            z ^= d & e
        return z & mask(bits)
