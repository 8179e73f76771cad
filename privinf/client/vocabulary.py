"""What bytes each token of a vocabulary stands for, as its tokenizer's decoder has it; a decoder alone tells of whole texts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, repr=False)
class Vocabulary:
    """The bytes of each token by its id, empty where it has none, and the ids of those that are no text."""

    tokens: tuple[bytes, ...]
    special: frozenset[int]

    @staticmethod
    def read(data: bytes, size: int) -> Vocabulary:
        """Of a `tokenizer.json` that the tokenizers' library has read, for a model of so many tokens."""
        from tokenizers import Tokenizer

        told, words = json.loads(data), Tokenizer.from_buffer(data).get_vocab(with_added_tokens=True)
        added = {each["id"]: each for each in told.get("added_tokens") or ()}
        kinds = _kinds(told.get("decoder"))
        letters = _letters() if "ByteLevel" in kinds else {}
        tokens = [b""] * size
        for word, number in words.items():
            if number < size:
                tokens[number] = word.encode() if number in added else _bytes(word, kinds, letters)
        return Vocabulary(tuple(tokens), frozenset(number for number, each in added.items() if each.get("special")))


def _kinds(decoder: Any) -> frozenset[str]:
    """The types of a decoder and of those that it is made of."""
    if not isinstance(decoder, dict):
        return frozenset()
    inner = [_kinds(each) for each in decoder.get("decoders") or ()]
    return frozenset({str(decoder.get("type"))}.union(*inner))


def _bytes(word: str, kinds: frozenset[str], letters: dict[str, int]) -> bytes:
    if letters:
        return bytes(letters[letter] for letter in word) if all(letter in letters for letter in word) else word.encode()
    if "ByteFallback" in kinds and (found := _BYTE.fullmatch(word)):
        return bytes([int(found[1], 16)])
    return (word.replace("\u2581", " ") if kinds & {"Metaspace", "Replace"} else word).encode()


def _letters() -> dict[str, int]:
    """The letter by which a byte-level tokenizer writes each byte: itself where it can be seen, else the next one from 256 on (GPT-2)."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
