"""GPT-2 as Hugging Face's `GPT2LMHeadModel.save_pretrained` writes it: the ladder's `SM+LN+G` and `SM+LN+R`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from privinf.models.aero import LADDER, Aero, AeroConfig


class Gpt2(Aero):
    """Such a directory comes from elsewhere, so fields that we do not know are ignored, unless they change the function."""

    model_type = "gpt2"

    def configure(self, fields: Mapping[str, Any], source: str) -> AeroConfig:
        known = {name: value for name, value in fields.items() if name in AeroConfig.model_fields and name not in LADDER}
        known.setdefault("activation_function", "gelu_new")
        known["ffn"] = "relu" if known["activation_function"] == "relu" else "gelu"
        return AeroConfig.checked(known, source)
