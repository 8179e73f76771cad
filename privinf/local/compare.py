"""One private pass and one float pass on the same prompt: where they differ, and by how much."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from privinf.client.text import Prompt
from privinf.local.session import LocalSession
from privinf.server.models import open_model
from privinf.session.options import Options


def compare(
    model: str | Path, *, prompt: str | None = None, ids: Sequence[int] | None = None, options: Options | None = None
) -> dict[str, Any]:
    """The contract's fields: errors per node inside the network and of the last position's logits, and both tokens.

    The private pass is `run`'s, by local processes; they dump every node's shares to a temporary directory that only
    this user can read. `max_abs_error` is that of the logits. `warnings` names values beyond the range that the plan
    allows for, where a ring may have wrapped. Raises PrivinfError.
    """
    options = options or Options()
    lowered = open_model(Path(model), options.cache)
    tokens = list(Prompt.read(lowered, prompt, ids).ids)
    with tempfile.TemporaryDirectory(prefix="privinf-compare-") as name:
        dump = Path(name)
        with LocalSession(lowered, options, dump=dump) as session:
            for _ in session.generate(ids=tokens, max_new_tokens=1, ignore_eos=True, logits=True):
                pass
        assert session.result is not None
        from privinf.local.child import decode_tensor

        private = decode_tensor(session.logits[0]).double().reshape(-1)
        layers, warnings, exact = _layers(lowered, tokens, dump)
    chosen, expected = int(private.argmax()), int(exact.argmax())
    return {
        "max_abs_error": float((private - exact).abs().max()),
        "layers": layers,
        "logits_private": private.tolist(),
        "logits_float": exact.tolist(),
        "tokens_private": [chosen],
        "tokens_float": [expected],
        "agree": chosen == expected,
        "warnings": warnings,
        "traffic": session.traffic,
        "parties": session.parties,
        "trust": session.result["trust"],
    }


def _layers(lowered: Any, tokens: list[int], dump: Path) -> tuple[list[dict[str, Any]], list[str], Tensor]:
    """Errors per node, warnings, and the float logits."""
    from privinf.local.probe import reconstruct
    from privinf.lowering.calibrate import beyond

    layers: list[dict[str, Any]] = []

    def observe(node: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        found, unit = reconstruct(dump, 0, node.name).reshape(output.shape), node.as_planned(torch.ones_like(output, dtype=torch.float64))
        error = float((found / unit - output.double()).abs().max())
        layers.append({"name": node.name, "max_abs_error": error})

    with torch.no_grad():
        exact = lowered.graph(torch.tensor([tokens]), observe=observe)
    warnings = beyond(lowered.graph, lowered.ranges, [torch.tensor([tokens])])
    return layers, warnings, exact.double().reshape(-1)
