"""What a page needs of results, small enough to be kept beside it: `docs/figures/results.json`, from which the page is written again.

Counters that the page does not read are left out, so that sums cannot be checked any more; they were when each result was written and read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import fields, replace

from benchmarks import choose
from benchmarks.schema import VERSION, Result, Row, check, of_file
from protocols.errors import ConfigError

DIGITS = 6


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Results of one commit on one machine, in the order of the page's last section."""

    results: tuple[Result, ...]
    schema: str = "privinf-figures"
    version: int = VERSION


def trimmed(results: Sequence[Result]) -> tuple[Result, ...]:
    """The results as they are read again from what `encode` keeps of them; of those, the same."""
    return msgspec.json.decode(encode(results), type=Kept).results


def encode(results: Sequence[Result]) -> bytes:
    """JSON, a line for each result and each table in it; ConfigError if the results are not of one source."""
    one_source(results)
    detailed = choose.smallest(results)
    plain = choose.loopback(results)
    lines = []
    for result in results:
        rows = [r for r in result.rows if (r.backend, r.phase) == ("privinf", "online") and r.party in ("client", "server")]
        kept = [r for r in rows if detailed is not None and r.setting == detailed.setting]
        rest = [r for r in rows if r not in kept and r.party == "client"]
        detailed = None if kept else detailed  # the first result that has it is shown
        ahead = [p for p in result.predicted if kept and p.setting == kept[0].setting]
        if plain is not None and result.scenario == "links":
            kept += [r for r in rest if r.setting == plain.setting]
        elif result.scenario == "scale":
            kept += _merged(rest)
        # samples of single operators are not shown
        kept = [replace(r, samples=()) for r in kept]
        lean = _lean(replace(result, rows=tuple(kept), sockets=(), predicted=tuple(ahead)))
        text = ",\n ".join(f"{_json(name)}:{_table(value)}" for name, value in lean.items())
        lines.append(f"{{{text}}}")
    return f'{{"schema":"privinf-figures","version":{VERSION},"results":[\n{",".join(lines)}\n]}}\n'.encode()


def read(paths: Iterable[Path]) -> list[Result]:
    """Results from files of either kind; ConfigError in one line where a file is neither, or they are not of one source."""
    found: list[Result] = []
    for path in paths:
        kind = of_file(path, {"privinf-benchmarks": Result, "privinf-figures": Kept})
        found += kind.results if isinstance(kind, Kept) else [check(kind)]
    one_source(found)
    return found


def one_source(results: Sequence[Result]) -> None:
    """ConfigError unless all are of one commit, machine, set of versions and model."""
    for what, all_of in (("commit", "commits"), ("machine", "machines"), ("versions", "versions")):
        seen: dict[str, str] = {}
        for result in results:
            value: Any = getattr(result, what)
            if what == "machine":
                value = " ".join(str(value.get(name)) for name in ("system", "processor", "cores"))
            seen.setdefault(str(value), result.scenario)
        if len(seen) > 1:
            (a, first), (b, second) = list(seen.items())[:2]
            raise ConfigError(
                f"results of different {all_of} are no one page: {first} has {a}, {second} has {b}",
                remedy="measure them together: python -m benchmarks all",
            )
    ids: dict[str, str] = {}
    for result in results:
        for name, one in result.model.items():
            if ids.setdefault(name, one) != one:
                raise ConfigError(f"two models {name} were measured: {ids[name]} and {one}", remedy="measure them again")


def fingerprint(results: Sequence[Result]) -> str:
    """Of what is kept; pictures made from it bear it."""
    return hashlib.sha256(encode(results)).hexdigest()[:16]


def _merged(rows: Sequence[Row]) -> list[Row]:
    """One row for each setting and operator, all layers: what the growth of attention and of the rest is read from."""
    found: dict[tuple[Any, str], Row] = {}
    for row in rows:
        key = (row.setting, row.op)
        if key not in found:
            found[key] = replace(row, layer="", seconds=None, compute_seconds=None, wait_seconds=None, wire_seconds=None, peak_bytes=None)
            continue
        old = found[key]
        names = ("bytes_sent", "bytes_received", "rounds")
        sums = {name: getattr(old, name) + getattr(row, name) for name in names}
        found[key] = replace(old, payload=(old.payload or 0) + (row.payload or 0), **sums)
    return list(found.values())


def _lean(value: Any) -> Any:
    """Without what is as by default, and no number longer than it is good for."""
    if isinstance(value, msgspec.Struct):
        return {field.name: _lean(own) for field in fields(value) if (own := getattr(value, field.name)) != _default(field)}
    if isinstance(value, tuple):
        return [_lean(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _default(field: Any) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _table(value: Any) -> str:
    return "[\n  " + ",\n  ".join(_json(one) for one in value) + "]" if isinstance(value, list) and value else _json(value)
