"""A cluster that is this process: its workers do what they are asked at once, and any of them can be lost before or after any call.

What `privinf.session.cluster.Remote` is on Ray; what differs there, the tests that need Ray see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

from privinf.session.cluster import Lost

Loses = Callable[[str, int], str]
"""Told a method's name and how many calls of it there were before; "before" or "after": the worker is lost then."""


@dataclass
class Machines:
    """All of it. `made` are the objects of the workers, the lost ones too."""

    loses: Loses = lambda method, count: ""
    made: list[Any] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        """This cluster, for a module that would connect to one."""
        monkeypatch.setattr(module, "connect", self.connect)
        monkeypatch.setattr(module, "Remote", Here)

    def connect(self, address: str, seconds: float) -> Machines:
        """In the place of `cluster.connect`."""
        return self

    @staticmethod
    def wait(refs: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]]:
        """As Ray's."""
        return refs[:1], refs[1:]

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        """As Ray's."""
        return {"CPU": 2.0}

    def fate(self, method: str) -> str:
        """Of the worker, at this call."""
        count = self.calls.get(method, 0)
        self.calls[method] = count + 1
        return self.loses(method, count)


class Here:
    """In the place of `cluster.Remote`."""

    def __init__(self, machines: Machines, kind: type, given: tuple[Any, ...], cpus: float = 1.0, at_a_time: int = 1) -> None:
        self._machines, self._object, self._lost = machines, kind(*given), False
        self._answers: dict[int, Callable[[], Any]] = {}
        self._refs = itertools.count(id(self) << 20)
        machines.made.append(self._object)

    def _call(self, method: str, given: tuple[Any, ...]) -> Any:
        fate = "before" if self._lost else self._machines.fate(method)
        if fate == "before":
            self._lost = True
            raise Lost
        found = getattr(self._object, method)(*given)
        if fate == "after":
            self._lost = True
            raise Lost
        return found

    def begin(self, method: str, *given: Any) -> int:
        ref = next(self._refs)
        try:
            found = self._call(method, given)
        except BaseException as error:
            raised = error

            def answer() -> Any:
                raise raised
        else:

            def answer() -> Any:
                return found

        self._answers[ref] = answer
        return ref

    def take(self, ref: int) -> Any:
        return self._answers.pop(ref)()

    def ask(self, method: str, *given: Any) -> Any:
        return self.take(self.begin(method, *given))

    def stream(self, method: str, *given: Any, ahead: int = 8) -> Iterator[Any]:
        if self._lost:
            raise Lost
        for piece in getattr(self._object, method)(*given):
            if (fate := self._machines.fate("piece")) == "before":
                self._lost = True
                raise Lost
            yield piece
            if fate == "after":
                self._lost = True
                raise Lost

    def end(self) -> None:
        self._lost = True
        self._object.close()
