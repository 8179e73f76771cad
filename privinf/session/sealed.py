"""What both keep of the encrypted weights: one directory for each model and key, one file for each weight.

    CACHE/setup/MODEL/KEY/NAME.bin     at the client: the ciphertexts, and then a digest of them, of the model, of the key and of the weight
    CACHE/sealed/MODEL/KEY/NAME.bin    the same at the server, which makes them once, and sends them to each client that has none

A file is written whole or not at all, so that an interrupted set-up goes on where it stopped. What is damaged, or was put there from
another model, key or weight, is reported, removed and made anew; what stands under another key of the model's is of no use any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from privinf.files import finish, make_private, move_into_place, part_file, refusals, sweep
from protocols.errors import ConfigError, HandshakeError

log = logging.getLogger("privinf")
_DIGEST = 32  # bytes
_PIECE = 1 << 20


class KeptPart:
    """A file that is held open, and of which nothing stays in memory. FileNotFoundError, or ConfigError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._refused():
            self._file = path.open("rb", buffering=0)
            self.size = os.fstat(self._file.fileno()).st_size

    def read(self, at: int, size: int) -> memoryview:
        """So many bytes from there on."""
        pieces, left = [], size
        while left:
            with self._refused():
                pieces.append(os.pread(self._file.fileno(), left, at + size - left))
            if not pieces[-1]:
                raise ConfigError(f"{self._path} was cut while it was used", remedy="remove it, and begin again")
            left -= len(pieces[-1])
        return memoryview(b"".join(pieces))

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            remedy = "look at its permissions, or choose another --cache"
            raise ConfigError(f"cannot read {self._path}: {error.strerror}", remedy=remedy) from None


class SealedStore:
    """The set-up of one model under one key, in the part of the cache that `kind` names."""

    def __init__(self, cache: Path, kind: str, model: str, key: str) -> None:
        self.named = f"{model} {key}"
        self._all = cache / kind / model
        self._root = self._all / key

    @property
    def lock(self) -> Path:
        """Held by whoever makes a part."""
        return self._all / "making.lock"

    @property
    def taken(self) -> Path:
        """Where a client counts the rows that it takes of tables under this key."""
        return self._root / "rows.taken"

    def _path(self, name: str) -> Path:
        return self._root / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.bin"

    def _digest(self, name: str) -> hashlib._Hash:
        return hashlib.sha256(f"{self.named} {name}\n".encode())

    def digest(self, name: str, size: int) -> bytes | None:
        """Of a kept part of this size, as it was written; whether it is still what it was, `read` says."""
        try:
            with self._path(name).open("rb") as file:
                file.seek(0, os.SEEK_END)
                if file.tell() != size + _DIGEST:
                    return None
                file.seek(size)
                return file.read()
        except OSError:
            return None

    def sweep(self) -> None:
        """Removes what is kept under other keys, and what interrupted writes have left."""
        with refusals(self._root):
            make_private(self._root)
        for path in self._all.iterdir():
            if path.is_dir() and path != self._root:
                shutil.rmtree(path, ignore_errors=True)
        sweep(self._root)

    def read(self, name: str, size: int) -> KeptPart | None:
        """A kept part of this size, checked once; it is then read from the disk as it is used, also after it was removed."""
        path = self._path(name)
        try:
            kept, digest = KeptPart(path), self._digest(name)
            if kept.size == size + _DIGEST:
                for at in range(0, size, _PIECE):
                    digest.update(kept.read(at, min(_PIECE, size - at)))
                if digest.digest() == kept.read(size, _DIGEST):
                    return kept
        except FileNotFoundError:
            return None
        log.warning("the kept set-up of %s was damaged, or another's, and is made anew (%s)", name, path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    @contextlib.contextmanager
    def writing(self, name: str, expect: bytes | None = None) -> Iterator[Callable[[memoryview], None]]:
        """Takes a part piece by piece, and keeps it once the block has ended well; ConfigError where the disk refuses.

        HandshakeError, and nothing is kept, for a part with another digest than was expected.
        """
        digest = self._digest(name)
        with contextlib.ExitStack() as stack:
            with refusals(self._root):
                file, part = stack.enter_context(part_file(self._root))

            def write(data: memoryview) -> None:
                digest.update(data)
                with refusals(self._root):
                    file.write(data)

            yield write
            if expect not in (None, digest.digest()):
                remedy = "nothing of it was kept; ask who runs it"
                raise HandshakeError(f"what the server sent as {name} is not what it said it would send", party="client", remedy=remedy)
            with refusals(self._root):
                file.write(digest.digest())
                finish(file)
                move_into_place(part, self._path(name))
