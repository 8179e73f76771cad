"""What is said of a whole model, to people and in the handshake."""

from __future__ import annotations

from typing import Literal

import msgspec


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input of the graph; a size of None is any length from 1 to n_positions."""

    name: str
    kind: Literal["ids", "float"]
    shape: tuple[int | None, ...]


class Info(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model is, for people and for the handshake. Sizes are 0 where a lowered module has no such thing."""

    variant: str
    inputs: tuple[InputSpec, ...]
    output: tuple[int, ...]
    layers: int = 0
    heads: int = 0
    width: int = 0
    vocab: int = 0
    n_positions: int = 0
    bos: int | None = None
    eos: tuple[int, ...] = ()
    chat_template: str = ""  # Jinja, as the checkpoint's tokenizer has it; empty if it has none

    @property
    def any_length(self) -> bool:
        """Whether the graph takes inputs of any length (a converted checkpoint) or of one shape (a lowered module)."""
        return any(None in spec.shape for spec in self.inputs)

    @property
    def input_kind(self) -> Literal["ids", "float"]:
        """Of the first input: token ids, or real numbers."""
        return self.inputs[0].kind

    @property
    def is_language_model(self) -> bool:
        """Whether the one input is a prompt of any length."""
        return self.any_length and len(self.inputs) == 1 and self.inputs[0].kind == "ids"
