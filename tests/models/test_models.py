"""The ladder's models against independent references, the strictness of configurations, and the shipped model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from privinf.models.aero import AeroModel
from privinf.models.base import Activations, configure
from privinf.models.checkpoint import load_checkpoint, load_tokenizer
from privinf.training.entropy import entropy_penalty, head_entropy
from privinf.training.ladder import ladder_config
from protocols.errors import ConfigError
from tests.support.aero import AERO, LADDER, SHIPPED, SIZES, random_model, some_ids

# ---- the function


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
@pytest.mark.parametrize("inner", [None, 24])
def test_gpt2_is_torchs_own_pre_norm_transformer(activation: str, inner: int | None) -> None:
    config = configure(SIZES | {"model_type": "gpt2", "activation_function": activation, "n_inner": inner})
    assert config.variant == ("SM+LN+R" if activation == "relu" else "SM+LN+G")
    source = random_model("SM+LN+G", n_inner=inner, tie_word_embeddings=True)
    model = AeroModel(config).double().eval()
    model.load_state_dict(source.state_dict())
    function = {"relu": F.relu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}[activation]
    ids = some_ids()
    x = F.embedding(ids, model.wte.weight) + model.wpe.weight[: ids.shape[1]]
    for block in model.h:
        layer = nn.TransformerEncoderLayer(16, 4, inner or 64, 0.0, function, batch_first=True, norm_first=True).double().eval()
        names = {
            "self_attn.in_proj_": "attn.c_attn.",
            "self_attn.out_proj.": "attn.c_proj.",
            "linear1.": "mlp.c_fc.",
            "linear2.": "mlp.c_proj.",
            "norm1.": "ln_1.",
            "norm2.": "ln_2.",
        }
        state = block.state_dict()
        layer.load_state_dict(
            {
                there + kind: state[here + kind].t() if state[here + kind].dim() == 2 else state[here + kind]
                for there, here in names.items()
                for kind in ("weight", "bias")
            }
        )
        x = layer(x, nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=torch.float64), is_causal=True)
    x = F.layer_norm(x, (16,), model.ln_f.weight, model.ln_f.bias, config.layer_norm_epsilon)
    torch.testing.assert_close(model(ids), x @ model.wte.weight.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["SM+ScFFN", "SM(t)+ScFuFFN", "SM+ScFuFFN_i2", "SM+R"])
def test_variants_without_layernorm_follow_the_papers_formulas(variant: str) -> None:
    model = random_model(variant)
    config, w = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    ids = some_ids(batch=1)[0].tolist()
    x = np.array([w["wte.weight"][token] + w["wpe.weight"][i] for i, token in enumerate(ids)])
    for layer in range(3):
        part = {name.removeprefix(f"h.{layer}."): value for name, value in w.items() if name.startswith(f"h.{layer}.")}
        qkv = x @ part["attn.c_attn.weight"] + part["attn.c_attn.bias"]
        mixed = np.zeros_like(x)
        for head in range(4):
            q, k, v = (qkv[:, 16 * which + 4 * head : 16 * which + 4 * head + 4] for which in range(3))
            for i in range(len(ids)):  # one query at a time, and only the past is there to look at
                t = part["attn.temperature"][head, i] if config.attn_temperature else 1.0
                scores = np.array([q[i] @ k[j] / (t * math.sqrt(4)) for j in range(i + 1)])
                weights = np.exp(scores - scores.max())
                mixed[i, 4 * head : 4 * head + 4] = (weights / weights.sum()) @ v[: i + 1]
        x = x + mixed @ part["attn.c_proj.weight"] + part["attn.c_proj.bias"]
        if layer in config.ffn_removed:
            continue
        if config.ffn == "fused":
            y = x @ part["mlp.fused.weight"] + part["mlp.fused.bias"]
        else:
            y = x @ part["mlp.c_fc.weight"] + part["mlp.c_fc.bias"]
            y = (np.maximum(y, 0) if config.ffn == "relu" else y) @ part["mlp.c_proj.weight"] + part["mlp.c_proj.bias"]
        x = part["mlp.beta"] * x + y / part["mlp.alpha"] if config.ffn_scaled else x + y
    expected = x @ w["lm_head.weight"].T
    np.testing.assert_allclose(model(torch.tensor([ids]))[0].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", LADDER)
def test_names_go_both_ways_and_the_future_is_not_seen(variant: str) -> None:
    model = random_model(variant)
    assert model.config.variant == variant
    ids = some_ids()
    full = model(ids)
    torch.testing.assert_close(model(ids[:, :4]), full[:, :4], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(ids, last_only=True), full[:, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", LADDER)
def test_folding_changes_no_logit_and_leaves_no_scalar(variant: str, tied: bool) -> None:
    model = random_model(variant, dtype=torch.float32, tie_word_embeddings=tied)
    if model.config.ffn_scaled and len(model.config.ffn_removed) < 3:
        with torch.no_grad():
            model.h[0].mlp.beta.neg_()  # a negative beta turns the stream over
    ids = some_ids()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = model.folded()
    expected = model(ids)
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(folded(ids), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(folded(ids, last_only=True), expected[:, -1], rtol=0, atol=tolerance)
    assert not [name for name, _ in folded.named_parameters() if name.endswith(("alpha", "beta")) or name.endswith(".temperature")]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert folded.folded() is folded


def test_a_beta_of_zero_cannot_be_folded() -> None:
    model = random_model("SM+ScFuFFN")
    with torch.no_grad():
        model.h[1].mlp.beta.zero_()
    with pytest.raises(ConfigError, match=r"h\.1\.mlp\.beta"):
        model.folded()


@pytest.mark.parametrize("last_only", [False, True])
def test_a_folded_model_exports_to_plain_operators(last_only: bool) -> None:
    folded = random_model("SM(t)+ScFuFFN_i1", dtype=torch.float32).folded()
    graph = torch.export.export(folded, (some_ids(),), {"last_only": last_only}).graph
    found = {str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function" and "aten" in str(node.target)}
    assert found <= {
        "embedding",
        "slice",
        "add",
        "matmul",
        "split",
        "reshape",
        "transpose",
        "mul",
        "unsqueeze",
        "masked_fill",
        "softmax",
        "linear",
        "select",
        "view",
        "clone",
        "_unsafe_view",
    }, found


def test_training_form_and_inference_form_agree() -> None:
    model = random_model("SM(t)+ScFuFFN")
    expected = model(some_ids())
    torch.testing.assert_close(model.train()(some_ids()), expected, rtol=1e-9, atol=1e-9)
    trace = Activations(keep_attention=True)
    torch.testing.assert_close(model(some_ids(), trace=trace), expected, rtol=1e-9, atol=1e-9)
    assert [len(x) for x in (trace.attention, trace.queries, trace.residual)] == [3, 3, 7]
    torch.testing.assert_close(trace.attention[0].sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))


def test_entropy_and_its_penalty() -> None:
    one_hot, uniform = torch.eye(8).expand(1, 2, 8, 8), torch.full((1, 2, 8, 8), 1 / 8)
    torch.testing.assert_close(head_entropy(one_hot), torch.zeros(1, 2))
    torch.testing.assert_close(head_entropy(uniform), torch.full((1, 2), math.log(8)))
    theta = torch.tensor([[0.5, 0.1], [0.9, 0.5]])  # in parts of log T: distances 0.5, 0.1 | 0.1, 0.5
    penalty = entropy_penalty([one_hot, uniform], theta, gamma=0.2)
    torch.testing.assert_close(penalty, torch.tensor(2 * (0.5 * math.log(8)) ** 2 / 4))


# ---- configurations


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "mistral"}, ["model_type", "llama"]),
        ({"model_type": None}, ["model_type"]),
        ({"n_embd": "16"}, ["n_embd"]),
        ({"n_embd": 16.0}, ["n_embd"]),
        ({"n_layer": True}, ["n_layer"]),
        ({"n_layer": 0}, ["n_layer"]),
        ({"n_head": 5}, ["n_embd", "n_head"]),
        ({"n_positions": -1, "vocab_size": 0}, ["n_positions", "vocab_size"]),
        ({"n_positions": 10**12}, ["n_positions"]),
        ({"layer_norm_epsilon": 0.0}, ["layer_norm_epsilon"]),
        ({"layer_norm_epsilon": float("nan")}, ["layer_norm_epsilon"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings"]),
        ({"eos_token_id": 23}, ["eos_token_id"]),
        ({"bos_token_id": -1}, ["bos_token_id"]),
        ({"norm": "rmsnorm"}, ["norm", "rmsnorm"]),
        ({"ffn": "swiglu"}, ["ffn", "swiglu"]),
        ({"ffn": ...}, ["ffn", "missing"]),
        ({"n_head": ...}, ["n_head", "missing"]),
        ({"ffn_removed": [3]}, ["ffn_removed", "3"]),
        ({"ffn_removed": [1, 1]}, ["ffn_removed", "twice"]),
        ({"ffn_removed": ["1"]}, ["ffn_removed"]),
        ({"ffn_removed": 1}, ["ffn_removed"]),
        ({"ffn_scaled": "yes"}, ["ffn_scaled"]),
        ({"attn_temprature": True}, ["attn_temprature", "attn_temperature"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"model_type": "gpt2", "scale_attn_weights": False}, ["scale_attn_weights"]),
        ({"model_type": "gpt2", "add_cross_attention": True}, ["add_cross_attention"]),
        ({"model_type": "gpt2", "activation_function": "silu"}, ["activation_function", "silu"]),
    ],
)
def test_a_bad_configuration_is_refused_by_the_name_of_the_field(change: dict[str, Any], names: list[str]) -> None:
    fields = {name: value for name, value in (AERO | change).items() if value is not ...}
    with pytest.raises(ConfigError) as caught:
        configure(fields)
    message = str(caught.value)
    assert all(name in message for name in names), message
    assert "\n" not in message and len(message) < 400


def test_a_gpt2_directory_may_say_much_more() -> None:
    config = configure(
        SIZES
        | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "summary_type": "cls_index",
            "use_cache": True,
            "n_inner": None,
            "torch_dtype": "float32",
            "eos_token_id": 50256,
            "bos_token_id": 50256,
            "scale_attn_weights": True,
            "reorder_and_upcast_attn": False,
            "task_specific_params": {"text-generation": {"do_sample": True}},
            "n_ctx": 1024,
        }
    )
    assert (config.variant, config.tie_word_embeddings, config.inner_width, config.stop_ids) == ("SM+LN+G", True, 64, {50256})
    assert configure(json.loads(config.to_json())) == config


@pytest.mark.parametrize("name", ["SM+XY", "", "LN+G", "SM+ScFuFFN_i4", "SM+ScFuFFN_i"])
def test_names_off_the_ladder_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="variant"):
        ladder_config(name, **SIZES)


# ---- the shipped model


def test_the_shipped_model_is_small_whole_and_within_the_ring() -> None:
    model, config, tokenizer_file = load_checkpoint(SHIPPED)
    assert tokenizer_file is not None and (SHIPPED / "model.safetensors").stat().st_size <= 12 << 20
    assert (config.variant, config.n_layer, config.n_embd, config.n_positions) == ("SM(t)+ScFuFFN", 6, 256, 256)
    tokenizer = load_tokenizer(tokenizer_file, config)
    assert config.stop_ids == {tokenizer.token_to_id("<|endoftext|>")} and tokenizer.get_vocab_size() == config.vocab_size
    text = Path(__file__).read_text("utf-8")  # Python that it was not trained on
    ids = torch.tensor(tokenizer.encode(text).ids[: 8 * 256]).reshape(8, 256)
    trace = Activations()
    logits = model(ids, trace=trace)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) < 4.5  # ln 3072 is 8.03
    assert max(float((q @ k.transpose(2, 3)).abs().max()) for q, k in zip(trace.queries, trace.keys, strict=True)) < 64
    assert max(float(x.abs().max()) for x in trace.residual) < 48 and float(logits.abs().max()) < 40
    torch.testing.assert_close(model.folded()(ids[:1]), logits[:1], rtol=0, atol=3e-4)
