"""What a client keeps of a model between sessions: the public bundle and the masked weights, checked when they are read.

A masked weight is a file of its own, written whole or not at all, so that an interrupted set-up goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from protocols.errors import ConfigError
from protocols.linear import Weight
from protocols.ring import packed_size, unpack

_DIGEST = 32


def _count(weight: Weight) -> int:
    count = 1
    for size in weight.shape:
        count *= size
    return count


def packed_bytes(weight: Weight) -> int:
    """Bytes of the masked weight on a wire and in its file."""
    return packed_size(_count(weight), weight.bits)


def write_private(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file of mode 0600 whole or not at all; ConfigError in one line where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot write {path}: {reason}", remedy="free space or choose another --cache") from None


class ClientStore:
    """The directory of one client's cache."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def bundle(self, digest: str) -> bytes | None:
        """A kept bundle, if it still has this digest."""
        path = self.root / "bundles" / digest
        if not digest.isalnum() or not path.is_file():
            return None
        data = path.read_bytes()
        return data if hashlib.sha256(data).hexdigest() == digest else None

    def keep_bundle(self, data: bytes) -> None:
        """Keeps a bundle under its digest."""
        write_private(self.root / "bundles" / hashlib.sha256(data).hexdigest(), data)

    def _path(self, model: str, weight: Weight) -> Path:
        name = hashlib.sha256(repr(weight).encode()).hexdigest()[:32]
        return self.root / "setup" / model / f"{name}.bin"

    def missing(self, model: str, weights: Mapping[str, Weight]) -> list[str]:
        """Weights of which no whole file is there."""
        found = []
        for name, weight in weights.items():
            path = self._path(model, weight)
            if not path.is_file() or path.stat().st_size != packed_bytes(weight) + _DIGEST:
                found.append(name)
        return found

    def keep(self, model: str, weight: Weight, data: memoryview) -> None:
        """Keeps one masked weight."""
        write_private(self._path(model, weight), hashlib.sha256(data).digest(), data)

    def load(self, model: str, weights: Mapping[str, Weight]) -> Iterator[tuple[str, Tensor]]:
        """Every masked weight; a damaged file is removed and reported."""
        for name, weight in weights.items():
            path = self._path(model, weight)
            data = path.read_bytes()
            body = memoryview(data)[_DIGEST:]
            if hashlib.sha256(body).digest() != data[:_DIGEST]:
                path.unlink()
                raise ConfigError(f"the kept set-up of {name} was damaged and has been removed", remedy="run the same command again")
            yield name, unpack(body, weight.shape, weight.bits)
