"""The first table: ours, stock CrypTen in the same run, and what others published, one line for each thing that is measured."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import choose, trusts
from benchmarks.output import number, size, spread
from benchmarks.published import AERO, AERO_BEST, BASELINE, SMALLEST, SYSTEMS
from benchmarks.schema import Link, Result, Setting, Total

HEAD = ("", "privinf", "stock CrypTen, same run", "others, as published")


def headline(results: Sequence[Result]) -> tuple[Sequence[str], list[list[object]]]:
    """Head and lines: the ladder's smallest network and its baseline, what lies between them, the shipped model, a further token."""
    lines: list[list[object]] = []
    ladder = {t.variant: t for t in choose.ladder_totals(results)}
    small = next((t for name, t in ladder.items() if name.startswith("SM+ScFuFFN_i")), None)
    base = ladder.get(BASELINE)
    for total in (small, base):
        if total is not None:
            lines += _network(choose.of_scenario(results, "ladder"), total)
    if small is not None and base is not None:
        at = "" if base.width >= 768 else " at GPT-2 size"
        best = next(line for line in AERO if line.network == BASELINE)
        least = next(line for line in AERO if line.network == SMALLEST)
        lines.append([f"**{BASELINE} over {small.variant}**", "", "", ""])
        aero = f"AERO {times(best.gigabytes, least.gigabytes)}, at best {AERO_BEST['communication']} x{at}"
        lines.append(["online bytes", times(base.bytes_sent, small.bytes_sent), "", aero])
        lines.append(["online seconds", times(base.seconds, small.seconds), "", f"AERO {AERO_BEST['latency']} x{at}"])
    lines += _alone(results)
    for result in results:
        if result.scenario not in ("ladder", "trust"):  # whose network is the ladder's smallest
            for total in choose.totals([result], backend="crypten", phase="online"):
                mine = next((t for t in choose.totals([result], backend="privinf", phase="online") if choose.same(t, total)), None)
                lines += _network([result], mine, ", ".join(result.model)) if mine else []
    for m in choose.measures(results, name="one more token, seconds", link=Link(), of="GPT-2 size")[-1:]:
        cost = number(choose.value(results, m, "one more token, bytes", m.of), "B")
        lines.append([f"**One more token of {m.variant}**, GPT-2 size, {m.seq} cached", "", "", ""])
        lines.append(
            ["online bytes; seconds, the dealer's part included", f"{cost}; {number(m.value, 's')}", "", "no other system does it"]
        )
    for m in choose.measures(results, name="one reply, tokens a second", link=Link())[-1:]:
        batches = [b for b in choose.measures(results, link=Link(), of=m.of) if choose.same(b, m) and b.name.endswith(", tokens a second")]
        lines.append([f"**Replies of {m.variant}**, {m.layers} layers of {m.width}, after {m.seq} tokens", "", "", ""])
        lines += [[f"tokens a second, the dealer's part included: {b.name.split(',')[0]}", number(b.value), "", ""] for b in batches]
    return HEAD, lines


def times(a: float | None, b: float | None) -> str:
    """How many times b."""
    return f"{a / b:.3g} x" if a and b else ""


def error(results: Sequence[Result], setting: Setting, backend: str) -> str:
    """The worst error of a logit, pass by pass, from the least to the most."""
    same = {name: getattr(setting, name) for name in ("variant", "layers", "width", "seq", "link")}
    found = choose.measures(results, name="worst logit error", of=backend, **same)
    samples = [sample for m in found for sample in m.samples or (m.value,)]
    return spread(samples) if samples else ""


def _network(results: Sequence[Result], ours: Total, name: str = "") -> list[list[object]]:
    theirs = next((t for t in choose.totals(results, backend="crypten", phase="online") if choose.same(t, ours)), None)
    published = _published(ours)
    where = f"{ours.layers} layers of {ours.width}, {ours.seq} tokens"
    lines: list[list[object]] = [[f"**{name + ', ' if name else ''}{ours.variant}**, {where}", "", "", ""]]
    for what, mine, unit in (("bytes", ours.bytes_sent, "B"), ("rounds", ours.rounds, ""), ("seconds", ours.seconds, "s")):
        other = ""
        if theirs is not None:
            value = {"bytes": theirs.bytes_sent, "rounds": theirs.rounds, "seconds": theirs.seconds}[what]
            ratio = choose.value(results, theirs.setting, f"online {what}, times ours", "crypten")
            other = (size(value) if unit == "B" and value else number(value, unit)) + (f", {ratio:.3g} x" if ratio else "")
        shown = {"bytes": "online bytes", "rounds": "rounds", "seconds": "online seconds, loopback, one thread a party"}[what]
        lines.append([shown, size(mine) if unit == "B" and mine else number(mine, unit), other, published.get(what, "")])
    beside = error(results, theirs.setting, "crypten") if theirs is not None else ""
    lines.append(["worst logit error of a pass, least to most (passes)", error(results, ours.setting, "privinf"), beside, ""])
    return lines


def _alone(results: Sequence[Result]) -> list[list[object]]:
    """The largest network that the two parties have run without a dealer: before the query and within it."""
    setting, ways = next(iter(trusts.networks(results)), (None, []))
    ours = next((way for way in ways if way.name == trusts.NAMES["privinf", True][0]), None)
    if setting is None or ours is None:
        return []
    rest = [way for way in ways if "all" in way.bytes]
    others = [f"{way.name.split(',')[0]} {size(way.bytes['all'])}" for way in rest]
    slower = [f"{way.name.split(',')[0]} {number(way.seconds['all'], 's')}" for way in rest if "all" in way.seconds]
    shown = {what: [getattr(ours, what).get(phase) for phase in ("offline", "online")] for what in ("bytes", "seconds")}
    return [
        [f"**{setting.variant} without a dealer**, {setting.layers} layers of {setting.width}, {setting.seq} tokens", "", "", ""],
        ["bytes before the query; of it", "; ".join(size(b) for b in shown["bytes"] if b is not None), "", "; ".join(others)],
        ["seconds before the query; of it", "; ".join(number(s, "s") for s in shown["seconds"] if s is not None), "", "; ".join(slower)],
    ]


def _published(ours: Total) -> dict[str, str]:
    """Of GPT-2's size alone."""
    aero = next((line for line in AERO if line.network == ours.variant), None)
    if aero is None or ours.width < 768:
        return {}
    found = {"bytes": f"AERO {aero.gigabytes} GB", "seconds": f"AERO {aero.minutes * 60:.0f} s, LAN, 2 x 32 threads"}
    for system in SYSTEMS:
        if system.kind == ours.variant and system.name in ("SIGMA", "SPU SEMI2K", "SPU CHEETAH"):
            earlier = " (measured earlier)" if "measured" in system.source else ""
            found["bytes"] += f"; {system.name} {system.gigabytes:.3g} GB{earlier}"
            if system.rounds:
                found["rounds"] = f"{system.name} {system.rounds}"
    return found
