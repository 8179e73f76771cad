"""`python -m benchmarks SCENARIO`, from the repository root."""

from __future__ import annotations

import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from protocols.errors import ConfigError, PrivinfError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]
Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the rows as CSV.")]
Markdown = Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write tables; without any file they go to stdout.")]
Seq = Annotated[int, typer.Option("--seq", min=1, help="Tokens of the prompt.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Timed passes of each backend, after one warm-up.")]
Backends = Annotated[str, typer.Option("--backends", metavar="A,B", help="Among privinf, crypten, plain.")]
LinkName = Annotated[str | None, typer.Option("--link", metavar="lan|wan|RTTms:MBITS", help="Emulate a link (privinf alone).")]


def _chosen(names: str) -> list[str]:
    from benchmarks.backends import backend

    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        backend(name)
    if not found:
        raise ConfigError("no backend was chosen")
    return found


def _perform(scenario: str, files: tuple[Path | None, Path | None, Path | None], measure: Callable[[Any, Path], None]) -> None:
    """Runs a scenario and writes what it measured, also where it was interrupted or failed."""
    from benchmarks.measure import Run
    from benchmarks.output import as_csv, markdown
    from benchmarks.schema import encode

    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"there is no directory {file.parent}")
    run, complete = Run(scenario), False
    try:
        with tempfile.TemporaryDirectory(prefix="privinf-bench-") as work:
            measure(run, Path(work))
        complete = True
    finally:
        if complete or run.rows or run.measures:
            result = run.result(complete)
            for file, make in zip(files, (encode, as_csv, markdown), strict=True):
                if file is not None:
                    text: Any = make(result)
                    file.write_bytes(text if isinstance(text, bytes) else text.encode())
            if not any(files):
                sys.stdout.write(markdown(result))
            if not complete:
                print("unfinished: what had been measured was kept and is marked so", file=sys.stderr)


@app.command()
def shipped(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="Left out: the shipped model's shape, random weights.")] = None,
    seq: Seq = 128,
    samples: Samples = 3,
    errors: Annotated[int, typer.Option("--errors", min=0, help="Passes that measure the logits' error.")] = 2,
    backends: Backends = "privinf,crypten,plain",
    link: LinkName = None,
    json: Json = None,
    csv: Csv = None,
    markdown: Markdown = None,
) -> None:
    """A model at one length: ours, stock CrypTen and float, interleaved. `python -m benchmarks shipped models/pylib`"""
    from benchmarks.scenarios.shipped import shipped as scenario

    names = _chosen(backends)
    _perform(
        "shipped",
        (json, csv, markdown),
        lambda run, work: scenario(run, work, model=model, seq=seq, samples=samples, errors=errors, backends=names, link=link),
    )


@app.command()
def ladder(
    quick: Annotated[bool, typer.Option("--quick", help="Two layers of width 64, instead of GPT-2 size.")] = False,
    seq: Annotated[int | None, typer.Option("--seq", min=1, help="Tokens of the prompt: 128, or 32 with --quick.")] = None,
    samples: Samples = 1,
    backends: Backends = "privinf,plain",
    link: LinkName = None,
    json: Json = None,
    csv: Csv = None,
    markdown: Markdown = None,
) -> None:
    """AERO's ladder: every network that lowers today. `python -m benchmarks ladder --quick --json ladder.json`"""
    from benchmarks.scenarios.ladder import ladder as scenario

    names, length = _chosen(backends), seq or (32 if quick else 128)
    _perform(
        "ladder",
        (json, csv, markdown),
        lambda run, work: scenario(run, work, quick=quick, seq=length, samples=samples, backends=names, link=link),
    )


@app.command()
def budget(
    seq: Seq = 128,
    samples: Samples = 2,
    positions: Annotated[int, typer.Option("--positions", min=2, help="The context that the rings are planned for.")] = 1024,
    json: Json = None,
    csv: Csv = None,
    markdown: Markdown = None,
) -> None:
    """The byte budget at GPT-2 size, random weights. `python -m benchmarks budget --json budget.json`"""
    from benchmarks.scenarios.budget import budget as scenario

    _perform("budget", (json, csv, markdown), lambda run, work: scenario(run, work, seq=seq, samples=samples, positions=positions))


@app.command()
def micro(samples: Samples = 5, json: Json = None, csv: Csv = None, markdown: Markdown = None) -> None:
    """Every protocol by itself: bytes an element, rounds, throughput, error. `python -m benchmarks micro`"""
    from benchmarks.scenarios.micro import micro as scenario

    _perform("micro", (json, csv, markdown), lambda run, work: scenario(run, samples=samples))


@app.command()
def passes(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="With a tokenizer.")] = Path("models/pylib"),
    count: Annotated[int, typer.Option("--count", min=1, help="Private passes.")] = 1000,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="The histogram, as .svg or .png.")] = None,
    json: Json = None,
    csv: Csv = None,
    markdown: Markdown = None,
) -> None:
    """Every logit of many passes on held-out text, against float. `python -m benchmarks passes --plot errors.png --json passes.json`"""
    from benchmarks.scenarios.passes import passes as scenario

    _perform("passes", (json, csv, markdown), lambda run, work: scenario(run, work, model=model, count=count, plot=plot))


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results, as --json wrote them.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Default: stdout.")] = None,
) -> None:
    """One page from results. `python -m benchmarks report a.json b.json --out docs/figures.md`"""
    from benchmarks.output import markdown
    from benchmarks.schema import read

    head = "# Figures\n\nWritten by `python -m benchmarks report`, not by hand; `benchmarks/README.md` says how everything is counted.\n"
    text = "\n".join([head, *(markdown(read(file)) for file in files)])
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, "utf-8")


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
