"""The tokenizer on the client's side: the one in the server's bundle, or one that the client brings or has pinned.

It is data of the server's that decides how many tokens a prompt has, which the server sees. Its library raises bare exceptions, and
where its own code panics not even these: nothing but ConfigError comes out of here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocols.errors import ConfigError, HandshakeError

if TYPE_CHECKING:
    from privinf.lowering.lowered import Lowered

MAX_BYTES = 48 * 2**20
"""Of a tokenizer's file; no bundle holds a larger one."""
OWN = "bring your own by --tokenizer FILE"
_STDERR = threading.Lock()


class Tokenizer:
    """A tokenizer from the bytes of its `tokenizer.json`; ConfigError if they are none."""

    def __init__(self, data: bytes) -> None:
        from tokenizers import Tokenizer as Library  # only here: loading it is not free

        if len(data) > MAX_BYTES:
            raise ConfigError(f"the tokenizer has {len(data)} bytes, of at most {MAX_BYTES}")
        with _ours("the model's tokenizer cannot be read", OWN):
            self._library: Any = Library.from_buffer(data)
            self.size = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text."""
        with _ours("the prompt is no text that the tokenizer can read", OWN):
            return list(self._library.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of ids."""
        with _ours("the tokenizer cannot make a text of the reply", f"{OWN}, or give the prompt as --prompt-ids"):
            return str(self._library.decode(ids, skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token: int) -> str | None:
        """A token as the tokenizer writes it."""
        with _ours("the model's tokenizer cannot be read", OWN):
            found: str | None = self._library.id_to_token(token)
            return found


@lru_cache(maxsize=2)
def load_tokenizer(data: bytes | None) -> Tokenizer | None:
    """A model's tokenizer, None where it has none; ConfigError if the bytes are not one. Reading one takes ten milliseconds: it is kept."""
    return None if data is None else Tokenizer(data)


@dataclass(frozen=True, repr=False)
class Own:
    """A tokenizer that the client brings in place of the server's."""

    path: Path
    data: bytes
    size: int

    @staticmethod
    def read(path: Path, expect: str | None) -> Own:
        """From a `tokenizer.json`, with this digest if one is expected; ConfigError."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", remedy="give --tokenizer a tokenizer.json") from None
        digest = hashlib.sha256(data).hexdigest()
        if expect is not None and digest != expect:
            raise ConfigError(f"{path} is the tokenizer {digest}, not the expected {expect}", remedy="give the file that was meant")
        try:
            return Own(path, data, Tokenizer(data).size)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}", remedy="give --tokenizer a tokenizer.json") from None


def settle(lowered: Lowered, own: Own | None, expect: str | None, peer: str) -> None:
    """Which tokenizer a session uses: the client's own, or the bundle's unless another was expected."""
    if own is not None:
        vocab = lowered.info.vocab
        if own.size > vocab:
            what = f"{own.path} has ids up to {own.size - 1}, and the model's vocabulary ends at {vocab - 1}"
            raise ConfigError(what, remedy="give the tokenizer that the model was trained with")
        lowered.tokenizer = own.data
    elif expect is not None and lowered.tokenizer_id != expect:
        what = f"the server's model has the tokenizer {lowered.tokenizer_id or 'none'}, not the expected {expect}"
        raise HandshakeError(what, party="client", peer=peer, remedy=f"compare with what `privinf serve` prints, or {OWN}")


@contextlib.contextmanager
def _ours(message: str, remedy: str) -> Iterator[None]:
    """Turns whatever the library raises into one line."""
    with _STDERR, _held_back():
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise ConfigError(message, remedy=remedy) from None
            raise


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """What is written to this process's stderr within appears afterwards, or not at all after an error.

    A panic reports itself there in many lines, which may quote the prompt.
    """
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    aside = os.memfd_create("stderr") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
    try:
        os.dup2(aside, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
        size = os.lseek(aside, 0, os.SEEK_END)
        if size:
            os.write(kept, os.pread(aside, size, 0))  # of other threads
    finally:
        os.close(aside)
        os.close(kept)
