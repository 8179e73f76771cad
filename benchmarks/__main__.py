"""`python -m benchmarks SCENARIO`, from the repository root."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.clusters import farm, jobs, workers
from benchmarks.options import Backends, Device, Files, LinkName, Model, Samples, Seq, Trust, listed
from benchmarks.pages import compare, everything, report, schema
from privinf.cli.expand import expand
from privinf.trust import DEALER
from protocols.errors import ConfigError, PrivinfError

SHIPPED = Path("models/pylib")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def _chosen(names: str, trust: str = DEALER) -> list[str]:
    from benchmarks.backends import backend, trusting

    found = trusting(listed(names), trust)
    for name in found:
        backend(name)
    if not found:
        raise ConfigError("no backend was chosen")
    return found


def _perform(scenario: str, files: Files, measure: Callable[[Any, Path], None]) -> None:
    from benchmarks.perform import perform

    perform(scenario, (files.json, files.csv, files.markdown), measure)


@app.command()
@expand()
def shipped(
    *,
    model: Model = None,
    seq: Seq = 128,
    samples: Samples = 3,
    errors: Annotated[int, typer.Option("--errors", min=0, help="Passes that measure the logits' error.")] = 2,
    backends: Backends = "privinf,crypten,plain",
    trust: Trust = DEALER,
    link: LinkName = None,
    device: Device = "cpu",
    files: Files,
) -> None:
    """A model at one length: ours, stock CrypTen and float, interleaved. `python -m benchmarks shipped models/pylib`"""
    from benchmarks.scenarios.shipped import shipped as scenario

    names = _chosen(backends, trust)
    chosen: dict[str, Any] = {
        "model": model,
        "seq": seq,
        "samples": samples,
        "errors": errors,
        "backends": names,
        "link": link,
        "device": device,
    }
    _perform("shipped", files, lambda run, work: scenario(run, work, **chosen))


@app.command()
@expand()
def ladder(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Two layers of width 64, instead of GPT-2 size.")] = False,
    seq: Annotated[int | None, typer.Option("--seq", min=1, help="Tokens of the prompt: 128, or 32 with --quick.")] = None,
    samples: Samples = 1,
    backends: Backends = "privinf,plain",
    trust: Trust = DEALER,
    networks: Annotated[str, typer.Option("--networks", metavar="A,B", help="Names of the ladder; default: all.")] = "",
    beside: Annotated[str, typer.Option("--beside", metavar="A,B", help="Networks that stock CrypTen runs too, samples in turn.")] = "",
    link: LinkName = None,
    device: Device = "cpu",
    files: Files,
) -> None:
    """AERO's ladder: every network that lowers today. `python -m benchmarks ladder --quick --json ladder.json`"""
    from benchmarks.scenarios.ladder import ladder as scenario

    length, names, also, used = seq or (32 if quick else 128), listed(networks), listed(beside), _chosen(backends, trust)

    def steps(run: Any, work: Path) -> None:
        scenario(run, work, quick=quick, seq=length, samples=samples, backends=used, link=link, device=device, networks=names, beside=also)

    _perform("ladder", files, steps)


@app.command()
@expand()
def scale(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Two layers of width 64, instead of four of 256.")] = False,
    samples: Samples = 3,
    backends: Backends = "privinf",
    device: Device = "cpu",
    files: Files,
) -> None:
    """Growth with length (16 to 512), layers and width, beside the prediction. `python -m benchmarks scale --json scale.json`"""
    from benchmarks.scenarios.scale import scale as scenario

    names = _chosen(backends)
    _perform("scale", files, lambda run, work: scenario(run, work, quick=quick, samples=samples, backends=names, device=device))


@app.command()
@expand()
def links(
    *,
    model: Model = None,
    seq: Seq = 128,
    samples: Samples = 3,
    names: Annotated[str, typer.Option("--links", metavar="A,B", help="As --link takes them, and loopback.")] = "loopback,lan,wan,4g",
    kernel: Annotated[bool, typer.Option("--kernel", help="Also shaped by the kernel, in a network namespace (root, iproute2).")] = False,
    device: Device = "cpu",
    files: Files,
) -> None:
    """One pass over several links. `python -m benchmarks links models/pylib --links loopback,lan,wan --json links.json`"""
    from benchmarks.links import link_of
    from benchmarks.scenarios.links import links as scenario

    chosen = listed(names)
    for name in chosen:
        link_of(name)
    _perform(
        "links",
        files,
        lambda run, work: scenario(run, work, model=model, seq=seq, samples=samples, names=chosen, kernel=kernel, device=device),
    )


@app.command()
@expand()
def generate(
    *,
    model: Model = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few tokens, clients and sessions, a faster link.")] = False,
    parts: Annotated[str, typer.Option("--parts", metavar="A,B", help="Among cached, batch, clients, memory, wan; default: all.")] = "",
    lengths: Annotated[str, typer.Option("--lengths", metavar="N,N", help="Tokens of the prompts.")] = "1,32,64,128,192,254",
    tokens: Annotated[int | None, typer.Option("--tokens", min=2, help="New tokens of the long session.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Of everything that is timed.")] = None,
    trust: Trust = DEALER,
    link: LinkName = None,
    files: Files,
) -> None:
    """A token against the cached length, clients at once, memory, a slow link. `python -m benchmarks generate models/pylib --json FILE`"""
    from dataclasses import replace

    from benchmarks.scenarios.generate import FULL, PARTS, QUICK
    from benchmarks.scenarios.generate import generate as scenario

    words, chosen = listed(lengths), listed(parts) or PARTS
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--lengths {lengths!r} is no list of whole numbers")
    if unknown := sorted(set(chosen) - set(PARTS)):
        raise ConfigError(f"there is no part {unknown[0]!r}", remedy=f"choose among {', '.join(PARTS)}")
    size = QUICK if quick else FULL
    size = replace(size, samples=samples or size.samples, tokens=tokens or size.tokens)
    numbers = [int(word) for word in words]
    _perform(
        "generate",
        files,
        lambda run, work: scenario(run, work, model=model, lengths=numbers, size=size, link=link, parts=chosen, trust=trust),
    )


@app.command()
@expand()
def soak(
    *,
    model: Model = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.5, help="How long visitors come.")] = 30.0,
    at_a_time: Annotated[int, typer.Option("--visitors", min=1, max=40, help="Visitors at a time.")] = 6,
    seed: Annotated[int, typer.Option("--seed", help="Names the choice of visitors.")] = 1,
    files: Files,
) -> None:
    """Clients that generate, leave, die and send garbage; nothing may be left. `python -m benchmarks soak models/pylib --minutes 30`"""
    from benchmarks.scenarios.soak import soak as scenario

    _perform(
        "soak",
        files,
        lambda run, work: scenario(run, work, model=model, minutes=minutes, at_a_time=at_a_time, seed=seed),
    )


@app.command()
@expand()
def pareto(
    *,
    models: Annotated[list[Path] | None, typer.Argument(metavar="MODEL...", help="Default: all in models/ and runs/.")] = None,
    seq: Seq = 128,
    files: Files,
) -> None:
    """Perplexity of trained checkpoints beside their online bytes. `python -m benchmarks pareto --json pareto.json`"""
    from benchmarks.scenarios.pareto import pareto as scenario
    from benchmarks.scenarios.pareto import trained

    found = models or trained(Path(__file__).parents[1])
    _perform("pareto", files, lambda run, work: scenario(run, work, models=found, seq=seq))


@app.command()
@expand()
def budget(
    *,
    seq: Seq = 128,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Timed passes, after one warm-up; default: 2, or 1.")] = None,
    positions: Annotated[int, typer.Option("--positions", min=2, help="The context that the rings are planned for.")] = 1024,
    trust: Trust = DEALER,
    quick: Annotated[bool, typer.Option("--quick", help="Without a dealer: two layers of width 64, 32 tokens, no shipped model.")] = False,
    model: Annotated[Path, typer.Option("--model", metavar="MODEL", help="Without a dealer: what is asked from nothing.")] = SHIPPED,
    baseline: Annotated[bool, typer.Option("--baseline", help="Without a dealer: also run the baseline, which takes its time.")] = False,
    files: Files,
) -> None:
    """The budget at GPT-2 size, random weights. `python -m benchmarks budget --trust two-party --json budget.json`"""
    if trust == DEALER:
        if quick or baseline:
            raise ConfigError("the budget with a dealer has one size", remedy="leave --quick and --baseline out, or take --trust two-party")
        from benchmarks.scenarios.budget import budget as scenario

        _perform("budget", files, lambda run, work: scenario(run, work, seq=seq, samples=samples or 2, positions=positions))
        return
    from benchmarks.networks import GPT2, QUICK
    from benchmarks.scenarios.alone import Extent, alone

    sizes = QUICK if quick else {**GPT2, "n_positions": positions}
    name = f"SM+ScFuFFN_i{sizes['n_layer'] // 2}"
    extent = Extent(sizes, min(seq, 32) if quick else seq, samples or 1, name, baseline)
    _perform("two-party budget", files, lambda run, work: alone(run, work, shipped=None if quick else model, extent=extent))


@app.command()
@expand()
def trust(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Two layers of width 64, instead of GPT-2 size.")] = False,
    seq: Annotated[int | None, typer.Option("--seq", min=1, help="Tokens of the prompt: 128, or 32 with --quick.")] = None,
    samples: Samples = 1,
    files: Files,
) -> None:
    """Trust models side by side: a dealer, the two parties alone, stock CrypTen, SPU's CHEETAH. `python -m benchmarks trust --quick`"""
    from benchmarks.scenarios.trust import trust as scenario

    length = seq or (32 if quick else 128)
    _perform("trust", files, lambda run, work: scenario(run, work, quick=quick, seq=length, samples=samples))


@app.command()
@expand()
def micro(*, samples: Samples = 5, trust: Trust = DEALER, files: Files) -> None:
    """Every protocol by itself: bytes an element, rounds, throughput, error. `python -m benchmarks micro`"""
    from benchmarks.scenarios.micro import micro as scenario

    _perform("micro", files, lambda run, work: scenario(run, samples=samples, trust=trust))


@app.command()
@expand()
def passes(
    *,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="With a tokenizer.")] = Path("models/pylib"),
    count: Annotated[int, typer.Option("--count", min=1, help="Private passes.")] = 1000,
    files: Files,
) -> None:
    """Every logit of many passes on held-out text, against float. `python -m benchmarks passes --json passes.json`"""
    from benchmarks.scenarios.passes import passes as scenario

    _perform("passes", files, lambda run, work: scenario(run, work, model=model, count=count))


@app.command()
@expand()
def errors(
    *,
    networks: Annotated[int, typer.Option("--networks", min=1, help="Random networks, the ladder's variants in turn.")] = 500,
    count: Annotated[int, typer.Option("--count", min=1, help="Passes of each.")] = 20,
    first: Annotated[int, typer.Option("--first", min=0, help="The first network's seed.")] = 0,
    variants: Annotated[str, typer.Option("--variants", metavar="A,B", help="Names of the ladder; default: all.")] = "",
    files: Files,
) -> None:
    """Every logit of thousands of passes of small random networks, in one process. `python -m benchmarks errors --json errors.json`"""
    from benchmarks.scenarios.errors import errors as scenario
    from tests.support.ladder import LADDER

    chosen = listed(variants) or LADDER
    _perform(
        "errors",
        files,
        lambda run, work: scenario(run, work, networks=networks, count=count, first=first, variants=chosen),
    )


@app.command()
@expand()
def precision(
    *,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="With a tokenizer.")] = SHIPPED,
    quick: Annotated[bool, typer.Option("--quick", help="20 prompts and 10 networks.")] = False,
    prompts: Annotated[int | None, typer.Option("--prompts", min=0, help="Of the model; default: 1000.")] = None,
    networks: Annotated[int | None, typer.Option("--networks", min=0, help="Random ones, the ladder's in turn; default: 2000.")] = None,
    each: Annotated[int, typer.Option("--each", min=1, help="Passes of each random network.")] = 5,
    first: Annotated[int, typer.Option("--first", min=0, help="The first random network's seed.")] = 0,
    minutes: Annotated[float, typer.Option("--minutes", min=0.0, help="Stop then, and report what is done; 0: never.")] = 0.0,
    keep: Annotated[Path | None, typer.Option("--keep", metavar="FILE", help="A file of what is done, from which a run goes on.")] = None,
    files: Files,
) -> None:
    """Logits and tokens of a trained model and of random networks, against float. `python -m benchmarks precision --keep FILE.jsonl`"""
    from benchmarks.scenarios.precision import Extent
    from benchmarks.scenarios.precision import precision as scenario

    counts = ((20 if quick else 1000) if prompts is None else prompts, (10 if quick else 2000) if networks is None else networks)
    if keep is not None and not keep.parent.is_dir():
        raise ConfigError(f"there is no directory {keep.parent}")
    extent = Extent(*counts, each, first, minutes, keep)
    _perform("precision", files, lambda run, work: scenario(run, work, model=model, extent=extent))


for made in (farm, jobs, workers, report, compare, everything, schema):
    app.command(name="all" if made is everything else made.__name__)(made)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 130 interrupted, otherwise the error's."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        words = sys.argv[1:] if arguments is None else arguments
        command = typer.main.get_command(app)
        with command.make_context("python -m benchmarks", list(words) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except typer.TyperException as error:
        print(f"error: {error.format_message().splitlines()[0]} See `python -m benchmarks --help`.", file=sys.stderr)
        return 2
    except PrivinfError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
