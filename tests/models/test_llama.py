"""Llama's kind: directories of `LlamaForCausalLM` and `Qwen2ForCausalLM`, converted unchanged, against `transformers`' own logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from privinf.lowering import convert
from privinf.lowering.from_checkpoint import end_tokens_of
from privinf.models.base import Config
from privinf.models.checkpoint import load_checkpoint, save_checkpoint
from protocols.errors import ConfigError
from tests.support.alone import Alone
from tests.support.batches import Batches
from tests.support.families import generation_follows, pass_follows, refused, two_alone_follow
from tests.support.ladder import IDS, LOGIT_ERROR
from tests.support.two_party import Dealt

SIZES: dict[str, Any] = {"vocab_size": 201, "max_position_embeddings": 80, "hidden_size": 24, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40, "initializer_range": 0.15}
FLOAT = 2e-5  # of two float32 evaluations in different order, times the size of the logits
STRETCHED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


def saved(directory: Path, kind: str = "Llama", *, dtype: torch.dtype = torch.float32, shard: str | None = None, **fields: Any) -> Any:
    """Writes a random model as `transformers` does, with no parameter at its resting value; returns what `transformers` reads back."""
    import transformers

    config, model = (getattr(transformers, f"{kind}{part}") for part in ("Config", "ForCausalLM"))
    torch.manual_seed(0)
    made = model(config(bos_token_id=0, eos_token_id=0, **{**SIZES, **HEADS, **fields}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made.to(dtype).save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    return model.from_pretrained(directory).float().eval()


def theirs(model: Any, ids: tuple[int, ...] | list[int]) -> Tensor:
    """(T, V)."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
        ("Llama", {"num_key_value_heads": 4, "head_dim": 10, "tie_word_embeddings": True, "dtype": torch.float16}),
        ("Llama", {"rope_parameters": {"rope_theta": 500.0, **STRETCHED}}),
        ("Llama", {"rope_parameters": {"rope_theta": 100.0, "rope_type": "linear", "factor": 2.0}}),
        ("Qwen2", {"tie_word_embeddings": True, "dtype": torch.bfloat16, "shard": "20KB"}),
    ],
    ids=["grouped", "one head of keys, biases", "wide heads, tied", "llama3", "linear", "qwen2 in shards, tied"],
)
def test_ours_is_theirs(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    """Our float model at every position, and a private pass at the last, for what was predicted."""
    model = saved(tmp_path, kind, **fields)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("shard" in fields)
    wanted = theirs(model, IDS)
    with torch.no_grad():
        found = load_checkpoint(tmp_path)[0](torch.tensor([IDS]))[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT * max(1.0, float(wanted.abs().max())))
    lowered = convert(tmp_path)
    assert [node.op for node in lowered.graph.nodes if node.op in ("rotary", "repeat")] == []  # attention has taken them over
    pass_follows(lowered, wanted[-1], alone=False)


@pytest.mark.parametrize("count", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_cached_generation_follows_float(tmp_path: Path, count: int) -> None:
    """Keys are turned before they are kept; every token is float's best, or within the error of it."""
    model = saved(tmp_path)
    generation_follows(convert(tmp_path), partial(theirs, model), list(IDS[:5]), count)


def test_several_sequences_in_a_pass(tmp_path: Path) -> None:
    """Rotary positions and shared heads: each row at its own position, each sequence with its own keys; with a dealer and without."""
    model, lowered = saved(tmp_path), convert(tmp_path)
    for source in (Dealt, Alone):
        batches, so_far = Batches(lowered, source=source), dict[int, list[int]]()
        for new in ({0: [5, 7, 2, 11, 3], 1: [9]}, {1: [4, 1], 0: [8]}):
            found = batches.step(new, logits=True)
            so_far = {number: so_far.get(number, []) + ids for number, ids in new.items()}
            assert found.predicted.online_bytes == found.counted["online"]["payload"]
            assert float((found.client - torch.stack([theirs(model, so_far[number])[-1] for number in new])).abs().max()) < LOGIT_ERROR


def test_without_a_dealer(tmp_path: Path) -> None:
    """A prompt, and what follows it over cached keys that heads share; for exactly what was predicted."""
    model = saved(tmp_path / "theirs", num_hidden_layers=1)
    lowered = convert(tmp_path / "theirs")
    pass_follows(lowered, theirs(model, IDS)[-1])
    two_alone_follow(lowered, partial(theirs, model), list(IDS[:4]), tmp_path / "cache")


def test_angles_stretched_from_the_context_itself(tmp_path: Path) -> None:
    """Where a file does not say what length they are stretched from, it is the checkpoint's own, as for `transformers`."""
    from transformers import LlamaForCausalLM

    saved(tmp_path, rope_parameters={"rope_theta": 100.0, **STRETCHED})
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    del fields["rope_parameters"]["original_max_position_embeddings"]
    file.write_text(json.dumps(fields))
    wanted = theirs(LlamaForCausalLM.from_pretrained(tmp_path).float().eval(), IDS)
    with torch.no_grad():
        found = load_checkpoint(tmp_path)[0](torch.tensor([IDS]))[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"eos_token_id": [7, 3]}, (7, 3)),
        ({"eos_token_id": 5}, (5,)),
        ({"temperature": 0.6}, (4,)),
        ({"eos_token_id": [7, 201, -1]}, (7,)),
        (None, (4,)),
    ],
    ids=str,
)
def test_what_ends_a_text_is_what_transformers_generates_by(given: dict[str, Any] | None, found: tuple[int, ...], tmp_path: Path) -> None:
    """`generation_config.json` goes before the configuration; an id outside of the vocabulary ends nothing."""
    file = tmp_path / "generation_config.json"
    if given is not None:
        file.write_text(json.dumps(given))
    config = Config(model_type="llama", vocab_size=201, n_positions=8, n_embd=8, n_layer=1, n_head=1, eos_token_id=4)
    assert end_tokens_of(tmp_path, config) == found


@pytest.mark.parametrize("text", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [1, true]}', "{"])
def test_end_tokens_that_are_none_are_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        end_tokens_of(tmp_path, Config(model_type="llama", vocab_size=201, n_positions=8, n_embd=8, n_layer=1, n_head=1))


def test_what_we_write_is_read_by_transformers(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    wanted = theirs(saved(tmp_path / "theirs", rope_parameters={"rope_theta": 500.0, **STRETCHED}), IDS)
    model, config, _ = load_checkpoint(tmp_path / "theirs")
    save_checkpoint(model, config, tmp_path / "ours", torch.float32)
    found = theirs(LlamaForCausalLM.from_pretrained(tmp_path / "ours").float().eval(), IDS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT * float(wanted.abs().max()))
    assert load_checkpoint(tmp_path / "ours")[1] == config


def test_its_tokenizer_comes_along(tmp_path: Path) -> None:
    """As `transformers` saves the fast class: a file that we take as it is."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    bare = ByteLevelBPETokenizer()
    bare.train_from_iterator(["def main(): pass\n" * 20], vocab_size=280, show_progress=False)
    saved(tmp_path, vocab_size=300)
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bare.to_str()), eos_token="</s>")
    fast.save_pretrained(tmp_path)
    data = convert(tmp_path).tokenizer
    assert data is not None and Tokenizer.from_buffer(data).encode("def main():").ids == fast("def main():")["input_ids"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mistral"}, r"'mistral' is not supported; it must be .*'qwen2'.*'llama'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type: \"yarn\" is not supported; it must be 'default', 'linear' or",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, 'rope_type: "dynamic" is not supported'),
        ({"rope_scaling": {"type": "linear", "factor": "2"}, "rope_parameters": None}, "rotary positions"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rotary positions .* at rope_theta"),
        ({"rope_parameters": {"rope_type": "linear"}}, 'rope_type: "linear" needs factor'),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, 'rope_type: "llama3" needs low_freq_factor and high_freq_factor'),
        ({"rope_parameters": {**STRETCHED, "low_freq_factor": 4.0}}, "low_freq_factor must be below high_freq_factor"),
        ({"attention_bias": None}, "attention_bias: Input should be a valid boolean, not null"),
        ({"layer_types": 2}, "attention over a window is not supported"),
        ({"partial_rotary_factor": 0.5}, "only 1 is supported"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 of keys and values evenly"),
        ({"num_attention_heads": 5, "head_dim": None}, "24 is not a multiple of num_attention_heads, 5"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act: \"gelu\" is not supported; it must be 'silu'"),
        ({"sliding_window": 16}, "attention over a window is not supported"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}, "attention over a window is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "attention over a window is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved: true changes the function and is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: .* changes the function and is not supported"),
        ({"num_hidden_layers": None}, "num_hidden_layers: missing"),
        ({"num_attention_heads": None, "head_dim": None}, "num_attention_heads: missing"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"vocab_size": 202}, r"shape \[201, 24\], expected \[202, 24\]"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_told_in_a_line(tmp_path: Path, changes: dict[str, Any], told: str, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "model")
    refused(tmp_path / "model", told, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    saved(directory, shard="20KB")
    return directory


def test_damaged_weights_are_told_in_a_line(tmp_path: Path, whole: Path) -> None:
    def refused(told: str) -> None:
        with pytest.raises(ConfigError, match=told) as caught:
            load_checkpoint(tmp_path / "model")
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)

    shutil.copytree(whole, tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    tensors = load_file(shards[1])
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * float("nan")}, shards[1])
    refused(f"{name}: a value is not finite")
    save_file({key: value for key, value in tensors.items() if key != name}, shards[1])
    refused(f"{name}: missing")
    shards[1].unlink()
    refused(f"{shards[1].name}: no such file")


def test_a_long_context_is_cut_to_what_a_private_softmax_takes(tmp_path: Path) -> None:
    saved(tmp_path, max_position_embeddings=131072, num_hidden_layers=1)
    assert load_checkpoint(tmp_path)[1].n_positions == 1024
