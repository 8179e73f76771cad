"""What the tests of training share: one thread, so that results repeat, and a corpus as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from privinf.training.corpus import Tokens, encode_corpus, read_corpus, train_tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokens(sources: Path) -> Tokens:
    documents = read_corpus(sources)
    return encode_corpus(documents, train_tokenizer(documents, 300))
