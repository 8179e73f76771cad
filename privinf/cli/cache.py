"""`privinf cache`: what is kept between runs."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from privinf.cli import common
from privinf.cli.expand import expand
from privinf.cli.options import NO_PEER
from privinf.session.options import Runtime
from protocols.errors import ConfigError

KEPT = ("spent", "budget")  # what is known to be spent, which nobody removes by the way

app = typer.Typer(
    help="List and remove what is kept between runs: lowered models, a client's set-up, prepared queries.\n\nExample: privinf cache ls"
)


@app.command("ls")
@expand(without=NO_PEER)
def ls(runtime: Runtime, as_json: common.Json = False) -> None:
    """List what is kept, and how large it is.

    Example: privinf cache ls
    """
    directory = runtime.cache
    entries = _entries(directory)
    if as_json:
        common.write_json({"cache": str(directory), "entries": entries, "bytes": sum(entry["bytes"] for entry in entries)})
        return
    for entry in entries:
        print(f"{common.human_bytes(entry['bytes']):>10}  {entry['used']}  {entry['name']}{_about(entry)}")
    print(f"{common.human_bytes(sum(entry['bytes'] for entry in entries)):>10}  in {directory}")


@app.command("rm")
@expand(without=NO_PEER)
def rm(
    *,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Entries as `cache ls` names them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all entries.")] = False,
    expired: Annotated[
        bool,
        typer.Option("--expired", help="Remove lanes of prepared queries whose certificates expired over 30 days ago, marks included."),
    ] = False,
    runtime: Runtime,
    as_json: common.Json = False,
) -> None:
    """Remove entries by name, or all of them; they are made again when they are needed.

    Which prepared queries and whose budgets were spent stays known. Only
    --expired removes such marks, where they can count no more.

    Example: privinf cache rm --all
    """
    directory = runtime.cache
    entries = {entry["name"]: entry for entry in _entries(directory)}
    given = [bool(names), everything, expired]
    if sum(given) != 1:
        what = "more than one of names, --all and --expired was given" if any(given) else "nothing was named to remove"
        raise ConfigError(what, remedy="give NAME..., --all or --expired")
    unknown = [name for name in names or () if name not in entries]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is not in {directory}", remedy="run `privinf cache ls` for the names")
    chosen = [name for name, entry in entries.items() if (directory / name).exists()] if everything else list(dict.fromkeys(names or ()))
    if expired:
        chosen = [name for name, entry in entries.items() if entry.get("expired")]
    for name in chosen:
        _remove(runtime, name, entries[name], marks=expired)
    freed = sum(entries[name]["bytes"] for name in chosen)
    if as_json:
        common.write_json({"cache": str(directory), "removed": chosen, "bytes": freed})
    else:
        print(f"removed {len(chosen)} entries, {common.human_bytes(freed)}")


def _about(entry: dict[str, Any]) -> str:
    """What a lane of prepared queries is for."""
    if "count" not in entry:
        return ""
    spent = "damaged" if entry["spent"] is None else entry["spent"]
    chunk, logits = f" by {entry['chunk']}" if entry["chunk"] else "", ", logits" if entry["logits"] else ""
    terms = f"{entry['seq']} prompt tokens{chunk}, {entry['max_new_tokens']} new{logits}"
    return f"  ({entry['role']}: {terms}; {entry['count']} prepared, {spent} spent)"


def _remove(runtime: Runtime, name: str, entry: dict[str, Any], *, marks: bool) -> None:
    path = runtime.cache / name
    if "count" not in entry:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return
    from privinf.session.marks import remove_lane

    remove_lane(runtime.cache, path.name, runtime.timeout, marks=marks)


def _entries(directory: Path) -> list[dict[str, Any]]:
    """The entries KIND/NAME, largest first; none where there is no cache yet."""
    from privinf.session.marks import overview

    lanes = {entry["name"]: entry for entry in overview(directory)}
    found = []
    kinds = [path for path in directory.glob("*") if path.is_dir() and not path.is_symlink() and path.name not in KEPT]
    for path in sorted({*(path for kind in kinds for path in kind.iterdir()), *(directory / name for name in lanes)}):
        name = str(path.relative_to(directory))
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        marks = directory / "spent" / f"{path.name}.json"
        stats = [file.stat() for file in files]
        dated = stats or [(marks if name in lanes and not path.exists() else path).stat()]
        used = datetime.datetime.fromtimestamp(max(stat.st_mtime for stat in dated))
        entry = {"name": name, "bytes": sum(stat.st_size for stat in stats), "used": used.isoformat(sep=" ", timespec="minutes")}
        found.append({**entry, **lanes.get(name, {})})
    return sorted(found, key=lambda entry: -entry["bytes"])
