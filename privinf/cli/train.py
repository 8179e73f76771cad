"""`privinf train`: trains a variant of the ladder on text or code and writes a checkpoint directory."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import Text, Threads
from privinf.setting import Setting
from privinf.training.settings import Limits, Settings, bf16_is_fast
from protocols.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from privinf.training.corpus import Document
    from privinf.training.families import Trained, TrainedConfig
    from privinf.training.trainer import Trainer

OUTPUT = Path("runs/pylib")
MINUTES = 55.0
PROMPTS = ("def main(", "import os\nimport sys\n\n", "class Node:\n    def __init__(self")
LARGEST_VOCAB = 65536


@dataclass(frozen=True)
class Architecture:
    """Of a model that begins anew."""

    family: Annotated[
        Literal["aero", "llama", "recursive", "relu", "maxplus", "mamba2", "ttt"],
        Setting(
            "The ladder's networks, Llama's kind, the ladder's blocks in loops, with ReLU for the softmax or max-plus products, "
            "Mamba-2's or TTT's kind."
        ),
    ] = "aero"
    variant: Annotated[
        str | None,
        Setting(
            "Its name: on the ladder such as SM+LN+G, SM+ScFFN or SM(t)+ScFuFFN_i2 (default: SM(t)+ScFuFFN); of llama such as "
            "SM+RN+SwiGLU (the default), SM+RN+GLU or SM+ScFuFFN; of recursive SM+FuFFN (the default), SM(t)+FuFFN, SM+LN+G and the like; "
            "of relu RA+ScFuFFN (the default), RA+FuFFN, RA+LN+R and the like; "
            "of maxplus MP+MP (the default), SM+MP, MP+FuFFN, MP+LN+MP; "
            "of mamba2 M2(sp)+Conv+RN+SiLU (the default), M2(relu)+RN+GLU, M2(fix) and the like; "
            "of ttt TTT+RN+SwiGLU (the default), TTT+R, TTT.",
            "NAME",
        ),
    ] = None
    layers: Annotated[int, Setting("Blocks that a token goes through.", "N", least=1)] = 6
    loops: Annotated[
        int | None, Setting("Of recursive: how often each block runs, so that there are layers / loops of them; default: 3.", "N", least=1)
    ] = None
    rank: Annotated[
        int | None, Setting("Of recursive: rank of what each loop adds to a block's matrices; default: 0, nothing.", "N", least=0)
    ] = None
    heads: Annotated[int, Setting("Attention heads of a block.", "N", least=1)] = 8
    kv_heads: Annotated[
        int | None, Setting("Of a llama: heads of keys and values, which the others share; default: all.", "N", least=1)
    ] = None
    width: Annotated[int, Setting("The size of a token's vector.", "N", least=1)] = 256
    positions: Annotated[int, Setting("The longest text, in tokens.", "N", least=1)] = 256
    vocab: Annotated[int, Setting("Tokens of the tokenizer, which is trained too.", "N", least=257, most=LARGEST_VOCAB)] = 3072
    tie: Annotated[bool, Setting("Use the embedding as vocabulary projection too.")] = False

    def config(self, vocab_size: int, end: int) -> TrainedConfig:
        """Of a model with this tokenizer; ConfigError where no network has this shape."""
        from privinf.training.families import USUAL, variant_config

        return variant_config(
            self.family,
            self.variant or USUAL[self.family],
            kv_heads=self.kv_heads,
            loops=self.loops,
            rank=self.rank,
            vocab_size=vocab_size,
            n_positions=self.positions,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            tie_word_embeddings=self.tie,
            bos_token_id=end,
            eos_token_id=end,
        )


@dataclass(frozen=True)
class Duration:
    """How long a run is: by steps, by time, or what ends first."""

    steps: Annotated[int | None, Setting("End after so many steps. A run by steps repeats exactly.", "N", least=1)] = None
    minutes: Annotated[
        float | None, Setting(f"End after so much training time; {MINUTES} if --steps is not given either.", "X", least=0.01)
    ] = None

    @property
    def longest(self) -> float | None:
        """Minutes, if there is such an end."""
        return MINUTES if self.steps is None and self.minutes is None else self.minutes


@dataclass(frozen=True)
class Beside:
    """What a run makes besides the model, and how fast."""

    compile: Annotated[bool, Setting("torch.compile: faster, needs a C++ compiler.")] = False
    entropy_every: Annotated[
        int | None, Setting("Steps between records of every head's entropy; default: 25 records, or 100 steps.", "N", least=1)
    ] = None
    tensorboard: Annotated[bool, Setting("The metrics also as TensorBoard events, in tensorboard/.")] = False


@expand()
def train(
    *,
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Directory for state, metrics and, in `checkpoint/`, the model.")
    ] = OUTPUT,
    text: Text,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Begin with these weights, architecture and tokenizer.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Learn what this model of the same tokenizer expects next, not the text.")
    ] = None,
    architecture: Architecture,
    duration: Duration,
    settings: Settings,
    range_weight: Annotated[
        float, Setting("Weight of the penalty on what fixed point cannot hold; 0 leaves it out.", "X")
    ] = Limits().weight,
    threads: Threads = None,
    bf16: Annotated[bool | None, typer.Option(help="Matrix products in bfloat16; default: where the processor has them.")] = None,
    beside: Beside,
    as_json: common.Json = False,
) -> None:
    """Train a variant of the ladder, or of another family. Call it again with the same options to resume.

    Example: privinf train -o runs/small --variant "SM(t)+ScFuFFN" --layers 2 --width 64 --heads 2 --minutes 5
    """
    common.need("matplotlib")  # for what is drawn at the end, hours from now
    import torch

    from privinf.training import corpus as corpora
    from privinf.training.trainer import Trainer, write_run_file

    if threads is not None:
        torch.set_num_threads(threads)
    first = _first(context, start)
    shape = architecture.config(architecture.vocab, 0) if first is None else first.config  # refused before the work begins
    settings = _whole(settings, shape.n_positions, bf16, range_weight)
    say = _Speaker(quiet=as_json)
    documents = corpora.read_corpus(text.corpus, text.files, say.line if text.corpus else lambda line: None)
    tokenizer, end = _tokenizer(output / "checkpoint" / "tokenizer.json", documents, architecture.vocab, first, say)
    config = first.config if first else architecture.config(tokenizer.get_vocab_size(), end)
    taught = None if teacher is None else _teacher(teacher, tokenizer, config)
    say.line(f"turning {len(documents)} files into tokens")
    tokens = corpora.encode_corpus(documents, tokenizer)
    begun, corpus_id = first.model if first else None, corpora.fingerprint(documents)
    trainer = Trainer(config, settings, tokens, output, corpus_id, beside.compile, begun, taught)
    resumed = trainer.resume()
    write_run_file(output, _about(trainer, duration, documents, compiled=beside.compile, begun=start is not None))
    say.line(
        f"{'resuming' if resumed else 'training'} {config.variant}: {_parameters(trainer):,} parameters, {len(tokens.training):,} tokens, "
        f"{len(tokens.held_out):,} held out; step {trainer.step}"
    )
    if beside.tensorboard:
        trainer.metrics.listeners.append(_tensorboard(output / "tensorboard"))
    result = _run(trainer, tokenizer, duration, beside.entropy_every, output, say)
    if as_json:
        common.write_json(result)


def _whole(settings: Settings, length: int, bf16: bool | None, range_weight: float) -> Settings:
    """With what is not an option of its own."""
    limits = Limits(weight=range_weight) if 0 <= range_weight < float("inf") else {"weight": range_weight}
    here = {"length": length, "bf16": bf16_is_fast() if bf16 is None else bf16, "limits": limits}
    return Settings.checked(**{**dict(settings), **here})


class _First(NamedTuple):
    """What a run begins with."""

    place: Path
    model: Trained
    config: TrainedConfig
    tokenizer: bytes | None


def _first(context: typer.Context, start: Path | None) -> _First | None:
    """Of --from, where it is given; ConfigError where an architecture is given too."""
    if start is None:
        return None
    given = [field.name for field in fields(Architecture) if "DEFAULT" not in str(context.get_parameter_source(field.name))]
    if given:
        raise ConfigError(
            f"--from and {', '.join('--' + name for name in given)} were given", remedy="--from has an architecture of its own"
        )
    from privinf.training.families import load_trained

    return _First(start, *load_trained(start))


def _tokenizer(file: Path, documents: list[Document], vocab: int, first: _First | None, say: _Speaker) -> tuple[Tokenizer, int]:
    """The run's, and its end token: what it began with, or one that is trained on the corpus and kept."""
    from privinf.models.checkpoint import load_tokenizer, write_atomically
    from privinf.training import corpus as corpora

    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file() and first is not None:
        if first.tokenizer is None:
            raise ConfigError(f"{first.place}: has no tokenizer", remedy="without it the corpus cannot become its tokens")
        write_atomically(file, first.tokenizer)
    elif not file.is_file():
        say.line(f"training a tokenizer of {vocab} tokens on {len(documents)} files")
        corpora.save_tokenizer(corpora.train_tokenizer(documents, vocab), file)
    tokenizer = load_tokenizer(file)
    end = tokenizer.token_to_id(corpora.END)
    if end is None or tokenizer.get_vocab_size() > (vocab if first is None else LARGEST_VOCAB):
        raise ConfigError(f"{file}: not a tokenizer of this run", remedy="remove it to have it trained anew")
    return tokenizer, end


def _teacher(place: Path, tokenizer: Tokenizer, config: TrainedConfig) -> Trained:
    """The model to learn from; ConfigError where its tokens are not the run's."""
    from privinf.models.checkpoint import load_tokenizer
    from privinf.training.families import load_trained

    model, theirs, data = load_trained(place)
    same = data is not None and load_tokenizer(data).to_str() == tokenizer.to_str()
    if not same or theirs.vocab_size != config.vocab_size or theirs.n_positions < config.n_positions:
        raise ConfigError(
            f"--teacher {place}: its tokenizer or vocabulary is another, or its texts are shorter",
            remedy="take one of the same tokenizer, such as the model of --from",
        )
    return model


def _about(trainer: Trainer, duration: Duration, documents: list[Document], *, compiled: bool, begun: bool) -> dict[str, Any]:
    """All that the run follows from, for its file."""
    import torch

    config, tokens = trainer.config, trainer.tokens
    return {
        "variant": config.variant,
        "config": json.loads(config.to_json()),
        "settings": trainer.settings.model_dump(mode="json"),
        "steps": duration.steps,
        "minutes": duration.longest,
        "started_from": {"sha256": trainer.started_from} if begun else None,
        "teacher": {"sha256": trainer.taught_by} if trainer.taught_by else None,
        "corpus": {
            "files": len(documents),
            "sha256": trainer.corpus_id,
            "training_tokens": len(tokens.training),
            "held_out_tokens": len(tokens.held_out),
            "held_out_bytes": tokens.held_out_bytes,
            "held_out_modules": sorted({d.module for d in documents if d.held_out}),
        },
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiled": compiled,
    }


def _parameters(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.model.parameters())


def _run(
    trainer: Trainer, tokenizer: Tokenizer, duration: Duration, entropy_every: int | None, output: Path, say: _Speaker
) -> dict[str, Any]:
    """Trains to the end, and leaves the model and its picture; what it returns is the verb's document."""
    from privinf.training.evaluation import continue_text
    from privinf.training.pictures import plot_loss
    from privinf.training.trainer import RUN

    checkpoint = output / "checkpoint"

    def sample(progress: Any) -> None:
        say.progress(progress)
        if progress.extra:
            trainer.export(checkpoint)
            for prompt in PROMPTS:
                say.line(repr(prompt + tokenizer.decode(continue_text(trainer.model, tokenizer.encode(prompt).ids, 40))))

    started, steps = time.monotonic(), duration.steps
    try:
        with say:
            every = entropy_every or (max(1, steps // 25) if steps else 100)
            measured = trainer.run(steps, duration.longest, sample, entropy_every=every)
    except KeyboardInterrupt:
        if trainer.between_steps:
            trainer.save()
        say.line(f"stopped at step {trainer.step}; the same command resumes")
        raise
    trainer.export(checkpoint)
    result = {
        "variant": trainer.config.variant,
        "steps": trainer.step,
        "seconds": round(trainer.elapsed, 1),
        "parameters": _parameters(trainer),
        "checkpoint": str(checkpoint),
        "run": str(output / RUN),
    } | measured
    plot_loss(output)
    took = time.monotonic() - started
    say.line(f"done in {took:.0f} s: held-out perplexity {result['held_out_perplexity']:.2f}; the model is in {checkpoint}")
    return result


class _Speaker:
    """A progress bar where a person looks, a plain line a minute elsewhere; all of it on stderr."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self.bar = Progress(
                BarColumn(),
                TextColumn("{task.percentage:5.1f} %"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("starting", total=1.0)
        self.told = 0.0
        self.mean = 0.0

    def __enter__(self) -> _Speaker:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *unused: object) -> Literal[False]:
        if self.bar is not None:
            self.bar.stop()
        return False

    def line(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False)

    def progress(self, progress: Any) -> None:
        if progress.extra:
            self.line(f"step {progress.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in progress.extra.items()))
            return
        self.mean = progress.loss if self.mean == 0 else 0.98 * self.mean + 0.02 * progress.loss
        text = f"step {progress.step}, loss {self.mean:.3f}, rate {progress.rate:.1e}, {progress.tokens_per_second:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=progress.fraction, description=text)
        elif time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            self.line(f"{100 * progress.fraction:5.1f} %  {text}, {progress.elapsed_s / 60:.1f} min")


def _tensorboard(directory: Path) -> Callable[[dict[str, Any]], None]:
    """What writes a row of the metrics as TensorBoard events: numbers as scalars, the heads' entropies as a histogram."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("--tensorboard: the package tensorboard is missing", remedy="pip install tensorboard") from None
    import torch

    writer = SummaryWriter(str(directory))

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(name, value, row["step"])
        if "entropy" in row:
            writer.add_histogram("entropy", torch.tensor(row["entropy"]), row["step"])
        writer.flush()

    return write
