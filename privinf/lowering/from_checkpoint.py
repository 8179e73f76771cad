"""A checkpoint directory of the ladder, lowered for prompts of any length."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from privinf.crypten_adapter import Graph
from privinf.graph.info import Info, InputSpec
from privinf.lowering.calibrate import calibration_ids
from privinf.lowering.export import check_equal, evaluation_mode, lower_graph
from privinf.lowering.lowered import Lowered, finish_lowering
from privinf.lowering.schema import MAX_TEMPLATE
from privinf.lowering.sharing import share
from privinf.models.base import families
from privinf.models.checkpoint import load_checkpoint
from protocols.errors import ConfigError


def chat_template_of(checkpoint: Path) -> str:
    """How a chat becomes a prompt, in Jinja, from `chat_template.jinja` or `tokenizer_config.json`; empty if they do not say.

    Of several named templates the one that is called `default`. ConfigError for a file that cannot be read.
    """
    template: Any
    place = checkpoint / "chat_template.jinja"
    try:
        if place.is_file():
            template = place.read_text("utf-8")
        else:
            place = checkpoint / "tokenizer_config.json"
            found = json.loads(place.read_text("utf-8")) if place.is_file() else {}
            template = found.get("chat_template") if isinstance(found, dict) else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{place}: cannot be read: {error}") from None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str | None) or len(template or "") > MAX_TEMPLATE:
        raise ConfigError(f"{place}: the chat template is no text, or one of more than {MAX_TEMPLATE} characters")
    return template or ""


def convert(checkpoint: str | os.PathLike[str], *, headroom: float = 4.0) -> Lowered:
    """Lower a checkpoint: the graph maps ids (1, T), 1 <= T <= n_positions, to the last position's logits (1, V).

    The model is exported at its full length, so that the tables of positions and temperatures come out whole; every kind of node
    that may occur in the result works at any length (`Node.any_length`), and the result is held against the model at short
    lengths. UnsupportedOpError lists every operator without a protocol, ConfigError what is wrong with the checkpoint.
    """
    model, config, tokenizer = load_checkpoint(Path(checkpoint))
    model = model.folded()
    with evaluation_mode(model), torch.no_grad():
        whole = [torch.zeros(1, config.n_positions, dtype=torch.long)]
        alike = model.sharing is not None
        graph = lower_graph(model, whole, last_position=True, alike=alike)
        if model.sharing is not None:
            graph = share(graph, lower_graph(model.sharing.plain, whole, last_position=True, alike=alike), model.sharing)
        _check_state(graph, families()[config.model_type].state)
        generator = torch.Generator().manual_seed(7)
        for length in sorted({1, min(2, config.n_positions), min(9, config.n_positions)}):
            ids = torch.randint(config.vocab_size, (1, length), generator=generator)
            check_equal(graph, [ids], model(ids)[:, -1])
    info = Info(
        variant=config.variant,
        inputs=(InputSpec(graph.input_names[0], "ids", (1, None)),),
        output=(1, config.vocab_size),
        layers=config.n_layer,
        heads=config.n_head,
        width=config.n_embd,
        vocab=config.vocab_size,
        n_positions=config.n_positions,
        bos=config.bos_token_id,
        eos=tuple(sorted(config.stop_ids)),
        chat_template=chat_template_of(Path(checkpoint)),
    )
    inputs = list(calibration_ids(tokenizer, config.vocab_size, config.n_positions))
    return finish_lowering(graph, info, inputs, tokenizer=tokenizer, headroom=headroom, scored=True)


def _check_state(graph: Graph, declared: Sequence[str]) -> None:
    """ConfigError unless the operators keep between tokens what the family says that its layers keep."""
    kept = {part for node in graph.nodes for part in node.state}
    if kept != set(declared):
        words = [", ".join(sorted(parts)) or "nothing" for parts in (declared, kept)]
        raise ConfigError(f"the family says that its layers keep {words[0]} between tokens, and its operators keep {words[1]}")
