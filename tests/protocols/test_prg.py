"""The generator: known answers, and no stream twice."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocols.correlations import Mask, Role
from protocols.linear import Weight, weight_mask
from protocols.prg import SEED_BYTES, Prg, derive, new_seed
from protocols.ring import reduce
from protocols.sources.dealer import Dealer, Store

KEY = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")  # of NIST SP 800-38A


def block(key: bytes, counter: int) -> bytes:
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return encryptor.update(counter.to_bytes(16, "big"))


def test_known_answer_of_aes_ctr() -> None:
    """SP 800-38A F.5.1: the counter block f0f1...ff under this key; a stream's counter blocks end in a count from 0."""
    assert block(KEY, int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)).hex() == "ec8cdf7398607cb0f2d21675ea9ea1e4"
    name = 0xF0F1F2F3F4F5F6F7
    want = b"".join(block(KEY, (name << 64) + k) for k in range(4))
    assert Prg(KEY).stream(name).raw(64).tobytes() == want


@pytest.mark.parametrize("sizes", [(1, 15, 16, 17), (5, 1 << 20, 3, (1 << 20) + 1), (0, 33)])
def test_a_stream_is_read_front_to_back(sizes: tuple[int, ...]) -> None:
    pieces, whole = Prg(KEY).stream(3), Prg(KEY).stream(3)
    joined = b"".join(pieces.raw(size).tobytes() for size in sizes)
    assert joined == whole.raw(sum(sizes)).tobytes()
    assert joined[:16] == block(KEY, 3 << 64)[: len(joined)]


@pytest.mark.parametrize("bits", range(1, 65))
def test_uniform_is_the_keystream_in_the_narrowest_word(bits: int) -> None:
    x = Prg(KEY).stream(9).uniform((3, 5), bits)
    word = next(size for size in (1, 2, 4, 8) if 8 * size >= bits)
    raw = Prg(KEY).stream(9).raw(15 * word).tobytes()
    want = [int.from_bytes(raw[k * word : (k + 1) * word], "little") % 2**bits for k in range(15)]
    assert [value % 2**64 for value in x.reshape(-1).tolist()] == want
    assert x.dtype is torch.int64 and torch.equal(x, reduce(x, bits))


def test_streams_are_distinct() -> None:
    """No two of many names, and no two of many keys, share any block of their first kilobytes."""
    seen: set[bytes] = set()
    for name in [*range(200), 2**32, 2**63, 2**64 - 1]:
        raw = Prg(KEY).stream(name).raw(1024).tobytes()
        seen |= {raw[k : k + 16] for k in range(0, 1024, 16)}
    for index in range(50):
        raw = Prg(derive(KEY, f"purpose {index}")).stream(0).raw(1024).tobytes()
        seen |= {raw[k : k + 16] for k in range(0, 1024, 16)}
    assert len(seen) == 253 * 64


def test_names_do_not_wrap() -> None:
    with pytest.raises(OverflowError):
        Prg(KEY).stream(2**64)
    with pytest.raises(OverflowError):
        Prg(KEY).stream(-1)


def test_derive_separates_purposes() -> None:
    purposes = ["", "a", "b", "aa", "weight mask a (2, 3) 20 8", "weight mask a (2, 3) 20 9", "weight mask a (2, 3) 2 08"]
    keys = {derive(KEY, purpose) for purpose in purposes} | {derive(bytes(16), purpose) for purpose in purposes} | {KEY}
    assert len(keys) == 2 * len(purposes) + 1 and {len(key) for key in keys} == {SEED_BYTES}
    assert derive(KEY, "a") == derive(KEY, "a")


def test_weight_masks_differ_by_seed_name_shape_and_encoding() -> None:
    base = Weight("w", (4, 6), 20, 8)
    others = [
        Weight("v", (4, 6), 20, 8),
        Weight("w", (6, 4), 20, 8),
        Weight("w", (4, 6), 21, 8),
        Weight("w", (4, 6), 20, 9),
        Weight("w (4, 6) 20", (4, 6), 20, 8),
    ]
    masks = [weight_mask(KEY, w) for w in (base, *others)] + [weight_mask(derive(KEY, "other"), base)]
    digests = {hashlib.sha256((mask.reshape(-1)[:24] & 0xFFFFF).numpy().tobytes()).digest() for mask in masks}
    assert len(digests) == len(masks)
    assert torch.equal(weight_mask(KEY, base), weight_mask(KEY, base))


def test_seeds_are_fresh() -> None:
    seeds = {new_seed() for _ in range(1000)}
    assert len(seeds) == 1000 and all(len(seed) == SEED_BYTES for seed in seeds)


def test_every_name_has_its_own_stream_at_store_and_dealer() -> None:
    """A thousand masks of one session: no word of one occurs in another, and the dealer knows their sums."""
    server, client = Store(Role.SERVER, KEY), Store(Role.CLIENT, derive(KEY, "client"))
    dealer = Dealer(KEY, derive(KEY, "client"), {})
    drawn = []
    for name in range(1, 1001):
        kind = Mask((8,), 64)
        dealer.deal(kind)
        pair = [store.take(kind).own[0] for store in (server, client)]
        assert torch.equal(dealer.mask(name), pair[0] + pair[1])
        drawn += pair
    assert len(np.unique(torch.cat(drawn).numpy())) == 2 * 8 * 1000
