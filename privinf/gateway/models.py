"""The one model as callers see it: under which names, and what its server grants."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI

from privinf.gateway.engine import Engine
from privinf.gateway.wire import ApiError

WITH_LOGITS = ("temperature", "logprobs", "echo", "frequency_penalty", "presence_penalty", "logit_bias", "response_format")
"""What a server grants beside the greedy choice that gives rounded logits."""


class Models:
    """The one model, by its name and by its id."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self.names, self._started = engine, (name, engine.model.lowered.id), int(time.time())

    def described(self, model: str) -> dict[str, Any]:
        """As `/v1/models` has it."""
        shown = self._engine.model
        about = {
            "context_length": shown.lowered.info.n_positions,
            "variant": shown.lowered.info.variant,
            "logits": shown.logits,
            "grants": ["greedy", *(WITH_LOGITS if shown.logits else ()), *(["tools"] if shown.chat.tools else ())],
            "fingerprint": shown.lowered.id,
        }
        return {"id": model, "object": "model", "created": self._started, "owned_by": "privinf", "privinf": about}

    def check(self, model: str) -> None:
        """ApiError for another one."""
        if model not in self.names:
            message = f"there is no model {model[:100]!r} here; there is {self.names[0]!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


def add_models(app: FastAPI, models: Models) -> None:
    """Their two paths."""

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [models.described(model) for model in models.names]}

    @app.get("/v1/models/{model}")
    async def one_model(model: str) -> dict[str, Any]:
        models.check(model)
        return models.described(model)
