"""What a model's card says of it: perplexities, the largest values that a private pass would have to hold, greedy continuations."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.output import table
from privinf.models.aero import AeroModel, Trace
from privinf.models.checkpoint import load_checkpoint, load_tokenizer
from privinf.models.corpus import Tokens, encode_corpus, read_corpus
from privinf.models.evaluation import continue_text, evaluate, spread_windows, token_loss

TRAINING_WINDOWS, RANDOM_WINDOWS = 1200, 256
PROMPTS = (
    "class Node:\n    def __init__(self",
    "def __init__(self, name, value):",
    "class Error(",
    "def read_lines(path):",
    "def __repr__(self):\n        return",
)


def card(directory: Path) -> str:
    """Markdown for the card of a checkpoint that was trained on the standard library."""
    model, config, tokenizer_file = load_checkpoint(directory)
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
        table(["largest magnitude", "scores", "bound", "residual stream", "logits"], list(_ranges(model, tokens, training, held_out))),
        "",
    ]
    for prompt in PROMPTS:
        text = tokenizer.decode(continue_text(model, tokenizer.encode(prompt).ids, 40))
        lines.append(f"{prompt!r} -> {text!r}")
    return "\n".join(lines)


def _ranges(model: AeroModel, tokens: Tokens, training: Tensor, held_out: dict[str, float]) -> list[list[str]]:
    config, generator = model.config, torch.Generator().manual_seed(1)
    length, vocab = config.n_positions, config.vocab_size
    drawn = torch.randint(vocab, (RANDOM_WINDOWS, length), generator=generator)
    same = torch.arange(0, vocab, 6)[:, None].expand(-1, length)
    spread = spread_windows(tokens.held_out, 324, length)[:, :-1]
    rows = [
        [
            "all held-out text, pairs under the causal mask",
            *_row(held_out["max_score"], None, held_out["max_residual"], held_out["max_logit"]),
        ]
    ]
    cases: list[tuple[str, Tensor, bool]] = [
        (f"{training[:, 1:].numel():,} tokens of training text, pairs under the causal mask", training[:, :-1], True),
        (f"{len(spread)} held-out windows, all pairs", spread, False),
        (f"{RANDOM_WINDOWS} windows of random tokens, all pairs", drawn, False),
        (f"one token {length} times, for each sixth token, all pairs", same, False),
    ]
    return rows + [[name, *_row(*_largest(model, ids, causal))] for name, ids, causal in cases]


def _row(score: float, bound: float | None, residual: float, logit: float) -> list[str]:
    return [f"{score:.1f}", "" if bound is None else f"{bound:.1f}", f"{residual:.1f}", f"{logit:.1f}"]


@torch.no_grad()
def _largest(model: AeroModel, ids: Tensor, causal: bool) -> tuple[float, float | None, float, float]:
    score, bound, residual, logit = 0.0, 0.0, 0.0, 0.0
    for part in torch.split(ids, 8):
        trace = Trace()
        logit = max(logit, _most(model(part, trace=trace)))
        residual = max(residual, *map(_most, trace.residual))
        for q, k in zip(trace.queries, trace.keys, strict=True):
            scores = q @ k.transpose(2, 3)
            score = max(score, _most(scores.tril() if causal else scores))
            bound = max(bound, float((q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1)).max()))
    return score, None if causal else bound, residual, logit


def _most(x: Tensor) -> float:
    return float(x.abs().max())
