"""Many private passes of a trained model on different text, each against float: not one logit may be off by more than BOUND."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.choose import BOUND
from benchmarks.measure import Run
from benchmarks.networks import Network
from benchmarks.schema import Absent, Goal
from privinf.local.session import LocalSession
from privinf.models.checkpoint import load_checkpoint
from privinf.session.options import Options
from privinf.training.corpus import read_corpus
from protocols.errors import ConfigError

LENGTHS = (1, 4, 8, 12, 16, 20, 24, 32, 48, 64)  # of the prompts, in turn; the context's length where that is less
FULL = 25  # each prompt of this many fills the context


def passes(run: Run, work: Path, *, model: Path, count: int) -> None:
    """One local session, so that correlations of all passes come from one dealer and the set-up is paid once.

    Adds the worst logit error of every pass (all V logits of the last position), and quantiles over passes and over single
    logits; the report draws the histogram. A pass beyond BOUND stands in `absent` with its length and place.
    """
    network = run.network(model, work)
    exact = float_model(model, network)
    worst: list[float] = []
    single: list[Tensor] = []
    agree = 0
    try:
        with LocalSession(network.directory, Options(cache=work / "cache", timeout=600.0)) as session:
            for number, ids in enumerate(_prompts(network, model, count)):
                wanted, found = exact(ids), session.run(ids).double().reshape(-1)
                error = (found - wanted).abs()
                single.append(error)
                worst.append(float(error.max()))
                agree += int(found.argmax() == wanted.argmax())
                if not worst[-1] <= BOUND:
                    run.absent.append(Absent(f"prompt {number}, {ids.shape[1]} tokens", f"a logit is off by {worst[-1]:.4f}"))
    finally:
        if worst:
            _add(run, network, worst, torch.cat(single), agree)


def float_model(model: Path, network: Network) -> torch.nn.Module:
    """Ids (1, T) to the last position's logits (V,), in float64, from the checkpoint itself where there is one."""
    if (model / "model.safetensors").is_file() and (model / "config.json").is_file():
        return _Last(load_checkpoint(model)[0].double())
    return _Last(network.lowered.graph)


class _Last(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.inner(ids)
        return out.double()[..., -1, :].reshape(-1) if out.dim() == 3 else out.double().reshape(-1)


def held_out(network: Network, model: Path) -> list[int]:
    """Ids of the modules of the standard library that no training sees, one after the other."""
    from tokenizers import Tokenizer

    info = network.lowered.info
    if network.lowered.tokenizer is None or not info.is_language_model:
        raise ConfigError(f"{model}: has no tokenizer, and the prompts are text")
    texts = [document.text for document in read_corpus() if document.held_out]
    end = list(info.eos[:1])
    return end + [id_ for found in Tokenizer.from_buffer(network.lowered.tokenizer).encode_batch(texts) for id_ in found.ids + end]


def _prompts(network: Network, model: Path, count: int) -> Iterator[Tensor]:
    """Ids (1, T) of `count` places, evenly spread over that text."""
    info, stream = network.lowered.info, held_out(network, model)
    room = len(stream) - info.n_positions
    if room < count:
        raise ConfigError(f"{count} prompts are more than the held-out text has places")
    for number in range(count):
        length = info.n_positions if number % FULL == FULL - 1 else min(LENGTHS[number % len(LENGTHS)], info.n_positions)
        start = number * room // count
        yield torch.tensor([stream[start : start + length]])


def _add(run: Run, network: Network, worst: list[float], single: Tensor, agree: int) -> None:
    passed, count = torch.tensor(worst, dtype=torch.float64), len(worst)
    published = "CrypTen 0.013 to 0.96; Curl 0.19; SHAFT 0.61"
    run.budget.append(Goal(f"worst logit error of {count} passes of a trained model", "", published, 0.01, 0.005, max(worst)))
    run.note(f"weights of {network.lowered.info.variant}: {network.weights}; logits of the last position, {len(single):,} in all")
    lengths = f"{', '.join(map(str, LENGTHS))} tokens in turn, each {FULL}th of {network.lowered.info.n_positions}"
    run.note(f"prompts of {lengths}, from modules of the standard library that training does not see")
    run.measure("worst logit error", max(worst), "", network, of=f"{count} passes", samples=tuple(round(error, 6) for error in worst))
    for share in (0.5, 0.99, 0.999):
        name = f"{share * 100:g} % of the passes' worst errors are below"
        run.measure(name, float(passed.quantile(share)), "", network, of=f"{count} passes")
    ordered = single.sort().values
    for share in (0.5, 0.999):
        name = f"{share * 100:g} % of all logits' errors are below"
        run.measure(name, float(ordered[min(len(ordered) - 1, int(share * len(ordered)))]), "", network, of=f"{count} passes")
    run.measure(f"passes with a logit off by more than {BOUND}", int((~(passed <= BOUND)).sum()), f"of {count}", network)
    run.measure("greedy tokens equal to float's", agree, f"of {count}", network)
