"""What a client keeps of a model between sessions: the public bundle and the masked weights, checked when they are read.

A masked weight is a file of its own, written whole or not at all, so that an interrupted set-up goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from privinf.files import refusals, sweep, write_private
from privinf.lowering.program import packed_bytes
from protocols.errors import ConfigError
from protocols.linear import Weight
from protocols.ring import unpack

log = logging.getLogger("privinf")
_DIGEST = 32


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """`write_private`, ConfigError in one line where the disk refuses."""
    with refusals(path):
        write_private(path, *parts)


def _read(path: Path) -> bytes | None:
    """A kept file, or None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", remedy="look at its permissions, or choose another --cache") from None


class ClientStore:
    """The directory of one client's cache. What is damaged there is reported, removed and fetched anew."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def bundle(self, digest: str) -> bytes | None:
        """A kept bundle, if it still has this digest."""
        if not digest.isalnum():
            return None
        path = self.root / "bundles" / digest
        data = _read(path)
        if data is not None and hashlib.sha256(data).hexdigest() != digest:
            self._drop(path, "the kept bundle of a model")
            return None
        return data

    def keep_bundle(self, data: bytes) -> None:
        """Keeps a bundle under its digest."""
        _write(self.root / "bundles" / hashlib.sha256(data).hexdigest(), data)

    def _path(self, model: str, weight: Weight) -> Path:
        name = hashlib.sha256(repr(weight).encode()).hexdigest()[:32]
        return self.root / "setup" / model / f"{name}.bin"

    def _drop(self, path: Path, what: str) -> None:
        log.warning("%s was damaged and is fetched anew (%s)", what, path)
        with contextlib.suppress(OSError):
            path.unlink()

    def missing(self, model: str, weights: Mapping[str, Weight]) -> list[str]:
        """Weights of which no whole file is there."""
        found = []
        for name, weight in weights.items():
            path = self._path(model, weight)
            data = _read(path)
            if data is not None and not _whole(data, weight):
                self._drop(path, f"the kept set-up of {name}")
                data = None
            if data is None:
                found.append(name)
        sweep(self.root / "setup" / model)
        return found

    def keep(self, model: str, weight: Weight, data: memoryview) -> None:
        """Keeps one masked weight."""
        _write(self._path(model, weight), hashlib.sha256(data).digest(), data)

    def load(self, model: str, weights: Mapping[str, Weight]) -> Iterator[tuple[str, Tensor]]:
        """Every masked weight, once none is missing; ConfigError if one has gone or changed since."""
        for name, weight in weights.items():
            data = _read(self._path(model, weight))
            if data is None or len(data) != packed_bytes(weight) + _DIGEST:
                raise ConfigError(f"the kept set-up of {name} has changed while it was in use", remedy="run the same command again")
            yield name, unpack(memoryview(data)[_DIGEST:], weight.shape, weight.bits)


def _whole(data: bytes, weight: Weight) -> bool:
    return len(data) == packed_bytes(weight) + _DIGEST and hashlib.sha256(memoryview(data)[_DIGEST:]).digest() == data[:_DIGEST]
