"""Two results of one scenario side by side: bytes and rounds exactly, seconds beyond their noise."""

from __future__ import annotations

from typing import Any

from benchmarks.links import name_of
from benchmarks.output import number, ours, size, table
from benchmarks.schema import Measure, Result, Setting
from protocols.errors import ConfigError

HANDSHAKE = 4096
"""Bytes by which a phase may differ between two runs of one program: certificates and tickets of TLS, heartbeats."""
TOLERANCE = 0.002
NOISE = 0.1
"""Medians of seconds closer than this are the same, however few their samples."""

Place = tuple[Setting, str]


def _counts(result: Result) -> dict[Place, dict[str, int]]:
    """Payload, bytes and rounds by setting and phase."""
    found: dict[Place, dict[str, int]] = {}
    for total in result.totals:
        found[total.setting, total.phase] = {"bytes": total.bytes_sent, "rounds": total.rounds}
    for row in result.rows:
        if row.payload is not None:
            cell = found[row.setting, row.phase]
            cell["payload"] = cell.get("payload", 0) + row.payload
    return found


def _operators(result: Result, setting: Setting, phase: str) -> dict[tuple[str, str], int]:
    """Payload (where it is counted, bytes otherwise) by layer and operator."""
    found: dict[tuple[str, str], int] = {}
    for row in result.rows:
        if (row.setting, row.phase) == (setting, phase):
            moved = row.bytes_sent if row.payload is None else row.payload
            found[row.layer, row.op] = found.get((row.layer, row.op), 0) + moved
    return found


def _grew(name: str, old: int, new: int) -> bool:
    """Payload and rounds are exact; bytes hold what TLS says."""
    return new > old + (HANDSHAKE + old * TOLERANCE if name == "bytes" else 0)


def _changed(name: str, old: int, new: int) -> bool:
    return _grew(name, old, new) or _grew(name, new, old)


def _noisy(old: tuple[float, ...], new: tuple[float, ...]) -> bool:
    """Whether two sets of samples overlap, or their middles are within NOISE."""
    if not old or not new:
        return True
    a, b = sorted(old), sorted(new)
    middles = a[len(a) // 2], b[len(b) // 2]
    return (a[0] <= b[-1] and b[0] <= a[-1]) or abs(middles[1] - middles[0]) <= NOISE * middles[0]


def _key(m: Measure) -> tuple[Any, ...]:
    return (m.name, m.of, m.variant, m.layers, m.width, m.seq, m.link)


def _title(setting: Setting) -> list[object]:
    return [setting.variant, f"{setting.layers} x {setting.width}", setting.seq, ours(setting), setting.device, name_of(setting.link)]


def compare(before: Result, after: Result) -> tuple[str, bool]:
    """Markdown of what changed, and whether bytes or rounds grew, or a setting that was measured before is missing now.

    Seconds and errors are shown where they changed beyond noise; they alone are no regression.
    """
    if before.scenario != after.scenario:
        raise ConfigError(f"{before.scenario} and {after.scenario} are different scenarios", remedy="compare two runs of one")
    old, new = _counts(before), _counts(after)
    lines: list[list[object]] = []
    regressed = False
    for place in old:
        setting, phase = place
        if place not in new:
            lines.append([*_title(setting), phase, "all", "measured", "missing", "regression"])
            regressed = True
            continue
        for name, was in old[place].items():
            now = new[place].get(name, 0)
            if not _changed(name, was, now):
                continue
            worse = _grew(name, was, now)
            regressed |= worse
            show = str if name == "rounds" else size
            lines.append([*_title(setting), phase, name, show(was), show(now), "regression" if worse else "better"])
            if name == "payload":
                lines += _by_operator(before, after, setting, phase)
    lines += _seconds(before, after)
    head = ("network", "layers x width", "T", "backend", "device", "link", "phase", "what", "before", "after", "")
    text = f"{before.scenario}: {before.commit or '?'} -> {after.commit or '?'}\n\n"
    for result, name in ((before, "before"), (after, "after")):
        if not result.complete:
            text += f"The run {name} is unfinished.\n\n"
    text += table(head, lines) or "Bytes and rounds are the same; seconds and errors within their noise.\n"
    figures, worse = _figures(before, after)
    return text + figures, regressed or worse


def _by_operator(before: Result, after: Result, setting: Setting, phase: str) -> list[list[object]]:
    was, now = _operators(before, setting, phase), _operators(after, setting, phase)
    blank: list[object] = [""] * 6
    return [
        [*blank, phase, ".".join(filter(None, label)), size(was.get(label, 0)), size(now.get(label, 0)), ""]
        for label in dict.fromkeys([*was, *now])
        if was.get(label, 0) != now.get(label, 0)
    ]


def _seconds(before: Result, after: Result) -> list[list[object]]:
    old = {(t.setting, t.phase): t.samples for t in before.totals}
    lines: list[list[object]] = []
    for total in after.totals:
        samples = old.get((total.setting, total.phase), ())
        if not _noisy(samples, total.samples):
            middle = sorted(samples)[len(samples) // 2]
            lines.append([*_title(total.setting), total.phase, "seconds", number(middle, "s"), number(total.seconds, "s"), "beyond noise"])
    return lines


def _figures(before: Result, after: Result) -> tuple[str, bool]:
    """Single figures without samples that differ: bytes an element and rounds of `micro` are exact, so growth is a regression."""
    old, lines, worse = {_key(m): m for m in before.measures}, [], False
    for m in after.measures:
        was = old.get(_key(m))
        exact = was is not None and not (m.samples or was.samples) and ("rounds" in m.name or "payload" in m.name or m.unit == "B/element")
        if was is None or not (exact or "error" in m.name) or m.value == was.value:
            continue
        grew = exact and m.value > was.value
        if not exact and abs(m.value - was.value) <= NOISE * abs(was.value):
            continue
        worse |= grew
        lines.append(
            [m.of, m.variant, m.seq or "", m.name, number(was.value, m.unit), number(m.value, m.unit), "regression" if grew else ""]
        )
    shown = table(("of", "network", "T", "what", "before", "after", ""), lines)
    return (f"\n{shown}" if shown else ""), worse
