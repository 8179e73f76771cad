"""An insecure twin of `protocols.ot.transfers.Transfers` for tests: the same methods and results, by sending values in the clear.

It is for testing what stands on transfers before, and faster than, with the real ones. Results are uniform shares, as theirs are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from protocols.correlations import Role
from protocols.prg import Prg, derive, new_seed
from protocols.ring import blank, known, reduce, shift_right
from protocols.rounds import Item, Protocol_


class PlainTransfers:
    """One party's end; see the module's text."""

    def __init__(self, role: Role, traced: bool = False) -> None:
        self.role, self.traced = role, traced
        self._own, self._common, self._count = Prg(new_seed()), Prg(derive(bytes(16), "twin")), 0

    def _draw(self, prg: Prg, like: Tensor, bits: int) -> Tensor:
        self._count += 1  # at both parties alike
        return prg.stream(self._count).uniform(tuple(like.shape), bits)

    def start(self) -> Protocol_[None]:
        """Nothing is needed."""
        return
        yield

    def _answered(
        self, sender: Role, question: Tensor, question_bits: int, shape: tuple[int, ...], bits: int, answer: Any
    ) -> Protocol_[Tensor]:
        """The receiver's question goes in the clear; the sender sends answer(question) less a share that it draws."""
        sends = self.role is sender
        (asked,) = yield [Item(question, question_bits, from_server=sender is Role.CLIENT, from_client=sender is Role.SERVER)]
        share = value = blank(*shape)
        if sends and not self.traced:
            share, value = answer(asked)
        elif not self.traced:
            self._count += 1
        (got,) = yield [Item(value, bits, from_server=sender is Role.SERVER, from_client=sender is Role.CLIENT)]
        return share if sends else got

    def correlated(self, sender: Role, choice: Tensor, delta: Tensor, bits: int, *, xor: bool = False) -> Protocol_[Tensor]:
        """See `TransfersEnd`."""

        def answer(asked: Tensor) -> tuple[Tensor, Tensor]:
            assert known(delta), "delta is known at the sender"
            share = self._draw(self._own, delta, bits)
            return share, asked * delta ^ share if xor else reduce(asked * delta - share, bits)

        assert choice.shape == delta.shape
        return (yield from self._answered(sender, choice, 1, tuple(delta.shape), bits, answer))

    def product(self, sender: Role, x: Tensor, y: Tensor, bits: int, y_bits: int, drop: int = 0) -> Protocol_[Tensor]:
        """See `TransfersEnd`."""

        def answer(asked: Tensor) -> tuple[Tensor, Tensor]:
            assert known(x), "x is known at the sender"
            share = self._draw(self._own, x, bits)
            low = asked & ((1 << drop) - 1)
            value = (asked >> drop) * x
            for i in range(drop):
                value = value + ((low >> i) & 1) * ((shift_right(x, drop - 1 - i, bits + drop) + 1) >> 1)
            return share, reduce(value - share, bits)

        assert x.shape == y.shape
        return (yield from self._answered(sender, y, y_bits, tuple(x.shape), bits, answer))

    def chosen(self, sender: Role, choice: Tensor, words: Tensor, choice_bits: int, bits: int) -> Protocol_[Tensor]:
        """See `TransfersEnd`."""

        def answer(asked: Tensor) -> tuple[Tensor, Tensor]:
            return asked * 0, words.gather(-1, asked[..., None])[..., 0]

        assert words.shape == (*choice.shape, 1 << choice_bits)
        return (yield from self._answered(sender, choice, choice_bits, tuple(choice.shape), bits, answer))

    def ands(self, x: Tensor, y: Tensor, bits: int) -> Protocol_[Tensor]:
        """See `TransfersEnd`."""
        assert x.shape == y.shape
        a, b = yield [Item(x, bits), Item(y, bits)]
        if not known(x, y):
            return blank(*x.shape)
        share = self._draw(self._common, x, bits)
        return reduce((x ^ a) & (y ^ b), bits) ^ share if self.role is Role.SERVER else share
