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
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from privinf.files import finish, make_private, move_into_place, part_file, refusals, sweep
from protocols.errors import ConfigError, HandshakeError

log = logging.getLogger("privinf")
_DIGEST = 32  # bytes
_PIECE = 1 << 20


class SealedStore:
    """The set-up of one model under one key, in the part of the cache that `kind` names."""

    def __init__(self, cache: Path, kind: str, model: str, key: str) -> None:
        self.named = f"{model} {key}"
        self._all = cache / kind / model
        self._root = self._all / key

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

    def read(self, name: str, size: int) -> memoryview | None:
        """A kept part of this size, checked; mapped from the disk, so that what is not read takes no memory."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            return None
        except ValueError:  # it is empty
            whole = memoryview(b"")
        except OSError as error:
            remedy = "look at its permissions, or choose another --cache"
            raise ConfigError(f"cannot read {path}: {error.strerror}", remedy=remedy) from None
        data, digest = whole[:-_DIGEST], self._digest(name)
        for at in range(0, len(data), _PIECE):
            digest.update(data[at : at + _PIECE])
        if len(data) == size and digest.digest() == whole[-_DIGEST:]:
            return data
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
