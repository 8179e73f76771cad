"""A checkpoint directory of the ladder, lowered for prompts of any length."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from privinf.crypten_adapter import Graph
from privinf.graph.info import Info, InputSpec
from privinf.lowering.calibrate import calibration_ids, repeated_ids
from privinf.lowering.export import check_equal, evaluation_mode, lower_graph
from privinf.lowering.lowered import Lowered, finish_lowering
from privinf.lowering.schema import MAX_TEMPLATE
from privinf.lowering.sharing import share
from privinf.models.base import Config, families
from privinf.models.checkpoint import load_checkpoint
from protocols.errors import ConfigError

GENERATION = "generation_config.json"
log = logging.getLogger("privinf.lowering")


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


def end_tokens_of(checkpoint: Path, config: Config) -> tuple[int, ...]:
    """The tokens that end a text: those of `generation_config.json`, which `transformers` generates by, else those of the configuration.

    Only ids of the vocabulary, since no other can come; in the file's order, the first of which a chat's template may name.
    ConfigError for a file that cannot be read, or one whose ids are none.
    """
    place = checkpoint / GENERATION
    try:
        found = json.loads(place.read_text("utf-8")) if place.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: cannot be read: {error}") from None
    given = found.get("eos_token_id") if isinstance(found, dict) else None
    given = config.eos_token_id if given is None else given
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(number) is int for number in ids):
        raise ConfigError(f"{place}: eos_token_id: {json.dumps(given)[:60]} is no token and no list of tokens")
    kept = tuple(dict.fromkeys(number for number in ids if 0 <= number < config.vocab_size))
    if len(kept) < len(set(ids)):
        log.warning("%s: an end token lies outside of the vocabulary of %d, and so never comes", checkpoint, config.vocab_size)
    return kept


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
        bos=config.bos_token_id if (config.bos_token_id or 0) < config.vocab_size else None,
        eos=end_tokens_of(Path(checkpoint), config),
        chat_template=chat_template_of(Path(checkpoint)),
    )
    inputs = list(calibration_ids(tokenizer, config.vocab_size, config.n_positions))
    again: list[tuple[Tensor]] = []
    if families()[config.model_type].adds_up:
        again = list(repeated_ids(tokenizer, config.vocab_size, config.n_positions, info.eos))
    return finish_lowering(graph, info, inputs, tokenizer=tokenizer, headroom=headroom, scored=True, again=again)


def _check_state(graph: Graph, declared: Sequence[str]) -> None:
    """ConfigError unless the operators keep between tokens what the family says that its layers keep."""
    kept = {part for node in graph.nodes for part in node.state}
    if kept != set(declared):
        words = [", ".join(sorted(parts)) or "nothing" for parts in (declared, kept)]
        raise ConfigError(f"the family says that its layers keep {words[0]} between tokens, and its operators keep {words[1]}")
