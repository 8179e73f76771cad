"""Directories that Hugging Face's `GPT2LMHeadModel.save_pretrained` writes: converted unchanged, against `transformers`' own logits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from privinf.lowering import convert
from privinf.models.checkpoint import load_checkpoint
from privinf.models.tokenizer import tokenizer_of
from privinf.server.models import SOURCES, _code, _fingerprint
from protocols.errors import ConfigError
from tests.support.ladder import LOGIT_ERROR, run

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {"vocab_size": 201, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4, "initializer_range": 0.15}
IDS = (5, 7, 200, 11, 3, 3, 9, 100, 42, 17, 0, 96)
FLOAT = 2e-5  # of two float32 evaluations in different order, times the size of the logits


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


def saved(directory: Path, *, dtype: torch.dtype = torch.float32, shard: str | None = None, bare: bool = False, **fields: Any) -> Any:
    """Writes a random model as `transformers` does, with no parameter at its resting value; returns what `transformers` reads back."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = {**SIZES, **fields}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.0 if bare else 0.1))
    model.to(dtype).save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    return GPT2LMHeadModel.from_pretrained(directory).float().eval()


def theirs(model: Any, ids: tuple[int, ...]) -> Tensor:
    """(T, V)."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def assert_ours_is_theirs(directory: Path, model: Any, ids: tuple[int, ...] = IDS) -> None:
    """Our float model at every position, and a private pass at the last."""
    wanted = theirs(model, ids)
    with torch.no_grad():
        found = load_checkpoint(directory)[0](torch.tensor([ids]))[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT * max(1.0, float(wanted.abs().max())))
    private = run(convert(directory), ids).client
    assert float((private - wanted[-1]).abs().max()) < LOGIT_ERROR


@pytest.mark.parametrize(
    "fields",
    [
        {"activation_function": "gelu_new"},
        {"activation_function": "gelu", "tie_word_embeddings": False},
        {"activation_function": "relu", "n_inner": 40, "layer_norm_epsilon": 1e-3},
        {"n_embd": 21, "n_head": 3, "n_inner": 33},  # heads of width 7
        {"n_embd": 15, "n_head": 1, "vocab_size": 333, "n_layer": 1},
        {"dtype": torch.bfloat16, "shard": "20KB"},
        {"dtype": torch.float16, "tie_word_embeddings": False, "activation_function": "relu"},
    ],
    ids=lambda fields: ",".join(f"{name}={value}" for name, value in fields.items()),
)
def test_ours_is_theirs(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = saved(tmp_path, **fields)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("shard" in fields)
    assert_ours_is_theirs(tmp_path, model)


def test_a_model_as_they_initialise_it(tmp_path: Path) -> None:
    """Nothing moved, the default range: small values throughout; and a context that is filled."""
    model = saved(tmp_path, bare=True, initializer_range=0.02)
    for length in (1, SIZES["n_positions"]):
        assert_ours_is_theirs(tmp_path, model, (IDS * 2)[:length])


@pytest.mark.slow
def test_gpt2s_own_size(tmp_path: Path) -> None:
    """12 layers, 12 heads, width 768, 50257 tokens, 1024 positions: 500 MB, a few minutes and 6 GB."""
    fields = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "initializer_range": 0.02}
    model = saved(tmp_path, bare=True, **fields)
    assert_ours_is_theirs(tmp_path, model, (50256, 11, 40000, 3, 3, 257))


# ---- shards


def test_damaged_shards_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path / "whole", shard="20KB")
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2

    def refused(text: str, **changes: Any) -> None:
        directory = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", directory)
        for name, data in changes.items():
            path = directory / (shards[int(name[1:])] if name.startswith("s") else "model.safetensors.index.json")
            path.unlink() if data is None else path.write_text(data)
        with pytest.raises(ConfigError, match=text) as caught:
            load_checkpoint(directory)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
        shutil.rmtree(directory)

    refused(f"{shards[1]}: no such file", s1=None)
    refused(f"{shards[0]}: truncated", s0="{}")
    refused("not an index of shards", index="[]")
    refused("not an index of shards", index='{"weight_map": {"wte.weight": ["x"]}}')
    for name in ("../outside.safetensors", "/etc/passwd", "model.bin", 3):
        refused("no plain name", index=json.dumps({"weight_map": {"wte.weight": name}}))
    refused("missing", index=json.dumps({"weight_map": {"wte.weight": shards[0]}}))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "whole", copy)
    shutil.copy(copy / shards[0], copy / "again.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate([*shards, "again.safetensors"]))}))
    with pytest.raises(ConfigError, match="in another shard too"):
        load_checkpoint(copy)


def test_a_change_of_any_shard_is_another_model(tmp_path: Path) -> None:
    """What the cache of lowered checkpoints goes by."""
    saved(tmp_path, shard="20KB")
    found = {_fingerprint(tmp_path)}
    for path in sorted(tmp_path.glob("*.safetensors")):
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        found.add(_fingerprint(tmp_path))
    assert len(found) == 1 + len(list(tmp_path.glob("*.safetensors")))


def test_a_change_of_any_source_is_another_lowering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the models, of the adapter and in subfolders too, wherever what lowers a model may come to lie."""
    packages = [shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__")) for source in SOURCES]
    (packages[1] / "deeper" / "still").mkdir(parents=True)
    (packages[1] / "deeper" / "still" / "table.py").write_text("x = 1\n")
    files = [path for package in packages for path in package.rglob("*") if path.is_file()]
    names = {path.relative_to(tmp_path).as_posix() for path in files}
    assert {"privinf/crypten_adapter.py", "privinf/models/aero.py", "privinf/lowering/calibration.txt", "protocols/ring.py"} <= names
    before = _code(packages)
    assert before == _code(packages) and len(files) > 80
    found = {before}
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data + b"#")
        found.add(_code(packages))
        path.write_bytes(data)
    assert len(found) == 1 + len(files) and _code(packages) == before
    (packages[1] / "deeper" / "still" / "table.py").rename(packages[1] / "deeper" / "table.py")
    found.add(moved := _code(packages))
    assert moved != before
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} of another release")
    assert _code(packages) not in found


# ---- side by side


def test_transformers_may_be_imported_before_crypten(tmp_path: Path) -> None:
    """In a process of its own; in this one it was CrypTen first."""
    code = (
        "import torch\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "from privinf.crypten_adapter import crypten_module\n"
        "crypten_module().init()\n"
        "small = GPT2Config(vocab_size=9, n_positions=4, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)\n"
        "logits = GPT2LMHeadModel(small)(torch.tensor([[1, 2]])).logits\n"
        "assert float((crypten_module().cryptensor(logits.detach()).get_plain_text() - logits).abs().max()) < 1e-3\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- tokenizers of two files

TEXTS = (
    "def main(",
    "Hello world  \n\n\tx",
    " leading, it's we're I'll 12345",
    "naïve Ünïcödé 😀 日本語",
    "<|endoftext|>a<|endoftext|> b",
    "<pad>x <extra> y<extra>z  <extra> ",
    "x <|im_start|>user\r\nhi",
    "",
)
TOKENS = 290
ADDED = {
    "0": {"content": "<|endoftext|>", "special": True, "normalized": True, "lstrip": False, "rstrip": False, "single_word": False},
    "290": {"content": "<extra>", "special": False, "normalized": False, "lstrip": True, "rstrip": True, "single_word": False},
    "291": {"content": "<|im_start|>", "special": True, "normalized": False},
}
END = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def with_vocabulary(directory: Path, files: dict[str, Any]) -> Path:
    """`vocab.json` and `merges.txt` of a byte-level BPE, and JSON files beside them."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    texts = ["def main(): pass\n" * 20, "Hello world it's we're all here 12345 and there"]
    made.train_from_iterator(texts * 10, vocab_size=TOKENS, special_tokens=["<|endoftext|>"], show_progress=False)
    assert made.get_vocab_size() == TOKENS
    directory.mkdir(exist_ok=True)
    made.save_model(str(directory))
    for name, fields in files.items():
        (directory / name).write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": ADDED, "pad_token": "<pad>"}},
        {
            "special_tokens_map.json": {"bos_token": END, "pad_token": "<pad>", "additional_special_tokens": ["<|im_start|>"]},
            "added_tokens.json": {"<extra>": 290, "<pad>": 291},
            "tokenizer_config.json": {"add_prefix_space": True, "add_bos_token": True},
        },
        {"tokenizer_config.json": {"add_bos_token": True, "add_eos_token": True, "extra_special_tokens": ["<|im_start|>"]}},
    ],
    ids=["bare", "added tokens by id", "older files", "ends"],
)
def test_vocabulary_and_merges_are_the_tokenizer_that_transformers_reads(tmp_path: Path, files: dict[str, Any]) -> None:
    from tokenizers import Tokenizer
    from transformers import GPT2TokenizerFast

    directory = with_vocabulary(tmp_path / "model", files)
    saved(directory, vocab_size=320)
    theirs, data = GPT2TokenizerFast.from_pretrained(directory), load_checkpoint(directory)[2]
    assert data is not None
    ours = Tokenizer.from_str(data.decode())
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.get_vocab_size() == len(theirs)


def test_a_lowered_model_carries_a_tokenizer_that_was_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = with_vocabulary(tmp_path / "model", {})
    saved(directory, vocab_size=320)
    assert convert(directory).tokenizer is not None and not [record for record in caplog.records if record.name.startswith("privinf")]
    before = _fingerprint(directory)
    (directory / "added_tokens.json").write_text('{"<extra>": 290}')
    assert _fingerprint(directory) != before


@pytest.mark.parametrize(
    ("files", "without", "message"),
    [
        ({"tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"}}, (), "RobertaTokenizer"),
        ({"added_tokens.json": {"<extra>": 400}}, (), "the id 400"),
        ({}, ("merges.txt",), "vocab.json alone"),
        ({"tokenizer.model": ["not ours"]}, ("merges.txt", "vocab.json"), "tokenizer.model alone"),
    ],
    ids=["class", "ids", "half", "sentencepiece"],
)
def test_a_tokenizer_that_cannot_be_made_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: dict[str, Any], without: tuple[str, ...], message: str
) -> None:
    directory = with_vocabulary(tmp_path / "model", files)
    for name in without:
        (directory / name).unlink()
    assert tokenizer_of(directory) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert message in line and "token ids only" in line and "\n" not in line


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    for name, text in (
        ("vocab.json", "[1]"),
        ("merges.txt", "a b c d\n"),
        ("tokenizer_config.json", "{"),
        ("added_tokens.json", '{"a": "b"}'),
    ):
        directory = with_vocabulary(tmp_path / name, {})
        (directory / name).write_text(text)
        with pytest.raises(ConfigError, match=name):
            tokenizer_of(directory)
