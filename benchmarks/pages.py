"""Commands that make pages and comparisons of results, all scenarios with their report among them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import Device, listed
from privinf.cli.expand import expand
from privinf.setting import Setting
from protocols.errors import ConfigError, PrivinfError


@dataclass(frozen=True)
class Pages:
    """Where a report goes."""

    out: Annotated[Path | None, Setting("Markdown; pictures go to a directory beside it.", "FILE.md")] = None
    html: Annotated[Path | None, Setting("One page that needs nothing else.", "FILE.html")] = None
    readme: Annotated[Path | None, Setting("Its block between the markers of this harness is replaced.", "FILE")] = None
    kept: Annotated[Path | None, Setting("What the page needs of the results, for `report`.", "FILE.json")] = None


@expand()
def report(
    *,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results of one commit, as --json or --kept wrote them.")],
    pages: Pages,
    docs: Annotated[bool, typer.Option("--docs", help="docs/figures.md, README's block, and docs/figures/results.json.")] = False,
) -> None:
    """One page from results, measuring nothing. `python -m benchmarks report docs/figures/results.json --docs`"""
    from benchmarks.keep import read
    from benchmarks.report import as_markdown, sections, write, write_docs
    from benchmarks.stages import ROOT

    results = read(files)
    write(results, **vars(pages))
    if docs:
        write_docs(results, ROOT)
    if not (docs or any(vars(pages).values())):
        sys.stdout.write(as_markdown(sections(results)))


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json")],
    after: Annotated[Path, typer.Argument(metavar="B.json")],
) -> None:
    """What changed beyond noise; exit code 1 if bytes or rounds grew. `python -m benchmarks compare before.json after.json`"""
    from benchmarks.compare import compare as differences
    from benchmarks.schema import read

    text, regressed = differences(read(before), read(after))
    sys.stdout.write(text)
    if regressed:
        raise typer.Exit(1)


def everything(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Results, tables, pictures, report.html.")] = Path("runs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: minutes instead of an hour.")] = False,
    only: Annotated[
        str, typer.Option("--only", metavar="A,B", help="Stages to run now; --list names them. The report is of all results in DIR.")
    ] = "",
    show: Annotated[bool, typer.Option("--list", help="Name the stages with their commands and minutes, and run nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what has a complete result of this commit in DIR.")] = False,
    model: Annotated[Path, typer.Option("--model", metavar="MODEL")] = Path("models/pylib"),
    device: Device = "cpu",
    engine: Annotated[
        str, typer.Option("--engine", help="here, or ray: a stage is a task that has a node of a cluster to itself.")
    ] = "here",
    ray_address: Annotated[str, typer.Option("--ray-address", help="The cluster; auto: the one of this machine.")] = "auto",
    docs: Annotated[
        bool, typer.Option("--docs", help="Also write docs/figures.md, its results, and README's block, once nothing is lacking.")
    ] = False,
) -> None:
    """Every scenario, then the report. `python -m benchmarks all --quick --out runs/bench` (what `make bench` does)"""
    from benchmarks.report import write, write_docs
    from benchmarks.stages import ROOT, stages
    from benchmarks.stages import everything as run_all

    if docs and quick:
        raise ConfigError("figures of small sizes are none for the documentation", remedy="leave --quick or --docs out")
    chosen, wanted = stages(quick, model, device), listed(only)
    if unknown := sorted(set(wanted) - {stage.name for stage in chosen}):
        raise ConfigError(f"there is no stage {unknown[0]!r}", remedy=f"choose among {', '.join(stage.name for stage in chosen)}")
    if show:
        for stage in chosen:
            by_name = "  (by name only)" if stage.long else ""
            print(f"{stage.name:9} {stage.minutes:4g} min  python -m benchmarks {' '.join(stage.words)}{by_name}")
        return
    results, lacking = run_all(chosen, out, fresh=fresh, named=wanted, engine=engine, address=ray_address)
    write(results, out=out / "figures.md", html=out / "report.html", kept=out / "figures" / "results.json")
    print(f"{out / 'report.html'}")
    if docs and lacking:
        raise PrivinfError(
            f"the documentation stays as it is: {', '.join(lacking)} left no complete result",
            remedy="the same command runs what is lacking",
        )
    if docs:
        write_docs(results, ROOT)


def schema() -> None:
    """The JSON Schema of a result."""
    import msgspec

    from benchmarks.schema import Result

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Result)), indent=1).decode() + "\n")
