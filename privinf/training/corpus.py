"""What a model is trained on: a directory of text or code, by default the Python sources of the running interpreter's standard library.

Whole modules are held out, chosen by a hash of their name, and a module goes together with its tests, so that the held-out text is of
modules that training never saw; in another directory a module is what lies under one name in it, or a file where that would be one module.
Order and split depend on names and contents alone.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from privinf.models.checkpoint import write_atomically
from protocols.errors import ConfigError

END = "<|endoftext|>"
HELD_OUT_PERCENT = 3
# Tables of character sets, build settings of the machine, and packages that are not the library's own.
SKIPPED = ("site-packages", "dist-packages", "encodings", "__pycache__")
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

# What a token may not cross: newlines keep their indentation, words their leading space; digits go in threes, so that numbers stay cheap.
SPLIT = r"(?:\r?\n[ \t]*)+| ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\s+"


@dataclass(frozen=True)
class Document:
    """One file: its path below the corpus, and the module that it belongs to, which is held out or not as a whole."""

    name: str
    module: str
    text: str
    held_out: bool


@dataclass(frozen=True)
class Tokens:
    """The corpus as ids, every document between two end tokens."""

    training: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    held_out_bytes: int  # of UTF-8 text, end tokens not counted: what bits per byte are measured against


def module_of(path: Path) -> str:
    """`json/decoder.py` and `test/test_json/test_decode.py` belong to `json`."""
    parts = list(path.with_suffix("").parts)
    while len(parts) > 1 and parts[0] in ("test", "tests"):
        parts = parts[1:]
    return parts[0].removeprefix("test_").lstrip("_") or parts[0]


def is_held_out(module: str) -> bool:
    """The same modules everywhere: a function of the name."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def read_corpus(
    directory: Path | None = None, pattern: str | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Document]:
    """All UTF-8 text below a directory (default: the standard library's `.py` files), in the order of the files' names.

    `pattern` narrows the files, such as `*.py`. Hidden and binary files are left out; those that are not UTF-8 too, and `say` is told so.
    """
    root = Path(sysconfig.get_path("stdlib")) if directory is None else directory
    if not root.is_dir():
        raise ConfigError(f"{root}: no such directory", remedy="name a directory of text files with --corpus")
    found: list[tuple[Path, str]] = []
    unreadable: list[str] = []
    paths = root.rglob(pattern or ("*.py" if directory is None else "*"))
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if any(part in SKIPPED or part.startswith((".", *SKIPPED_PREFIXES)) for part in name.parts) or not path.is_file():
            continue
        try:
            data = path.read_bytes()
        except OSError:
            unreadable.append(name.as_posix())
            continue
        if b"\0" in data[:8192]:  # not text
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            unreadable.append(name.as_posix())
            continue
        if text.strip() and END not in text:
            found.append((name, text))
    skipped = f"{len(unreadable)} files left out, not UTF-8: {', '.join(unreadable[:3])}{', ...' * (len(unreadable) > 3)}"
    if not found:
        what = f"; {skipped}" if unreadable else ""
        raise ConfigError(f"{root}: the corpus is empty{what}", remedy="it must hold text files in UTF-8")
    if unreadable:
        say(skipped)
    of = module_of if len({module_of(name) for name, _ in found}) > 1 else lambda name: name.as_posix()
    documents = [(name.as_posix(), of(name), text) for name, text in found]
    modules = sorted({module for _, module, _ in documents}, key=lambda module: hashlib.sha256(module.encode()).digest())
    if len(modules) < 2:
        raise ConfigError(f"{root}: the corpus is one file, {modules[0]}", remedy="two at least are needed, so that one can be held out")
    held_out = {module for module in modules if is_held_out(module)}
    if len(held_out) in (0, len(modules)):  # a small corpus
        held_out = {modules[0]}
    return [Document(name, module, text, module in held_out) for name, module, text in documents]


def fingerprint(documents: list[Document]) -> str:
    """A hash over names, contents and split, to tell whether two runs saw the same corpus."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text, str(document.held_out)):
            digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens, or fewer where the text has no more pairs; the end token is id 0."""
    if vocab_size < 257:
        raise ConfigError(f"vocab_size: {vocab_size} is too small", remedy="256 bytes and the end token need 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in documents if not document.held_out), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes a `tokenizer.json`, whole or not at all."""
    write_atomically(path, tokenizer.to_str(pretty=True).encode())


def encode_corpus(documents: list[Document], tokenizer: Tokenizer, end: int | None = None) -> Tokens:
    """All documents as two streams of ids, `end` (by default END's) between them: what is trained on, what is held out."""
    end = tokenizer.token_to_id(END) if end is None else end
    streams: dict[bool, list[NDArray[np.uint16]]] = {False: [np.array([end], np.uint16)], True: [np.array([end], np.uint16)]}
    for start in range(0, len(documents), 64):
        part = documents[start : start + 64]
        for document, encoding in zip(part, tokenizer.encode_batch([document.text for document in part]), strict=True):
            streams[document.held_out].append(np.array([*encoding.ids, end], np.uint16))
    held_out_bytes = sum(len(document.text.encode()) for document in documents if document.held_out)
    return Tokens(np.concatenate(streams[False]), np.concatenate(streams[True]), held_out_bytes)


def batch_at(stream: NDArray[np.uint16], step: int, batch: int, length: int, seed: int) -> NDArray[np.int64]:
    """The ids (batch, length + 1) of a step, a function of its arguments alone.

    Each pass over the stream cuts it into windows at another offset and visits every window once, in an order of its own.
    """
    windows = (len(stream) - 1) // length - 1  # one window less, so that every offset fits
    if windows < 1:
        raise ConfigError(
            f"the corpus has {len(stream)} tokens, too few for sequences of {length}", remedy="give more text, or shorter sequences"
        )
    rows = []
    for index in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(index, windows)
        order, offset = _order(windows, length, seed, epoch)
        start = offset + int(order[place]) * length
        rows.append(stream[start : start + length + 1])
    return np.stack(rows).astype(np.int64)


_orders: dict[tuple[int, int, int, int], tuple[NDArray[np.int64], int]] = {}


def _order(windows: int, length: int, seed: int, epoch: int) -> tuple[NDArray[np.int64], int]:
    key = (windows, length, seed, epoch)
    if key not in _orders:
        if len(_orders) > 3:
            _orders.clear()
        generator = np.random.default_rng([seed, epoch])
        _orders[key] = (generator.permutation(windows), int(generator.integers(0, length)))
    return _orders[key]
