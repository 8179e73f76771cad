"""Kernels are compiled where nothing can be kept, too."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from protocols.ot import kernels


def test_a_kernel_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Numba does on a disk that cannot be written, when a function is declared: it raises."""
    njit = numba.njit

    def refusing(*args: Any, cache: bool = False, **options: Any) -> Callable[..., Any]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    values, expected, found = np.arange(100, dtype=np.uint64), np.empty(8, np.uint64), np.empty(8, np.uint64)
    kernels.pack(values, 5, expected)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(numba, "njit", refusing)
            importlib.reload(kernels)
        kernels.pack(values, 5, found)
    finally:
        importlib.reload(kernels)
    assert np.array_equal(found, expected) and found.any()
