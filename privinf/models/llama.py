"""Llama as Hugging Face's `LlamaForCausalLM.save_pretrained` writes it, and a road of AERO's kind from there to softmax alone.

Sources: Touvron et al., "LLaMA" (arXiv 2302.13971): RMSNorm, rotary positions, an FFN gated by SiLU; Ainslie et al., "GQA" (arXiv
2305.13245): heads that share keys and values; Jha and Reagen, "AERO" (arXiv 2410.13060): what may go.

B batch, T tokens, H heads, K heads of keys and values, d_k their width, d model width, V vocabulary. Tensors have Hugging Face's names.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import torch
from pydantic import Field, InstanceOf, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from privinf.models.base import Activations, Config, Decoder, Family
from privinf.models.folding import read, take_scalars, write
from protocols.errors import ConfigError
from protocols.rotary import Rotation, floats, turned

log = logging.getLogger("privinf.models")

CONTEXT = 1024  # positions, whatever more a checkpoint would take: a private softmax is right for rows of so many
NAMES = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "head_dim": "head_width",
        "intermediate_size": "n_inner",
        "rms_norm_eps": "norm_epsilon",
        "tie_word_embeddings": "tie_word_embeddings",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "norm": "norm",
        "ffn": "ffn",
        "ffn_scaled": "ffn_scaled",
    }
)
"""Of the fields of a `config.json`, with ours; the last three are not Hugging Face's."""
ROPE = MappingProxyType(
    {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high", "original_max_position_embeddings": "original"}
)


class LlamaConfig(Config):
    """One model of Llama's kind. More than a dozen attributes: what its file has, and three fields of the road."""

    model_type: Literal["llama", "qwen2"]
    n_kv_head: int = Field(ge=1, le=100_000)
    head_width: int = Field(ge=2, le=65_536, multiple_of=2)
    n_inner: int = Field(ge=1, le=10_000_000)
    norm_epsilon: float = Field(default=1e-6, gt=0, lt=1)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rotation: InstanceOf[Rotation]
    norm: Literal["rmsnorm", "none"] = "rmsnorm"
    ffn: Literal["swiglu", "glu", "fused"] = "swiglu"
    ffn_scaled: bool = False

    @model_validator(mode="after")
    def _fields_agree(self) -> LlamaConfig:
        if self.n_head % self.n_kv_head:
            raise ValueError(f"num_attention_heads: {self.n_head} heads cannot share {self.n_kv_head} of keys and values evenly")
        return self

    @property
    def variant(self) -> str:
        """The name on the road: `SM+RN+SwiGLU` is Llama, `SM+ScFuFFN` has softmax alone."""
        ffn = {"swiglu": "SwiGLU", "glu": "GLU", "fused": "FuFFN"}[self.ffn]
        return "+".join(["SM", *(["RN"] if self.norm == "rmsnorm" else []), ("Sc" if self.ffn_scaled else "") + ffn])

    def to_json(self) -> str:
        """The text of `config.json`, as `transformers` reads it."""
        own = self.model_dump(mode="json", exclude_none=True, exclude={"rotation"})
        fields = {name: own[ours] for name, ours in NAMES.items() if ours in own}
        if self.variant == "SM+RN+SwiGLU":
            fields = {name: value for name, value in fields.items() if name not in ("norm", "ffn", "ffn_scaled")}
        rope: dict[str, Any] = {"rope_type": self.rotation.kind}
        if self.rotation.kind != "default":
            rope |= {
                name: getattr(self.rotation, ours) for name, ours in ROPE.items() if name == "factor" or self.rotation.kind == "llama3"
            }
        biases = {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias} if self.model_type == "llama" else {}
        theta = {"rope_theta": self.rotation.theta, "rope_scaling": None if self.rotation.kind == "default" else rope}
        known = {"model_type": self.model_type, "hidden_act": "silu", **theta, **biases}
        return json.dumps({**known, **fields}, indent=2) + "\n"


class Attention(nn.Module):
    """Causal attention of H heads of queries over K heads of keys and values, queries and keys turned by their positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.rotation, self.width, self.shared = config.rotation, config.head_width, config.n_head // config.n_kv_head
        inner, kept = config.n_head * config.head_width, config.n_kv_head * config.head_width
        self.q_proj = nn.Linear(config.n_embd, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, kept, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, kept, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, config.n_embd, bias=config.out_bias)

    def apart(self, x: Tensor, rotate: bool = False) -> Tensor:
        """x (B, T, heads * d_k) -> (B, heads, T, d_k), turned or not; turned by one operator where a graph is made of it."""
        if rotate and not self.training:
            x = torch.ops.privinf.rotary(x, *msgspec.structs.astuple(self.rotation))
        x = x.reshape(*x.shape[:2], -1, self.width).transpose(1, 2)  # (B, heads, T, d_k)
        if not rotate or not self.training:
            return x
        cosine, sine = (part.to(x) for part in floats(self.rotation, 0, x.shape[2]))
        found: Tensor = turned(x, cosine, sine)
        return found

    def forward(self, x: Tensor, trace: Activations | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        q, k = self.apart(self.q_proj(x), rotate=True), self.apart(self.k_proj(x), rotate=True)
        v = self.apart(self.v_proj(x))
        if trace is not None:
            trace.queries.append(q / math.sqrt(self.width))
            trace.keys.append(k.repeat_interleave(self.shared, 1))
        if trace is not None and trace.keep_attention:
            scores = trace.queries[-1] @ trace.keys[-1].mT  # (B, H, T, T)
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            trace.attention.append(scores.masked_fill(future, float("-inf")).softmax(-1))
            y = trace.attention[-1] @ v.repeat_interleave(self.shared, 1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.shared > 1)  # (B, H, T, d_k)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))
        return out


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)); without the SiLU (`glu`), or one matrix (`fused`). alpha divides it, beta multiplies the residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.silu, fused = config.ffn == "swiglu", config.ffn == "fused"
        self.gate_proj = None if fused else nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.up_proj = None if fused else nn.Linear(config.n_embd, config.n_inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.n_embd if fused else config.n_inner, config.n_embd, bias=config.mlp_bias)
        self.alpha = nn.Parameter(torch.ones(())) if config.ffn_scaled else None
        self.beta = nn.Parameter(torch.ones(())) if config.ffn_scaled else None

    @property
    def readers(self) -> list[nn.Linear]:
        """The maps that read the residual stream."""
        return [self.down_proj] if self.gate_proj is None or self.up_proj is None else [self.gate_proj, self.up_proj]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> (B, T, d), without the residual."""
        y = x
        if self.gate_proj is not None and self.up_proj is not None:
            gate = self.gate_proj(x)
            y = (F.silu(gate) if self.silu else gate) * self.up_proj(x)  # (B, T, inner)
        out: Tensor = self.down_proj(y)
        return out if self.alpha is None else out * (1 / self.alpha)


class Block(nn.Module):
    """X_sa = X + MHA(RN1(X)); X_out = beta X_sa + (1 / alpha) FFN(RN2(X_sa)), each part where the variant has it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        normed = config.norm == "rmsnorm"
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_epsilon) if normed else None
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_epsilon) if normed else None

    def forward(self, x: Tensor, trace: Activations | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        x = x + self.self_attn(x if self.input_layernorm is None else self.input_layernorm(x), trace)
        if trace is not None:
            trace.residual.append(x)
        y = self.mlp(x if self.post_attention_layernorm is None else self.post_attention_layernorm(x))
        x = (x if self.mlp.beta is None else x * self.mlp.beta) + y
        if trace is not None:
            trace.residual.append(x)
        return x


class Body(nn.Module):
    """What Hugging Face calls `model`: embedding, blocks, the last norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_epsilon) if config.norm == "rmsnorm" else None


class LlamaModel(Decoder):
    """Ids (B, T) to logits (B, T, V)."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, last_only: bool = False, trace: Activations | None = None) -> Tensor:
        """ids (B, T), 1 <= T <= n_positions -> logits (B, T, V), or (B, V) of the last position."""
        x = self.model.embed_tokens(ids)  # (B, T, d)
        if trace is not None:
            trace.residual.append(x)
        for block in self.model.layers:
            x = block(x, trace)
        if last_only:
            x = x[:, -1]  # (B, d)
        logits: Tensor = self.lm_head(x if self.model.norm is None else self.model.norm(x))
        return logits

    @torch.no_grad()
    def folded(self) -> LlamaModel:
        """The same function without learnable scalars (`privinf.models.folding`)."""
        if self.is_folded or not self.config.ffn_scaled:
            return self
        model, p = copy.deepcopy(self).eval(), 1.0
        model.is_folded = True
        for layer, block in enumerate(model.model.layers):
            assert isinstance(block, Block)
            attention, mlp = block.self_attn, block.mlp
            read(block.input_layernorm, [each.weight for each in (attention.q_proj, attention.k_proj, attention.v_proj)], p)
            write(attention.o_proj.weight, attention.o_proj.bias, p)
            read(block.post_attention_layernorm, [each.weight for each in mlp.readers], p)
            alpha, p = take_scalars(mlp, p, f"model.layers.{layer}.mlp")
            write(mlp.down_proj.weight, mlp.down_proj.bias, alpha * p)
        if model.model.norm is None and p != 1.0:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight * p, requires_grad=False)  # unties it
        read(model.model.norm, [], p)
        return model


class Llama(Family):
    """Such a directory comes from elsewhere, so fields that we do not know are ignored, unless they change the function."""

    model_type = "llama"
    config = LlamaConfig
    decoder = LlamaModel
    state = ("keys", "values")
    embedding = "model.embed_tokens.weight"
    fixed = MappingProxyType({"quantization_config": None, "rope_interleaved": False})

    def configure(self, fields: Mapping[str, Any], source: str) -> LlamaConfig:
        self.check(fields, source)
        known = {ours: fields[name] for name, ours in NAMES.items() if fields.get(name) is not None}
        heads, stream = known.get("n_head"), known.get("n_embd")
        known.setdefault("n_kv_head", heads)
        if isinstance(heads, int) and isinstance(stream, int) and heads > 0 and "head_width" not in known:
            if stream % heads:
                raise ConfigError(f"{source}: hidden_size: {stream} is not a multiple of num_attention_heads, {heads}")
            known["head_width"] = stream // heads
        if isinstance(positions := known.get("n_positions"), int) and positions > CONTEXT:
            log.info("%s: a context of %d positions; %d are used", source, positions, CONTEXT)
            known["n_positions"] = CONTEXT
        width = known.get("head_width", 2)  # where it is not known, what is missing is told below
        known |= self.biases(fields) | {"model_type": self.model_type, "rotation": _rotation(fields, width, source)}
        return _in_their_words(known, source)

    def check(self, fields: Mapping[str, Any], source: str) -> None:
        """ConfigError for settings that change the function."""
        if fields.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ConfigError(f"{source}: hidden_act: {_shown(fields['hidden_act'])} is not supported", remedy="it must be 'silu'")
        sliding = fields.get("sliding_window") is not None and fields.get("use_sliding_window", True) is not False
        kinds = fields.get("layer_types") or []
        if sliding or not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise ConfigError(
                f"{source}: sliding_window: attention over a window is not supported", remedy="every layer must attend to all positions"
            )

    def biases(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Which maps have one."""
        attention = fields.get("attention_bias", False)
        return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": fields.get("mlp_bias", False)}

    def unread(self, name: str, tensor: Tensor, config: LlamaConfig) -> bool:
        """Old files carry the angles of one position."""
        return name.endswith("rotary_emb.inv_freq")

    def fault(self, name: str, tensor: Tensor) -> str:
        return "a value is not positive" if name.endswith("mlp.alpha") and not bool((tensor > 0).all()) else ""


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


def _in_their_words(known: Mapping[str, Any], source: str) -> LlamaConfig:
    """The configuration; ConfigError in the names that its file has."""
    try:
        return LlamaConfig.checked(known, source)
    except ConfigError as error:
        text = str(error)
        for name, ours in (*NAMES.items(), ("attention_bias", "qkv_bias"), ("attention_bias", "out_bias")):
            text = text.replace(f" {ours}: ", f" {name}: ")
        raise ConfigError(text) from None


def _rotation(fields: Mapping[str, Any], width: Any, source: str) -> Rotation:
    """Of `rope_parameters`, or of `rope_theta` and `rope_scaling` as older files have it."""
    given: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = fields.get(name)
        if part is not None and not isinstance(part, dict):
            raise ConfigError(f"{source}: {name}: {_shown(part)} is no object")
        given |= part or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"{source}: rope_type: {_shown(kind)} is not supported", remedy="it must be 'default', 'linear' or 'llama3'")
    if given.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"{source}: partial_rotary_factor: only 1 is supported, which turns whole heads")
    wanted = {"default": [], "linear": ["factor"], "llama3": list(ROPE)}[kind]
    if kind == "llama3":  # as `transformers` takes it, whose field beside the others goes first
        length = fields.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
        given["original_max_position_embeddings"] = fields.get("max_position_embeddings", 1) if length is None else length
    if missing := [name for name in wanted if name not in given]:
        raise ConfigError(f"{source}: rope_type: {_shown(kind)} needs {' and '.join(missing)}")
    theta = given.get("rope_theta", fields.get("rope_theta", 10_000.0))
    try:
        return msgspec.convert({"width": width, "theta": theta, "kind": kind, **{ROPE[name]: given[name] for name in wanted}}, Rotation)
    except msgspec.ValidationError as error:
        told = str(error)
        for name, ours in (("head_dim", "width"), ("rope_theta", "theta"), *ROPE.items()):
            told = told.replace(f"at `$.{ours}`", f"at {name}")
        raise ConfigError(f"{source}: the rotary positions (head_dim, rope_theta, rope_scaling): {told}") from None
