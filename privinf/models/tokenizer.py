"""The tokenizer of a checkpoint directory, as the bytes of a `tokenizer.json`: its own, or made of GPT-2's `vocab.json` and `merges.txt`.

`transformers` writes the two with GPT-2's classes; what it says beside them of special and added tokens is followed, so that texts
become the same ids. Every other kind is named in a warning, and the model then takes ids alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from protocols.errors import ConfigError

TOKENIZER, SETTINGS, VOCABULARY, MERGES, SPECIAL, ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
FILES = (TOKENIZER, SETTINGS, VOCABULARY, MERGES, SPECIAL, ADDED)
"""All that is read."""
OF_OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.bpe", "tekken.json")
CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
NAMED = ("bos_token", "eos_token", "unk_token")
END = "<|endoftext|>"  # all three, where GPT-2's files say nothing

log = logging.getLogger("privinf.models")


def tokenizer_of(directory: Path) -> bytes | None:
    """The contents of a `tokenizer.json`; None where there is none and none can be made, which is said where there are files of one."""
    try:
        if (directory / TOKENIZER).is_file():
            return (directory / TOKENIZER).read_bytes()
    except OSError as error:
        raise ConfigError(f"{directory / TOKENIZER}: cannot be read: {error.strerror}") from None
    found = [name for name in (VOCABULARY, MERGES, *OF_OTHERS) if (directory / name).is_file()]
    kind = _read(directory / SETTINGS).get("tokenizer_class")
    why = f"{' and '.join(found)} alone make none"
    if found and kind not in CLASSES:
        why = f"none is made for the class {str(kind)[:60]}"
    elif found[:2] == [VOCABULARY, MERGES]:
        try:
            return _made(directory).to_str().encode()
        except _NotMadeError as error:
            why = str(error)
    if found:
        log.warning(
            "%s: no tokenizer, so it takes token ids only: %s; save one as tokenizer.json, with transformers' fast class",
            directory,
            why,
        )
    return None


class _NotMadeError(Exception):
    """The files do not agree."""


def _made(directory: Path) -> Tokenizer:
    """A byte-level BPE with GPT-2's pieces of text."""
    settings = _read(directory / SETTINGS)
    try:
        made = Tokenizer(models.BPE(*models.BPE.read_file(str(directory / VOCABULARY), str(directory / MERGES))))
    except Exception as error:  # the library raises bare ones
        raise ConfigError(f"{directory}: {VOCABULARY} and {MERGES} are no byte-level BPE: {error}") from None
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space") is True)
    made.decoder = decoders.ByteLevel()
    if "added_tokens_decoder" not in settings:  # as older files have it
        settings |= _read(directory / SPECIAL)
    named = {name: token for name in NAMED if (token := _token(settings.get(name, END), special=True)) is not None}
    others = [token for value in _others(settings) if (token := _token(value, special=True)) is not None]
    for number, token in _added(directory, settings, {token.content for token in (*named.values(), *others)}):
        made.add_tokens([token])
        if made.token_to_id(token.content) != number:
            raise _NotMadeError(f"the added token {token.content!r} is to have the id {number}, which does not follow the vocabulary")
    known = {token.content for token in made.get_added_tokens_decoder().values()}
    assumed = {token.content for name, token in named.items() if name not in settings}  # and there only if the vocabulary has it
    for token in (*named.values(), *others):
        if token.content not in known and (token.content not in assumed or made.token_to_id(token.content) is not None):
            made.add_tokens([token])
    ends = {name: named[name].content for name in ("bos_token", "eos_token") if settings.get(f"add_{name}") is True and name in named}
    if ends:
        parts = [ends.get("bos_token"), "$A", ends.get("eos_token")]
        ids = [(content, made.token_to_id(content)) for content in dict.fromkeys(ends.values())]
        made.post_processor = processors.TemplateProcessing(single=" ".join(part for part in parts if part), special_tokens=ids)
    return made


def _added(directory: Path, settings: dict[str, Any], special: set[str]) -> Iterator[tuple[int, AddedToken]]:
    """(id, token), in the order of the ids."""
    place = directory / (SETTINGS if "added_tokens_decoder" in settings else ADDED)
    try:
        if place.name == SETTINGS:
            found = {int(number): _token(fields) for number, fields in settings["added_tokens_decoder"].items()}
        else:
            found = {int(number): _token(content, special=content in special) for content, number in _read(place).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{place}: the added tokens cannot be read: {error}") from None
    for number, token in sorted(found.items()):
        if token is not None:
            yield number, token


def _others(settings: dict[str, Any]) -> list[Any]:
    """Special tokens that GPT-2 does not have."""
    lists = [settings.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    single = [settings.get(f"{name}_token") for name in ("sep", "pad", "cls", "mask")]
    return [*single, *(value for values in lists if isinstance(values, list) for value in values)]


def _token(value: Any, *, special: bool | None = None) -> AddedToken | None:
    """Of a text, or of the fields that `transformers` writes of one."""
    if isinstance(value, str):
        return AddedToken(value, special=bool(special), normalized=not special)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    flags = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if isinstance(value.get(name), bool)}
    return AddedToken(value["content"], special=value.get("special") is True if special is None else special, **flags)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return found
