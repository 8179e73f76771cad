"""What protocols ask of oblivious transfer: products of a private bit and a private value, of two private values, look-ups, and ANDs.

All of it stands on random correlated transfers (`pool`), hashed to pads (`pads`): the receiver says where its choices differ from the
random ones, the sender answers with masked values. Generators of rounds; one message each way, and one before where the pool has
too few. A party passes a blank for what it does not know. Values are read modulo 2^bits, and given so.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.ot.pool import Pool, Taken
from protocols.ot.words import Words, mask, pack, string_words, tensor_of, unpack, words_of
from protocols.ring import blank
from protocols.rounds import Item, Protocol_, parallel

_ONE, _ZERO = np.uint64(1), np.uint64(0)


class Transfers:
    """One party's end, both directions. `traced`: counts alone, for `Trace`; tensors may then be blanks."""

    def __init__(self, role: Role, traced: bool = False) -> None:
        self.role, self.traced = role, traced
        self._pools = {sender: Pool(role, sender, traced) for sender in Role}

    def __repr__(self) -> str:
        return f"Transfers(role={self.role.value}, traced={self.traced}, values hidden)"

    def trace(self) -> Transfers:
        """An end that is traced and holds as many transfers: what the next calls of this one cost."""
        found = Transfers(self.role, True)
        found._pools = {sender: pool.trace() for sender, pool in self._pools.items()}
        return found

    def start(self) -> Protocol_[None]:
        """Base transfers and seeds of the silent extension, both ways; once a session, before anything else. Two rounds, 2.4 MB."""
        yield from parallel(*(self._pools[sender].start() for sender in Role))

    def correlated(self, sender: Role, choice: Tensor, delta: Tensor, bits: int, *, xor: bool = False) -> Protocol_[Tensor]:
        """Shares of choice * delta, elementwise, one shape: choice 0 or 1 at the receiver, delta at the sender; 1 <= bits <= 64.

        Additive modulo 2^bits, or by XOR. One transfer an element: 1 bit to the sender, `bits` to the receiver. Source: ePrint 2013/552,
        section 5.3. Neither party learns anything.
        """
        return (yield from self._scaled(sender, delta, choice, bits, 1, xor))

    def product(self, sender: Role, x: Tensor, y: Tensor, bits: int, y_bits: int) -> Protocol_[Tensor]:
        """Additive shares of x * y modulo 2^bits, elementwise, one shape: x at the sender, 0 <= y < 2^y_bits at the receiver.

        Source: Gilboa, Two party RSA key generation (CRYPTO 1999): a correlated transfer for each bit of y, of bits - i bits for the i-th,
        since 2^i x needs no more. y_bits transfers an element: y_bits bits to the sender, y_bits (2 bits - y_bits + 1) / 2 to the
        receiver. Neither party learns anything.
        """
        return (yield from self._scaled(sender, x, y, bits, min(y_bits, bits), False))

    def _scaled(self, sender: Role, x: Tensor, y: Tensor, bits: int, y_bits: int, xor: bool) -> Protocol_[Tensor]:
        """Shares of x y for y of `y_bits` bits; transfers in the order of bits, for each bit all elements."""
        assert x.shape == y.shape and 1 <= bits <= 64 and y_bits >= 1
        pool, n = self._pools[sender], x.numel()
        if not n:
            return torch.zeros(x.shape, dtype=torch.int64)
        taken = yield from pool.take(n * y_bits)
        by_bit = [words_of(y).reshape(-1) >> np.uint64(i) & _ONE for i in range(y_bits)] if not (pool.sends or self.traced) else []
        flips = yield from self._choose(pool, taken, by_bit, n * y_bits)
        sizes = [string_words(n, bits - i) for i in range(y_bits)]
        if self.traced:
            yield [pool.item(sender, None, sum(sizes))]
            return blank(*x.shape)
        pads = pool.pads(taken)
        share, message = np.zeros(n, np.uint64), []
        for i in range(y_bits if pool.sends else 0):
            near, far = _swapped(pads[:, i * n : (i + 1) * n], flips[i * n : (i + 1) * n])
            value = words_of(x).reshape(-1)
            message.append(pack(near ^ far ^ value if xor else near + far + value, bits - i))
            share += near if xor else (_ZERO - near) << np.uint64(i)
        (answer,) = yield [pool.item(sender, np.concatenate(message) if message else None, sum(sizes))]
        at = 0
        for i in range(0 if pool.sends else y_bits):
            pad, bit = pads[0, i * n : (i + 1) * n], by_bit[i]
            value = unpack(words_of(answer)[at : at + sizes[i]], n, bits - i)
            share += pad ^ value & _ZERO - bit if xor else np.where(bit == _ONE, value - pad, pad) << np.uint64(i)
            at += sizes[i]
        return tensor_of(share & mask(bits)).reshape(x.shape)

    def chosen(self, sender: Role, choice: Tensor, words: Tensor, choice_bits: int, bits: int) -> Protocol_[Tensor]:
        """The receiver's choice (...) of the sender's words (..., 2^choice_bits) of `bits` bits; the sender gets zeros.

        Source: Naor and Pinkas, Oblivious transfer with adaptive queries (CRYPTO 1999): slot j is masked by the pads that the bits
        of j choose, each slot by bits of its own. choice_bits (1 to 6) transfers an element: as many bits to the sender,
        2^choice_bits * bits to the receiver, who learns the one word, the sender nothing.
        """
        slots, n = 1 << choice_bits, choice.numel()
        assert words.shape == (*choice.shape, slots) and 1 <= choice_bits <= 6 and 1 <= bits <= 64
        pool, m = self._pools[sender], choice_bits
        if not n:
            return torch.zeros(choice.shape, dtype=torch.int64)
        per = min(slots, 1 << (64 // bits).bit_length() - 1)  # slots that one word holds
        groups, width = slots // per, per * bits
        taken = yield from pool.take(n * m)
        index = words_of(choice).reshape(-1) & mask(m) if not (pool.sends or self.traced) else np.empty(0, np.uint64)
        by_bit = [index >> np.uint64(k) & _ONE for k in range(m)]
        flips = yield from self._choose(pool, taken, by_bit, n * m)
        size = string_words(n * groups, width)
        if self.traced:
            yield [pool.item(sender, None, size)]
            return blank(*choice.shape)
        pads = pool.pads(taken, groups).reshape(-1, m, n, groups)
        if pool.sends:
            out = _gathered(words_of(words).reshape(n, groups, per) & mask(bits), bits)
            for k in range(m):
                near, far = _swapped(pads[:, k], flips[k * n : (k + 1) * n, None])
                out ^= near ^ (near ^ far) & _ones(k, groups, per, bits)
            yield [pool.item(sender, pack(out.reshape(-1), width), size)]
            return tensor_of(np.zeros(n, np.uint64)).reshape(choice.shape)
        (answer,) = yield [pool.item(sender, None, size)]
        rows = unpack(words_of(answer), n * groups, width).reshape(n, groups)
        group, slot = index // np.uint64(per), index % np.uint64(per)
        place = (np.arange(n), group.astype(np.int64))
        found = rows[place]
        for k in range(m):
            found = found ^ pads[0, k][place]
        return tensor_of(found >> slot * np.uint64(bits) & mask(bits)).reshape(choice.shape)

    def ands(self, x: Tensor, y: Tensor, bits: int) -> Protocol_[Tensor]:
        """XOR shares of x & y, bit by bit over words of `bits` bits, from XOR shares; one round, 2 bits each way for each bit.

        Source: Beaver's triples, of random transfers of one bit in both directions (ePrint 2013/552, section 5.1): the sender's two
        pads r_0 and r_1 are its factor r_0 ^ r_1 and its share r_0, the receiver's bit its factor, its pad its share.
        Two transfers a bit, and no message for them. Neither party learns anything.
        """
        assert x.shape == y.shape and 1 <= bits <= 64
        n = x.numel()
        if not n:
            return torch.zeros(x.shape, dtype=torch.int64)
        takes = yield from parallel(*(self._pools[sender].take(n * bits) for sender in Role))
        shape = tuple(x.shape)
        if self.traced:
            yield [Item(blank(*shape), bits), Item(blank(*shape), bits)]
            return blank(*shape)
        a = b = c = np.zeros(n, np.uint64)
        for pool, taken in zip(self._pools.values(), takes, strict=True):
            pads = pool.pads(taken)
            if pool.sends:
                a = _columns(pads[0] ^ pads[1], n, bits)
                c = c ^ _columns(pads[0], n, bits)
            else:
                b = _columns(taken.blocks[:, 0], n, bits)
                c = c ^ _columns(pads[0], n, bits)
        c = c ^ a & b
        mine = [tensor_of(words_of(x).reshape(-1) ^ a).reshape(shape), tensor_of(words_of(y).reshape(-1) ^ b).reshape(shape)]
        theirs = yield [Item(value, bits) for value in mine]
        d, e = (words_of(one ^ other).reshape(-1) for one, other in zip(mine, theirs, strict=True))
        z = c ^ d & b ^ e & a
        if self.role is Role.SERVER:
            z ^= d & e
        return tensor_of(z & mask(bits)).reshape(shape)

    def _choose(self, pool: Pool, taken: Taken, by_bit: list[Words], count: int) -> Protocol_[Words]:
        """The receiver says which of its choices differ from the random ones; the sender learns that alone."""
        message = None
        if not (pool.sends or self.traced):
            message = pack(np.concatenate(by_bit) ^ taken.blocks[:, 0], 1)
        (flips,) = yield [pool.item(pool.receiver, message, string_words(count, 1))]
        return unpack(words_of(flips), count, 1) if pool.sends and not self.traced else np.empty(0, np.uint64)


def _swapped(pads: Words, flips: Words) -> tuple[Words, Words]:
    """The pads of choice 0 and of choice 1, from those of the random bits 0 and 1."""
    change = (pads[0] ^ pads[1]) & _ZERO - flips
    return pads[0] ^ change, pads[1] ^ change


def _columns(values: Words, n: int, bits: int) -> Words:
    """The lowest bits of n * bits values to n words, the values of a bit's place side by side."""
    planes = values.reshape(bits, n) & _ONE
    out = np.zeros(n, np.uint64)
    for place, plane in enumerate(planes):
        out |= plane << np.uint64(place)
    return out


def _gathered(slots: Words, bits: int) -> Words:
    """Slots (n, groups, per) side by side in words (n, groups)."""
    out = np.zeros(slots.shape[:2], np.uint64)
    for place in range(slots.shape[2]):
        out |= slots[..., place] << np.uint64(place * bits)
    return out


def _ones(k: int, groups: int, per: int, bits: int) -> Words:
    """Ones where the slots are whose number has the bit k, (groups,)."""
    found = [sum(int(mask(bits)) << s * bits for s in range(per) if (g * per + s) >> k & 1) for g in range(groups)]
    return np.array(found, np.uint64)
