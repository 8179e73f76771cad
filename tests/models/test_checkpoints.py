"""Checkpoints: what is saved is loaded, and what is damaged, bad or too much is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from privinf.models.aero import AeroModel
from privinf.models.base import configure
from privinf.models.checkpoint import load_checkpoint, load_tokenizer, save_checkpoint
from protocols.errors import ConfigError
from tests.support.aero import AERO, LADDER, SHIPPED, SIZES, random_model, some_ids


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, AeroModel]:
    model = random_model("SM(t)+ScFuFFN_i1", dtype=torch.float32, tie_word_embeddings=False)
    save_checkpoint(model, model.config, tmp_path, torch.float32)
    return tmp_path, model


def edit(directory: Path, **changes: Any) -> None:
    """Replaces tensors; None removes one."""
    tensors = load_file(directory / "model.safetensors") | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, directory / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", LADDER)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_loaded(tmp_path: Path, variant: str, dtype: torch.dtype, tied: bool) -> None:
    model = random_model(variant, dtype=torch.float32, tie_word_embeddings=tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("alpha", "beta", "temperature")):
                parameter.copy_(parameter.to(dtype))
    save_checkpoint(model, model.config, tmp_path, dtype)
    loaded, config, tokenizer = load_checkpoint(tmp_path)
    assert config == model.config and tokenizer is None
    torch.testing.assert_close(loaded(some_ids()), model(some_ids()), rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_what_other_writers_leave_is_accepted(tmp_path: Path) -> None:
    model = random_model("SM+LN+G", dtype=torch.float32, tie_word_embeddings=True)
    with torch.no_grad():
        model.h[0].attn.c_proj.bias.zero_()
    state = {"transformer." + name: value for name, value in model.state_dict().items() if not name.startswith("lm_head")}
    del state["transformer.h.0.attn.c_proj.bias"]  # absent is zero
    state["lm_head.weight"] = model.wte.weight.detach().clone()
    for layer in range(3):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.uint8).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "gpt2", "activation_function": "gelu_new"}))
    loaded, _, _ = load_checkpoint(tmp_path)
    torch.testing.assert_close(loaded(some_ids()), model(some_ids()))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"wte__weight": None}, ["wte.weight", "missing"]),
        ({"lm_head__weight": None}, ["lm_head.weight", "missing"]),
        (
            {"h__1__attn__c_attn__weight": None, "h__2__attn__temperature": None},
            ["h.1.attn.c_attn.weight", "h.2.attn.temperature", "missing"],
        ),
        ({"h__3__attn__c_attn__weight": torch.zeros(16, 48)}, ["h.3.attn.c_attn.weight", "surplus"]),
        ({"h__2__mlp__fused__weight": torch.zeros(16, 16)}, ["h.2.mlp.fused.weight", "surplus"]),  # that layer has no FFN
        ({"ln_f__weight": torch.ones(16)}, ["ln_f.weight", "surplus"]),
        ({"transformer__wte__weight": torch.zeros(23, 16)}, ["wte.weight", "twice"]),
        ({"h__0__attn__c_attn__weight": torch.zeros(48, 16)}, ["h.0.attn.c_attn.weight", "[48, 16]", "[16, 48]"]),
        ({"wpe__weight": torch.zeros(13, 16)}, ["wpe.weight", "shape"]),
        ({"h__0__mlp__alpha": torch.ones(2)}, ["h.0.mlp.alpha", "shape"]),
        ({"wte__weight": torch.full((23, 16), float("nan"))}, ["wte.weight", "finite"]),
        ({"h__1__attn__c_proj__bias": torch.full((16,), float("inf"))}, ["h.1.attn.c_proj.bias", "finite"]),
        ({"h__0__mlp__alpha": torch.tensor(0.0)}, ["h.0.mlp.alpha", "positive"]),
        ({"h__0__attn__temperature": -torch.ones(4, 12)}, ["h.0.attn.temperature", "positive"]),
        ({"wte__weight": torch.zeros(23, 16, dtype=torch.float64)}, ["wte.weight", "float64"]),
        ({"wte__weight": torch.zeros(23, 16, dtype=torch.int8)}, ["wte.weight", "int8"]),
    ],
)
def test_a_bad_tensor_is_refused_by_name(saved: tuple[Path, AeroModel], change: dict[str, Any], names: list[str]) -> None:
    edit(saved[0], **change)
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(saved[0])
    assert all(name in str(caught.value) for name in names), str(caught.value)
    assert caught.value.exit_code == 2


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    model = random_model("SM+ScFuFFN", dtype=torch.float32, tie_word_embeddings=True)
    save_checkpoint(model, model.config, tmp_path, torch.float32)
    edit(tmp_path, lm_head__weight=model.wte.weight.detach() + 1)
    with pytest.raises(ConfigError, match=r"lm_head\.weight.*tie_word_embeddings"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        "no directory",
        "no config",
        "no weights",
        "config is text",
        "config is a list",
        "truncated",
        "empty",
        "header too long",
        "pickle",
        "weights are a directory",
    ],
)
def test_damaged_directories_are_refused_by_file(saved: tuple[Path, AeroModel], damage: str) -> None:
    directory, weights = saved[0], saved[0] / "model.safetensors"
    named = "config.json" if "config" in damage else "model.safetensors"
    if damage == "no directory":
        directory, named = directory / "nowhere", "nowhere"
    elif damage == "no config":
        (directory / named).unlink()
    elif damage == "config is text":
        (directory / named).write_bytes(b"\xff{")
    elif damage == "config is a list":
        (directory / named).write_text("[]")
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "header too long":
        weights.write_bytes(struct.pack("<Q", 2**60) + weights.read_bytes()[8:])
    elif damage == "pickle":
        torch.save({"wte.weight": torch.zeros(2)}, weights)
    else:
        weights.unlink()
        if damage == "weights are a directory":
            weights.mkdir()
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(directory)
    assert named in str(caught.value)


def test_a_failed_save_leaves_the_old_file(saved: tuple[Path, AeroModel]) -> None:
    directory, model = saved
    before = (directory / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.wte.weight[0, 0] = 1e6  # not finite in float16
    with pytest.raises(ConfigError, match=r"wte\.weight"):
        save_checkpoint(model, model.config, directory)
    with pytest.raises(ConfigError, match="folded"):
        save_checkpoint(model.folded(), model.config, directory)
    assert (directory / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_a_tokenizer_must_be_one_and_fit(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for text in ("", "{}", '{"version": "1.0"}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"tokenizer\.json"):
            load_tokenizer(path)
    with pytest.raises(ConfigError, match="vocab_size"):
        load_tokenizer(SHIPPED / "tokenizer.json", configure(AERO))
