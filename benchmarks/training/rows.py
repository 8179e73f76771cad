"""The rows of the ladder that are trained, and the sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from privinf.models.aero import AeroConfig
from privinf.training.families import FamilyName, TrainedConfig, variant_config
from privinf.training.ladder import ladder_config

SMALL: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 1024, "n_positions": 128}
SHIPPED: dict[str, Any] = {"n_layer": 6, "n_head": 8, "n_embd": 256, "vocab_size": 3072, "n_positions": 256}
GPT2: dict[str, Any] = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 256}
SMOLLM2: dict[str, Any] = {"n_layer": 30, "n_head": 9, "kv_heads": 3, "n_embd": 576, "vocab_size": 49152, "n_positions": 256}


@dataclass(frozen=True)
class Row:
    """One row of a table: a network and how it is trained; `aero` is AERO's perplexity (CodeParrot, T = 128).

    `sizes` are what it does not share with the other rows, and whatever else its family asks for; so are `steps`, if any.
    """

    name: str
    variant: str
    settings: dict[str, Any] = field(default_factory=dict)
    aero: float | None = None
    diverges_at_aero: bool = False
    family: FamilyName = "aero"
    sizes: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None

    def config(self, sizes: dict[str, Any]) -> TrainedConfig:
        """Of its network at these sizes."""
        return variant_config(self.family, self.variant, **ENDS | sizes | self.sizes)

    @property
    def slug(self) -> str:
        """As a directory's name."""
        kept = "".join(character if character.isalnum() else "-" for character in self.name)
        return "-".join(part for part in kept.split("-") if part)


ENDS: dict[str, Any] = {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
EREG = {"entropy_lambda": 1e-2}
# GPT-2's first weights, three times the rate, and nothing of ours that holds the stream: no range penalty, no clipping.
UNHELD: dict[str, Any] = {"initial": "gpt2", "limits": {"weight": 0.0}, "learning_rate": 1e-2, "clip": 1e9}
ROWS_HELD = {"row_weight": 5e-2}  # each row's log-mean-exp, with its offset, in [-2.5, 2]: what a softmax without a maximum asks for
ROWS = (
    Row("SM+LN+G", "SM+LN+G", aero=2.69),
    Row("SM+LN+R", "SM+LN+R", aero=2.76),
    Row("SM+LN", "SM+LN", aero=3.38),
    Row("SM+G", "SM+G", aero=3.20),
    Row("SM+R", "SM+R", aero=2.94),
    Row("SM", "SM", diverges_at_aero=True),
    Row("SM, unheld", "SM", UNHELD, diverges_at_aero=True),
    Row("SM+ScFFN, unheld", "SM+ScFFN", UNHELD),
    Row("SM, weight norm", "SM", {"ffn_norm": "weight"}, aero=3.640),
    Row("SM, spectral norm", "SM", {"ffn_norm": "spectral"}, aero=3.624),
    Row("SM+ScFFN", "SM+ScFFN", aero=3.50),
    Row("SM+ScFuFFN", "SM+ScFuFFN", aero=3.48),
    Row("SM+ScFuFFN_i2", "SM+ScFuFFN_i2", aero=3.54),
    Row("SM(t)+ScFuFFN", "SM(t)+ScFuFFN"),
    Row("SM(t)+ScFuFFN, rows held", "SM(t)+ScFuFFN", ROWS_HELD),
    Row("EReg(SM(t)+ScFuFFN)", "SM(t)+ScFuFFN", EREG, aero=3.21),
    Row("EReg(SM(t)+ScFuFFN), AERO's lambda", "SM(t)+ScFuFFN", {"entropy_lambda": 1e-5}),
    Row(
        "EReg(SM(t)+ScFuFFN), AERO's lambda, t and first weights",
        "SM(t)+ScFuFFN",
        {"entropy_lambda": 1e-5, "temperature": 1e-2, "initial": "gpt2"},
    ),
    Row("EReg(SM(t)+ScFuFFN_i2)", "SM(t)+ScFuFFN_i2", EREG, aero=3.25),
)
STRUCTURES = ("SM+LN+G", "SM+LN+R", "SM+LN", "SM+G", "SM+R", "SM", "SM+ScFFN", "SM+ScFuFFN", "SM+ScFuFFN_i{half}", "SM(t)+ScFuFFN")


def config_of(variant: str, sizes: dict[str, Any]) -> AeroConfig:
    """`{half}` is half of the layers."""
    return ladder_config(variant.format(half=sizes["n_layer"] // 2), **ENDS, **sizes)
