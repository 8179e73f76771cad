"""What a model's card says of it: perplexities, the largest values that a private pass would have to hold, greedy continuations."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.output import table
from privinf.models.base import Activations
from privinf.models.checkpoint import load_tokenizer
from privinf.training.corpus import Tokens, encode_corpus, read_corpus
from privinf.training.evaluation import Largest, continue_text, evaluate, spread_windows, token_loss
from privinf.training.families import Trained, load_trained

TRAINING_WINDOWS, HELD_OUT_WINDOWS, RANDOM_WINDOWS = 1200, 324, 256
PROMPTS = (
    "class Node:\n    def __init__(self",
    "def __init__(self, name, value):",
    "class Error(",
    "def read_lines(path):",
    "def __repr__(self):\n        return",
)


def card(directory: Path) -> str:
    """Markdown for the card of a checkpoint that was trained on the standard library, of a family with attention."""
    model, config, tokenizer_file = load_trained(directory)
    assert tokenizer_file is not None
    tokenizer, length = load_tokenizer(tokenizer_file), config.n_positions
    tokens = encode_corpus(read_corpus(), tokenizer)
    held_out = evaluate(model, tokens, length)
    training = spread_windows(tokens.training, TRAINING_WINDOWS, length)
    loss = token_loss(model, training)
    lines = [
        f"| held-out perplexity | {held_out['held_out_perplexity']:.2f} per token ({held_out['held_out_loss']:.3f} nats), "
        f"{held_out['bits_per_byte']:.3f} bits per byte, over {held_out['held_out_tokens']:,.0f} tokens |",
        f"| training perplexity | {math.exp(loss):.2f} per token ({loss:.3f} nats), over {training[:, 1:].numel():,} tokens |",
        "",
        table(["largest magnitude", "scores", "bound", "residual stream", "logits"], _ranges(model, tokens, training, held_out)),
        "",
    ]
    for prompt in PROMPTS:
        text = tokenizer.decode(continue_text(model, tokenizer.encode(prompt).ids, 40))
        lines.append(f"{prompt!r} -> {text!r}")
    return "\n".join(lines)


def _ranges(model: Trained, tokens: Tokens, training: Tensor, held_out: dict[str, float]) -> list[list[str]]:
    length, vocab = model.config.n_positions, model.config.vocab_size
    drawn = torch.randint(vocab, (RANDOM_WINDOWS, length), generator=torch.Generator().manual_seed(1))
    same = torch.arange(0, vocab, 6)[:, None].expand(-1, length)
    spread = spread_windows(tokens.held_out, HELD_OUT_WINDOWS, length)[:, :-1]
    whole = Largest(score=held_out["max_score"], residual=held_out["max_residual"], logit=held_out["max_logit"])
    cases = (
        (f"{training[:, 1:].numel():,} tokens of training text", training[:, :-1], True),
        (f"{len(spread)} held-out windows", spread, False),
        (f"{RANDOM_WINDOWS} windows of random tokens", drawn, False),
        (f"one token {length} times, for each sixth token", same, False),
    )
    rows = [("all held-out text", whole, True), *((name, _largest(model, ids, causal), causal) for name, ids, causal in cases)]
    return [
        [
            f"{name}, {'pairs under the causal mask' if causal else 'all pairs'}",
            *(f"{found.score:.1f}", "" if causal else f"{found.bound:.1f}", f"{found.residual:.1f}", f"{found.logit:.1f}"),
        ]
        for name, found, causal in rows
    ]


@torch.no_grad()
def _largest(model: Trained, ids: Tensor, causal: bool) -> Largest:
    found = Largest()
    for part in torch.split(ids, 8):
        trace = Activations()
        found = found.with_pass(trace, model(part, trace=trace), causal=causal)
    return found
