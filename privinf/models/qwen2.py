"""Qwen 2 as Hugging Face's `Qwen2ForCausalLM.save_pretrained` writes it: Llama's kind with biases of q, k and v.

Source: Yang et al., "Qwen2 Technical Report" (arXiv 2407.10671).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from privinf.models.llama import Llama


class Qwen2(Llama):
    """See `Llama`."""

    model_type = "qwen2"

    def check(self, fields: Mapping[str, Any], source: str) -> None:
        super().check({"use_sliding_window": False, **fields}, source)

    def biases(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"qkv_bias": True}
