"""A result as CSV and Markdown. JSON is `schema.encode`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

import msgspec

from benchmarks.links import name_of
from benchmarks.schema import Goal, Measure, Result, Row, Setting, Total
from privinf.trust import TWO_PARTY


def as_csv(result: Result) -> str:
    """The rows; `samples` joined by blanks."""
    text = io.StringIO()
    names = [name for name in Row.__struct_fields__ if name != "link"]
    writer = csv.writer(text)
    writer.writerow([*names, "rtt_ms", "mbit_s", "emulated"])
    for row in result.rows:
        fields = msgspec.structs.asdict(row)
        fields["samples"] = " ".join(map(str, row.samples))
        writer.writerow([*(fields[name] for name in names), row.link.rtt_ms, row.link.mbit_s, row.link.emulated])
    return text.getvalue()


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table, the first column left, the others right."""
    body = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    if not body:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1), *body]) + "\n"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.4g} B"


def number(value: float | None, unit: str = "") -> str:
    """Three or four digits."""
    if value is None:
        return "not measured"
    if unit == "B" and abs(value) >= 1e4:
        return ("-" if value < 0 else "") + size(abs(value))
    text = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
    return f"{text} {unit}".strip()


def spread(samples: Sequence[float], unit: str = "") -> str:
    """From the least to the most, and of how many."""
    least, most = (number(value) for value in (min(samples), max(samples)))
    return f"{least} to {most} {unit}".strip() + f" ({len(samples)})" if least != most else f"{number(min(samples), unit)} ({len(samples)})"


def _spread(samples: Sequence[float]) -> str:
    return f"{min(samples):.3g} to {max(samples):.3g} ({len(samples)})" if len(samples) > 1 else "1"


def ours(setting: Setting) -> str:
    """A backend's name, and that the two parties were alone."""
    return f"{setting.backend}, {TWO_PARTY}" if setting.alone else setting.backend


def _totals(totals: Sequence[Total]) -> str:
    def line(t: Total) -> list[object]:
        where = [t.variant, f"{t.layers} x {t.width}", t.seq, ours(t), t.device, name_of(t.link)]
        seconds = ["" if t.seconds is None else f"{t.seconds:.3g}", _spread(t.samples) if t.samples else ""]
        return [*where, t.phase, size(t.bytes_sent), t.rounds, *seconds]

    head = ("network", "layers x width", "T", "backend", "device", "link", "phase", "sent, all parties", "rounds", "seconds", "spread")
    return table(head, map(line, totals))


PARTS = ("compute", "wait", "wire")


def _operators(rows: Sequence[Row]) -> str:
    """The client's link online, of each setting's first link and length: bytes both ways, rounds, seconds of each party, all layers."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    seen: dict[tuple[str, str], Setting] = {}
    for row in rows:
        if row.phase != "online" or seen.setdefault((row.variant, ours(row)), row.setting) != row.setting:
            continue
        cells = found.setdefault((row.variant, ours(row), row.op or "(control)"), {})
        if row.party == "client":
            cells["bytes"] = cells.get("bytes", 0) + row.bytes_sent + row.bytes_received
            cells["rounds"] = cells.get("rounds", 0) + row.rounds
        cells["macs"] = cells.get("macs", 0) + (row.macs or 0)
        cells["peak"] = max(cells.get("peak", 0), row.peak_bytes or 0)
        for part in PARTS:
            key = f"{row.party} {part}"
            cells[key] = cells.get(key, 0) + (getattr(row, f"{part}_seconds") or 0.0)
    names = [f"{party} {part}" for party in ("client", "server") for part in PARTS]
    lines = [
        [
            *key,
            size(cells.get("bytes", 0)),
            int(cells.get("rounds", 0)),
            f"{cells['macs'] / 1e6:,.1f}" if cells["macs"] else "",
            size(cells["peak"]) if cells["peak"] else "",
            *(f"{cells.get(name, 0):.3f}" for name in names),
        ]
        for key, cells in found.items()
    ]
    head = ("network", "backend", "operator, all layers", "bytes, both ways", "rounds", "mega-MACs", "peak so far")
    return table((*head, *(f"{name}, s" for name in names)), lines)


def by_name(measures: Sequence[Measure]) -> tuple[list[str], list[list[object]]]:
    """Head and lines of a table: a line for each thing measured, a column for each figure."""
    names = list(dict.fromkeys(m.name for m in measures))
    units = {m.name: m.unit for m in measures}
    found: dict[str, dict[str, str]] = {}
    for m in measures:
        found.setdefault(m.of, {})[m.name] = number(m.value)
    head = [f"{name}, {units[name]}" if units[name] else name for name in names]
    return ["", *head], [[of, *(cells.get(name, "") for name in names)] for of, cells in found.items()]


def _measures(measures: Sequence[Measure]) -> str:
    def line(m: Measure) -> list[object]:
        where = [m.of, m.variant, f"{m.layers} x {m.width}" if m.layers else "", m.seq or "", name_of(m.link)]
        return [*where, m.name, number(m.value, m.unit), _spread(m.samples) if m.samples else ""]

    return table(("of", "network", "layers x width", "T", "link", "what", "value", "spread"), map(line, measures))


def budget(goals: Sequence[Goal]) -> tuple[tuple[str, ...], list[list[object]]]:
    """Head and lines of a table."""
    head = ("", "others", "must", "goal", "measured")
    return head, [[g.name, g.published, number(g.must, g.unit), number(g.goal, g.unit), _measured(g)] for g in goals]


def _measured(goal: Goal) -> str:
    return goal.why if goal.measured is None else number(goal.measured, goal.unit)


def source(results: Sequence[Result]) -> str:
    """What all results of a page have in common, in a paragraph."""
    one = results[0]
    models = {name: own for result in results for name, own in result.model.items()}
    days = sorted({result.started[:10] for result in results})
    about = "{processor}, {cores} cores, one thread a party, no pinning".format_map(one.machine)
    versions = ", ".join(f"{name} {text}" for name, text in one.versions.items())
    state = f"commit {one.commit.rstrip('+')}" + (" with changes that are not in it" if one.commit.endswith("+") else "")
    named = "".join(f"; model {name} {own}" for name, own in models.items())
    return f"Measured at {state} on {' and '.join(days)}{named}. {about}; {versions}."


def provenance(result: Result) -> str:
    """Where one result is from."""
    took = f" took {result.took_s / 60:.1f} min," if result.took_s else ""
    return f"`{result.command}`, {result.started},{took} load {result.machine.get('load')} at the start."


def markdown(result: Result) -> str:
    """The whole result for people."""
    state = "" if result.complete else " (unfinished: what follows is what had been measured)"
    parts = [f"## {result.scenario}{state}\n", f"{source([result])} {provenance(result)}\n"]
    for title, text in (
        ("Budget", table(*budget(result.budget))),
        ("Totals", _totals(result.totals)),
        ("Figures", table(*by_name(result.measures)) if result.scenario == "micro" else _measures(result.measures)),
        ("Operators, online", _operators(result.rows)),
        ("Absent", table(("what", "why"), [(a.what, a.reason) for a in result.absent])),
    ):
        if text:
            parts.append(f"### {title}\n\n{text}")
    if result.notes:
        parts.append("### Notes\n\n" + "".join(f"- {note}\n" for note in result.notes))
    return "\n".join(parts)
