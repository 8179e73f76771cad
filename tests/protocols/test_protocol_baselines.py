"""ReLU, GELU and LayerNorm: values and errors against float64, and their declared costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from protocols.activation import cost_gelu, cost_relu, cost_silu, cost_softplus, gelu, relu, silu, softplus
from protocols.declared import Declared
from protocols.norm import centred, compared, cost_layer_norm, cost_rms_norm, layer_norm, rms_norm
from protocols.party import Party, Protocol_
from protocols.ring import encode
from protocols.shares import Shares
from tests.support.two_party import Outcome, input_of, run, uniform


def check_cost(outcome: Outcome, declared: Declared) -> None:
    traced, counted = outcome.predicted, outcome.counted
    want = (declared.online, declared.rounds, declared.dealer, declared.early)
    assert want == (traced.online_bytes, traced.rounds, traced.dealer_bytes, traced.peer_offline_bytes)
    assert want == (counted["online"]["payload"], counted["online"]["rounds"], len(outcome.dealt), counted["offline"]["payload"])


@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 5, 4)])
@pytest.mark.parametrize(("compare_bits", "from_bits", "bits"), [(20, 40, 40), (13, 13, 33), (31, 40, 31), (6, 9, 6)])
def test_relu_is_exact(shape: tuple[int, ...], compare_bits: int, from_bits: int, bits: int) -> None:
    limit = 1 << (compare_bits - 2)
    x = uniform(*shape, bits=compare_bits - 1).clamp(-limit + 1, limit - 1)
    x.view(-1)[0] = limit - 1
    outcome = run(lambda p: relu(p, input_of(p, x, from_bits, 3), compare_bits=compare_bits, bits=bits))
    assert torch.equal(outcome.element(), x.clamp(min=0))
    check_cost(outcome, cost_relu(x.numel(), compare_bits, bits))


def points(frac: int) -> Tensor:
    """Everywhere near the curve, at its edges, and far away."""
    near = torch.linspace(-6, 6, 20001).double()
    edges = torch.tensor([-4.0, 4.0, 4 - 1 / 16, 0.0]).double()[:, None] + torch.arange(-2, 3) / 2.0**frac
    return encode(torch.cat([near, edges.reshape(-1), torch.linspace(-120, 120, 301).double()]), frac)


@pytest.mark.parametrize("form", ["tanh", "erf"])
@pytest.mark.parametrize("frac", [12, 10])
def test_gelu_is_within_its_bound(form: str, frac: int) -> None:
    x = points(frac)
    outcome = run(lambda p: gelu(p, input_of(p, x, 40, frac), form, compare_bits=frac + 9, bits=38))
    want = F.gelu(x / 2.0**frac, approximate="tanh" if form == "tanh" else "none")
    assert ((outcome.value() - want).abs() <= 2.1e-4 + 1.6e-4 + 2.0**-frac).all()
    check_cost(outcome, cost_gelu(x.numel(), frac + 9, 38))


@pytest.mark.parametrize("form", ["tanh", "erf"])
@pytest.mark.parametrize(("frac", "compare_bits"), [(14, 32), (12, 31), (8, 20)])
def test_gelu_at_every_point_of_its_curve_and_at_the_ends_of_its_domain(form: str, frac: int, compare_bits: int) -> None:
    """Each fixed-point number in [-4.5, 4.5], hence both sides of every piece; and the largest sizes that may be compared."""
    end = (1 << compare_bits - 2) - 1
    ends = torch.tensor([-end, 1 - end, end - 1, end, -end // 2, end // 2])
    x = torch.cat([torch.arange(-9 << frac - 1, (9 << frac - 1) + 1), ends])
    outcome = run(lambda p: gelu(p, input_of(p, x, 40, frac), form, compare_bits=compare_bits, bits=38))
    exact = x.double() / 2.0**frac
    want = F.gelu(exact, approximate="tanh" if form == "tanh" else "none")
    clamped = exact.abs() > 4 - 1 / 8  # what is beyond reads the line at the edge
    assert ((outcome.value() - want).abs() <= 2.1e-4 + 1.6e-4 * clamped + 2.0**-frac).all()


@pytest.mark.parametrize("count", [1, 5])
def test_gelu_costs(count: int) -> None:
    for bits in (20, 31, 40):
        x = torch.zeros(count)
        outcome = run(lambda p, x=x, bits=bits: gelu(p, input_of(p, x, 40, 12), "erf", compare_bits=20, bits=bits))  # type: ignore[misc]
        check_cost(outcome, cost_gelu(count, 20, bits))


@pytest.mark.parametrize(
    ("form", "frac", "compare_bits"),
    [("silu", 14, 32), ("silu", 12, 31), ("silu", 8, 20), ("softplus", 14, 32), ("softplus", 12, 31), ("softplus", 8, 20)],
)
def test_a_curve_at_every_point_and_at_the_ends_of_its_domain(form: str, frac: int, compare_bits: int) -> None:
    protocol, cost, exactly, near, far = {
        "silu": (silu, cost_silu, F.silu, 5e-4, 1.8e-3),
        "softplus": (softplus, cost_softplus, F.softplus, 2.5e-4, 2.5e-4),
    }[form]
    end = (1 << compare_bits - 2) - 1
    ends = torch.tensor([-end, 1 - end, end - 1, end, -end // 2, end // 2])
    last, step = (9, 1) if form == "silu" else (17, 3)
    x = torch.cat([torch.arange(-last << frac, (last << frac) + 1, step), ends])
    outcome = run(lambda p: protocol(p, input_of(p, x, 40, frac), compare_bits=compare_bits, bits=38))
    exact = x.double() / 2.0**frac
    error = (outcome.value() - exactly(exact)).abs()
    assert (error <= torch.where(exact.abs() < 6, near, far) + 2.0**-frac).all()
    check_cost(outcome, cost(x.numel(), compare_bits, 38))


def test_a_softplus_next_to_nothing_is_off_by_a_part_of_it() -> None:
    """With fraction bits that its input has not."""
    x = torch.cat([torch.arange(-18 << 14, 0, 37), torch.arange(0, 17 << 14, 1001)])
    outcome = run(lambda p: softplus(p, input_of(p, x, 40, 14), compare_bits=21, bits=44, frac=20))
    wanted = F.softplus(x.double() / 2.0**14)
    bound = torch.where(x < 0, 1.1e-3 * wanted + 2e-5, 2.6e-4)
    assert ((outcome.value() - wanted).abs() <= bound).all()
    check_cost(outcome, cost_softplus(x.numel(), 21, 44, more=6))


def norm_rows(rows: int, width: int) -> dict[str, Tensor]:
    """Rows of a trained model's kind: even, tiny, with an outlier of thousands, far from zero."""
    outlier = torch.randn(rows, width).double()
    outlier[:, 0] = 3000
    return {
        "even": torch.randn(rows, width).double(),
        "small": torch.randn(rows, width).double() * 0.05,
        "large": torch.randn(rows, width).double() * 60,
        "outlier": outlier,
        "shifted": torch.randn(rows, width).double() + 20,
    }


@pytest.mark.parametrize("width", [16, 64, 768])
def test_layer_norm_is_within_its_bound(width: int) -> None:
    for name, x in norm_rows(5, width).items():
        x = encode(x, 12) / 4096.0
        size = int((x - x.mean(-1, keepdim=True)).square().sum(-1).max().log2().ceil())
        size_bits = size + 2 + size % 2

        def program(party: Party, x: Tensor = x, size_bits: int = size_bits) -> Protocol_[Shares]:
            return (yield from layer_norm(party, input_of(party, x, 60, 12), epsilon=1e-5, size_bits=size_bits, bits=40))

        outcome = run(program)
        want = F.layer_norm(x, (width,), eps=1e-5)
        scale = 1 / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        bound = 2e-4 * want.abs() + 2.0**-11 * scale.clamp(max=1) + 2.0**-13 * scale + 2.0**-12
        assert ((outcome.value() - want).abs() <= bound).all(), name
        check_cost(outcome, cost_layer_norm(5, width, 60, 12, size_bits, 40))


@pytest.mark.parametrize(("width", "frac"), [(16, 12), (64, 15), (576, 15)])
def test_rms_norm_is_within_its_bound(width: int, frac: int) -> None:
    for name, x in norm_rows(5, width).items():
        x = encode(x, frac) / 2.0**frac
        size = int(x.square().sum(-1).max().log2().ceil())
        size_bits = size + 2 + size % 2

        def program(party: Party, x: Tensor = x, size_bits: int = size_bits) -> Protocol_[Shares]:
            return (yield from rms_norm(party, input_of(party, x, 62, frac), epsilon=1e-5, size_bits=size_bits, bits=40))

        outcome = run(program)
        want = F.rms_norm(x, (width,), eps=1e-5)
        scale = 1 / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        bound = 2e-4 * want.abs() + 2.0**-11 * scale.clamp(max=1) + 2.0**-12  # small rows lose nothing where they are opened
        assert ((outcome.value() - want).abs() <= bound).all(), name
        check_cost(outcome, cost_rms_norm(5, width, 62, frac, size_bits, 40))


def pairs(x: Tensor, size_bits: int, bits: int = 40) -> tuple[Tensor, Tensor]:
    """LayerNorm of rows (x, -x), in float64: the protocol's and the exact one. x / sqrt(x^2 + epsilon) is 1 but for epsilon."""
    rows = torch.stack([x, -x], -1)
    outcome = run(lambda p: layer_norm(p, input_of(p, rows, 60, 14), epsilon=1e-5, size_bits=size_bits, bits=bits))
    exact = encode(rows, 14) / 2.0**14
    return outcome.value(), F.layer_norm(exact, (2,), eps=1e-5)


@pytest.mark.parametrize("size_bits", [4, 20, 36])
def test_the_inverse_square_root_over_every_octave(size_bits: int) -> None:
    """Sums of squares from the smallest of the domain to the largest, 200 to a power of four: every entry of the table."""
    top, frac = size_bits / 2 - 0.5, min(14, (60 - size_bits) // 2)  # 2 x^2 is the sum
    x = 2.0 ** torch.linspace(max(top - 20, -frac + 6), top, 4001).double()
    x[-1] -= 2.0**-13
    x[-1] = min(float(x[-1]), 2.0**top - 2.0**-12)
    found, exact = pairs(x, size_bits)
    bound = 2e-4 + 2.0 ** (1 - frac) / x[:, None] + 2.0**-13  # of the root; of x - mean, to scale; the last rounding
    assert ((found - exact).abs() <= bound).all()


def test_layer_norm_below_its_domain_is_too_small_and_never_too_large() -> None:
    """Rows of nothing, or of next to nothing beside the largest: no garbage."""
    for size_bits in (8, 36):
        x = torch.tensor([0.0, 2.0**-14, -(2.0**-13), 2.0**-8]).double()
        found, exact = pairs(x, size_bits)
        frac = min(14, (60 - size_bits) // 2)
        assert (found.abs() <= exact.abs() + 2.0 ** (2 - frac) * (x.square() + 1e-5).rsqrt()[:, None] + 2.0**-12).all()
        assert found[0].abs().max() <= 2.0 ** (1 - frac) / 1e-5**0.5 + 2.0**-12


@pytest.mark.parametrize("size_bits", [8, 12, 20, 30, 34])
@pytest.mark.parametrize("rows", [1, 3])
def test_layer_norm_costs(rows: int, size_bits: int) -> None:
    def program(party: Party) -> Protocol_[Any]:
        yield from layer_norm(party, input_of(party, torch.randn(rows, 6), 56, 11), epsilon=1e-5, size_bits=size_bits, bits=37)

    check_cost(run(program), cost_layer_norm(rows, 6, 56, 11, size_bits, 37))


def test_sums_of_squares_are_compared_in_no_wider_a_ring_than_they_wrap_in() -> None:
    """Else one in 2^14 of small ones would be taken for the smallest."""
    for size_bits in range(-8, 33, 2):
        shift, bits = compared(size_bits)
        ring, frac = centred(size_bits)
        assert shift + bits <= ring and 2 * frac + size_bits - shift <= bits - 2
