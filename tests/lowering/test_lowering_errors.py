"""Modules that cannot be lowered: one line that says what is wrong and where, and nothing of torch's beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import privinf
from protocols.errors import ConfigError, UnsupportedOpError

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Of(nn.Module):
    """A module with a linear map in it, that does what a function says."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function, self.inner = function, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.inner, x)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


def fails(*_: object) -> None:
    raise ValueError("no such thing\nand a second line")


def within(function: Callable[[Any, Tensor], Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Of(function))


DEPENDS = "depends on a value of its inputs"
FOLLOWS = "what follows depends on the inputs"


def by_value(inner: Any, x: Tensor) -> Tensor:
    found: Tensor = inner(x) if x.sum() > 0 else x
    return found


def in_complex_numbers(_: Any, x: Tensor) -> Tensor:
    return (x * torch.full((4,), 1j)).real


BAD: dict[str, tuple[Any, Any, str]] = {  # ConfigError where the message is of the example
    "branch": (within(by_value), X, rf"cannot trace the module in 1 \(Of\), test_\w+\.py:\d+: .*{DEPENDS}"),
    "loop": (Of(lambda inner, x: inner(x) * len(range(int(x.abs().sum())))), X, DEPENDS),
    "shape": (within(lambda inner, x: inner(x)[x[:, 0] > 0]), X, rf"1 \(Of\): aten.index: {FOLLOWS}"),
    "item": (Of(lambda inner, x: inner(x) * x.sum().item()), X, f"aten.item: {FOLLOWS}"),
    "numpy": (Of(lambda inner, x: torch.from_numpy(np.tanh(x.numpy()))), X, "hands values to numpy"),
    "operators": (nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid()), X, r"\(2\): 0 \(Tanh\): aten.tanh; 2 \(Sigmoid\)"),
    "convolution": (nn.Conv2d(1, 1, 3), torch.ones(1, 1, 5, 5), r"\(Conv2d\): aten.conv2d"),
    "in place on its input": (Of(lambda inner, x: inner(x.add_(1))), X, "in place: x"),
    "in place on a buffer": (Counts(), X, "in place: calls"),
    "a dictionary": (Of(lambda inner, x: {"a": inner(x)}), X, "returns a dict; it must return one tensor"),
    "nothing": (Of(lambda inner, x: None), X, "returns None"),
    "a text": (Of(lambda inner, x: "x"), X, "returns a str"),
    "several outputs": (Of(lambda inner, x: (inner(x), x)), X, "returns 2 values"),
    "a boolean": (Of(lambda inner, x: inner(x) > 0), X, "aten.gt"),
    "complex weights": (Of(in_complex_numbers), X, "complex numbers"),
    "complex inputs": (Of(lambda inner, x: inner(x.real)), X + 0j, "complex64"),
    "random": (Of(lambda inner, x: nn.functional.dropout(inner(x), 0.5, training=True)), X, "draws random numbers"),
    "raises": (within(fails), X, r"example inputs in 1 \(Of\), \S+:\d+: ValueError: no such thing$"),
    "shapes": (nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 4)), X, r"example inputs in 1 \(Linear\).* cannot be multiplied"),
    "two inputs": (nn.Linear(4, 4), (X, X), "example inputs.* positional arguments"),
    "no module": (lambda x: x, X, r"a function is no torch\.nn\.Module"),
    "no tensor": (nn.Linear(4, 4), None, "example_inputs must be a tensor or a tuple of tensors"),
    "empty": (nn.Linear(4, 4), X[:0], "example input 0 has no elements"),
    "sparse": (nn.Linear(4, 4), X.to_sparse(), "example input 0 is no dense tensor"),
    "not finite": (nn.Linear(4, 4), X / 0, "example input 0 is not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_module_is_one_line(name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRIVINF_DEBUG", raising=False)
    module, example, message = BAD[name]
    kind = ConfigError if "example" in message or name == "no module" else UnsupportedOpError
    before = X.clone()
    with pytest.raises(kind, match=message) as found:
        privinf.lower(module, example)
    error = found.value
    assert "\n" not in str(error) and len(str(error)) < 400
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    assert capfd.readouterr() == ("", "") and torch.equal(X, before)


def test_debugging_shows_what_torch_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVINF_DEBUG", "1")
    with pytest.raises(UnsupportedOpError, match=DEPENDS) as found:
        privinf.lower(BAD["branch"][0], X)
    assert type(found.value.__cause__).__name__ == "GuardOnDataDependentSymNode"


ODD: dict[str, nn.Module] = {
    "dropout": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(),
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "without weights": Of(lambda inner, x: x + x),
    "a list of one": Of(lambda inner, x: [inner(x)]),
}


@pytest.mark.parametrize("name", ODD)
def test_what_looks_odd_and_can_be_lowered(name: str) -> None:
    privinf.lower(ODD[name], X)
