"""Every public function, class and method says what it is for; a method that overrides another inherits what that says."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import FunctionType, ModuleType

import pytest

ROOMS = ("privinf", "protocols", "benchmarks")


def modules(package: str) -> Iterator[ModuleType]:
    """All of a package that can be imported here; a module for an optional backend may not."""
    top = importlib.import_module(package)
    for found in pkgutil.walk_packages(top.__path__, f"{package}."):
        try:
            yield importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            assert (error.name or "").partition(".")[0] not in ROOMS


def is_told(cls: type, name: str) -> bool:
    """Whether a method, or one that it overrides, has a docstring; what a library's class has is the library's to tell."""
    bases = [base for base in cls.__mro__ if name in vars(base)]
    return any(inspect.getdoc(vars(base)[name]) or base.__module__.partition(".")[0] not in ROOMS for base in bases)


def untold(cls: type) -> Iterator[str]:
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if inspect.isclass(member) and member.__qualname__ == f"{cls.__qualname__}.{name}":
            yield from untold(member)
        elif isinstance(member, property | classmethod | staticmethod | FunctionType) and not is_told(cls, name):
            yield f"{cls.__module__}.{cls.__qualname__}.{name}"


@pytest.mark.parametrize("package", ROOMS)
def test_every_public_method_is_told(package: str) -> None:
    missing: list[str] = []
    for module in modules(package):
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and not name.startswith("_"):
                missing += untold(cls)
    assert missing == []
