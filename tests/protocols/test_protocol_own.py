"""A protocol that is defined here, with its correlation and its cost: it runs, costs what it declares, and takes nothing else."""

from __future__ import annotations

import math

import torch

from protocols.correlations import Bits, Fit, Kind, Known, Number, Part, Related, Shape, Shapes, Tensors, fits
from protocols.declared import Declared, dealt
from protocols.opening import cost_open_masked, open_masked
from protocols.party import Party, Protocol_
from protocols.ring import blank, known
from protocols.shares import Shares
from tests.support.two_party import input_of, run, uniform


class OwnCubeMask(Kind, frozen=True):
    """Shares of r^2 and r^3 for a wire's mask r."""

    wire: Number
    shape: Shape
    bits: Bits

    def shared_parts(self) -> tuple[Part, ...]:
        return Part(self.shape, self.bits), Part(self.shape, self.bits)

    def fit(self, shapes: Shapes) -> Fit:
        fits(shapes.mask(self.wire) == self.shape)
        return Fit((self.shape, self.shape), None, 2 * math.prod(self.shape))

    def relation(self, known: Known, server: Tensors, client: Tensors, shares: Tensors) -> Related:
        r = known.mask(self.wire)
        return (r * r, r * r * r), None


Kind.registry.pop("OwnCubeMask")  # other tests go through the kinds of the release


def own_cube(party: Party, x: Shares, bits: int) -> Protocol_[Shares]:
    """x^3 of any shape, in Z_2^bits, the fraction bits times three.

    Steps: x is opened masked; x^3 = (X - r)^3 = X^3 - 3 X^2 r + 3 X r^2 - r^3, linear in the shares of r, r^2 and r^3.
    Domain: |x^3| < 2^(bits - 1). Exact. Rounds: 1. Bits: `bits` each way. Learns: the uniform X, both.
    """
    (wire,) = yield from open_masked(party, [x.narrow(bits)])
    square, cube = party.take(OwnCubeMask(wire.name, wire.shape, bits)).shares
    if not known(wire.masked):
        return Shares(blank(*x.shape), bits, 3 * x.frac)
    big = wire.masked
    value = 3 * big * square - cube - 3 * big * big * wire.mask
    return Shares(value + big**3 if party.is_server else value, bits, 3 * x.frac)


def cost_own_cube(count: int, bits: int) -> Declared:
    """An opening, and two shares of each element from D."""
    return cost_open_masked((count, bits)) + dealt((count, bits), (count, bits))


def test_it_is_exact_and_costs_what_it_declares() -> None:
    x = uniform(4, 7, bits=12) - 2**11

    def program(party: Party) -> Protocol_[Shares]:
        return (yield from own_cube(party, input_of(party, x, 40, 0), 38))

    outcome, declared = run(program), cost_own_cube(x.numel(), 38)
    assert torch.equal(outcome.element(), x**3)
    predicted, counted = outcome.predicted, outcome.counted["online"]
    assert (declared.online, declared.rounds) == (predicted.online_bytes, predicted.rounds) == (counted["payload"], counted["rounds"])
    assert declared.dealer == predicted.dealer_bytes == len(outcome.dealt)
    assert {type(kind).__name__ for kind in outcome.kinds} == {"Mask", "OwnCubeMask"}
