"""Replies of a form, penalties and biases: what the client makes of logits, without a protocol."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from privinf.client.grammar import Mask, check, of_regex, of_schema
from privinf.client.sampling import Sampler, Sampling
from privinf.client.vocabulary import Vocabulary
from protocols.errors import ConfigError
from tests.support import trio as t

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def written(grammar: str, sampling: Sampling | None = None, most: int = 60) -> str:
    """A reply of a model that would say anything, by its grammar."""
    generator = torch.Generator().manual_seed(5)
    sampler, tokens = Sampler(sampling or Sampling(1.0, seed=3, grammar=grammar)), list[int]()
    sampler.begin(t.lowered())
    while not sampler.ended and len(tokens) < most:
        tokens.append(sampler.choose(torch.randn(t.VOCAB, generator=generator)))
    assert sampler.ended
    text: str = t.tokenizer().decode([token for token in tokens if token != t.END])
    return text


def test_a_reply_matches_its_expression() -> None:
    for expression in (r"(yes|no)", r"[a-c]{3}\.[0-9]", r"a/b\?"):
        assert re.fullmatch(expression, written(of_regex(expression)))


def test_a_reply_is_for_its_schema() -> None:
    for _ in range(3):
        found = json.loads(written(of_schema(SCHEMA), Sampling(1.0, grammar=of_schema(SCHEMA), bias=((ord("}") - 32, 5.0),))))
        assert list(found) == ["a"] and isinstance(found["a"], int)
    assert " " not in written(of_schema({"enum": [["a", "b"]]}))  # blanks are tokens, and tokens are dear


def test_a_form_that_is_none_is_one_line() -> None:
    for grammar, says in ((lambda: of_regex("(a"), "unclosed"), (lambda: of_schema({"type": "bogus"}), "bogus")):
        with pytest.raises(ConfigError, match=says) as found:
            check(t.lowered(), grammar())
        assert "\n" not in str(found.value)
    with pytest.raises(ConfigError, match="at most"):
        of_regex("a" * 70_000)
    with pytest.raises(ConfigError, match="no tokenizer"):
        Mask(t.lowered(texts=False), of_regex("a"))
    with pytest.raises(ConfigError, match=r"no token of the vocabulary|cannot be used"):
        Mask(t.lowered(), of_regex("\u00e4")).allowed()  # which this vocabulary cannot write


def test_a_model_without_an_end_token_ends_by_its_form() -> None:
    model = t.lowered()
    model = t.changed(model, eos=())
    mask = Mask(model, of_regex("ab"))
    assert [mask.take(ord(letter) - 32) for letter in "ab"] == [False, True]


def test_penalties_and_biases_change_what_is_chosen() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.5]])
    plain = Sampler(Sampling())
    assert [plain.choose(logits) for _ in range(3)] == [0, 0, 0]
    present = Sampler(Sampling(presence_penalty=0.2))
    assert [present.choose(logits) for _ in range(4)] == [0, 1, 0, 0]  # 0.8 against 0.7 then
    often = Sampler(Sampling(frequency_penalty=0.3))
    assert [often.choose(logits) for _ in range(4)] == [0, 1, 0, 1]  # 1.0, 0.9 against 0.7, 0.7 against 0.6, 0.6 against 0.4
    biased = Sampler(Sampling(bias=((2, 100.0), (7, 100.0))))  # one that is not there changes nothing
    assert biased.choose(logits) == 2
    assert Sampling(presence_penalty=0.2).takes_logits and Sampling(bias=((1, 1.0),)).takes_logits and not Sampling().takes_logits
    wrong: list[dict[str, Any]] = [{"frequency_penalty": 3.0}, {"bias": ((1, 101.0),)}, {"bias": ((-1, 1.0),)}]
    for options in wrong:
        with pytest.raises(ConfigError):
            Sampling(**options)


def test_the_bytes_of_tokens_are_those_of_texts() -> None:
    data = (Path(__file__).parents[2] / "models" / "pylib" / "tokenizer.json").read_bytes()
    from tokenizers import Tokenizer, decoders, models

    shipped = Tokenizer.from_buffer(data)
    found = Vocabulary.read(data, shipped.get_vocab_size())
    text = "def f(\u00e4):\n    return '\u20ac'  # \U0001f600"
    assert b"".join(found.tokens[number] for number in shipped.encode(text).ids) == text.encode() and found.special == {0}
    pieces = Tokenizer(models.BPE({"\u2581a": 0, "<0xC3>": 1, "b": 2}, [], byte_fallback=True))
    pieces.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert Vocabulary.read(pieces.to_str().encode(), 5).tokens == (b" a", b"\xc3", b"b", b"", b"")


def test_nothing_of_a_form_is_shown() -> None:
    assert "secret" not in repr(Sampling(grammar=of_regex("secret"))) and "secret" not in repr(Mask(t.lowered(), of_regex("secret")))
