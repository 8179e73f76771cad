"""Trust models side by side: the report's section and its picture, of every network that the two parties have run alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from benchmarks import choose, style
from benchmarks.output import number, size
from benchmarks.published import AERO, SYSTEMS
from benchmarks.schema import Phase, Result, Setting, Total

PHASES: tuple[tuple[Phase, str], ...] = (("online", style.BLUE), ("offline", style.ORANGE), ("setup", style.GREY))
NAMES: dict[tuple[str, bool], tuple[str, str]] = {
    ("privinf", False): ("privinf, dealer", "a dealer that colludes with neither"),
    ("privinf", True): ("privinf, two parties", "the two alone"),
    ("crypten", False): ("stock CrypTen", "party 0 can read everything"),
    ("spu-semi2k", False): ("SPU SEMI2K", "party 0 can read everything"),
    ("spu-cheetah", False): ("SPU CHEETAH", "the two alone"),
}
"""By backend and whether the two were alone: what it is called, and who is trusted."""


@dataclass(frozen=True)
class Way:
    """One system on one network: bytes of both directions and seconds by phase, as far as there are any; rounds of the online phase."""

    name: str
    trust: str
    bytes: dict[str, float]
    seconds: dict[str, float]
    rounds: dict[str, int]
    source: str


def networks(results: Sequence[Result]) -> list[tuple[Setting, list[Way]]]:
    """Of each network that the two parties have run alone, on loopback: the largest first."""
    found: dict[tuple[str, int, int, int], Setting] = {}
    for t in choose.totals(results, backend="privinf", phase="online", alone=True):
        if t.link.rtt_ms is None and t.link.mbit_s is None:
            found.setdefault((t.variant, t.layers, t.width, t.seq), t)
    ordered = sorted(found.values(), key=lambda t: (-t.width * t.layers, -t.seq))
    return [(setting, [*_measured(results, setting), *_published(setting)]) for setting in ordered]


def _measured(results: Sequence[Result], setting: Setting) -> list[Way]:
    first = choose.of_scenario(results, "trust")  # measured for this, in one run
    own = [r for r in results if r not in first]
    ways = []
    for (backend, alone), (name, trust) in NAMES.items():
        phases: dict[str, Total] = {}
        for t in choose.totals([*first, *own], backend=backend, alone=alone):
            if choose.same(t, setting):
                phases.setdefault(t.phase, t)
        if phases:
            sizes = {phase: float(t.bytes_sent) for phase, t in phases.items()}
            seconds = {phase: t.seconds for phase, t in phases.items() if t.seconds is not None}
            rounds = {phase: t.rounds for phase, t in phases.items() if t.rounds}
            ways.append(Way(name, trust, sizes, seconds, rounds, "measured"))
    return ways


def _published(setting: Setting) -> list[Way]:
    """At GPT-2's size: all phases, which these systems do not tell apart."""
    if setting.width < 768 or setting.seq != 128:
        return []
    ways = [
        Way("AERO", "the two alone", {"all": a.gigabytes * 1e9}, {"all": a.minutes * 60}, {}, "published, LAN, 2 x 32 threads")
        for a in AERO
        if a.network == setting.variant
    ]
    return ways + [
        Way(f"{s.name}, earlier", "the two alone", {"all": s.gigabytes * 1e9}, {}, {}, s.source)
        for s in SYSTEMS
        if s.kind == setting.variant and s.name == "SPU CHEETAH"
    ]


def section(results: Sequence[Result]) -> tuple[str, str, str, list[tuple[Sequence[str], Sequence[Sequence[object]]]]]:
    """Title, picture, text and table."""
    lines: list[list[object]] = []
    for setting, ways in networks(results):
        lines.append([f"**{_where(setting)}**", *[""] * 9])
        for way in ways:
            sizes = [size(way.bytes[phase]) if phase in way.bytes else "" for phase, _ in PHASES]
            seconds = [number(way.seconds[phase], "s") if phase in way.seconds else "" for phase, _ in PHASES]
            rounds = [str(way.rounds.get(phase, "")) for phase in ("online", "offline")]
            if "all" in way.bytes:
                sizes[0] = f"all phases {size(way.bytes['all'])}"
                seconds[0] = number(way.seconds["all"], "s") if "all" in way.seconds else ""
            lines.append([way.name, way.trust, *sizes, *seconds, *rounds])
    text = (
        "The same network in the same run, one system after the other; bytes of both directions, of all parties. Set-up is once for a "
        "client and a model, offline before a query and independent of it. CrypTen and SPU move everything within the query. Who has to be "
        "trusted with what is said in SECURITY.md; AERO's figures are published, of other machines."
    )
    head = ("", "trusted", "online", "offline", "set-up", "online s", "offline s", "set-up s", "rounds online", "offline")
    return "Trust models side by side", "trust", text if lines else "", [(head, lines)]


def _where(setting: Setting) -> str:
    return f"{setting.variant}, {setting.layers} layers of {setting.width}, T = {setting.seq}"


def trust(results: Sequence[Result]) -> Figure | None:
    """Bytes and seconds by phase of the largest network that the two parties have run alone, a bar for each system."""
    setting, ways = next(iter(networks(results)), (None, []))
    if setting is None:
        return None
    told = "; ".join(
        f"{way.name} {', '.join(f'{phase} {size(value)}' for phase, value in way.bytes.items())}"
        + (f" in {number(sum(way.seconds.values()), 's')}" if way.seconds else "")
        for way in ways
    )
    alt = f"Trust models side by side, {_where(setting)}: {told}."
    figure, (left, right) = style.picture(alt, 0.42 * len(ways) + 1.3, 1, 2, sharey=True)
    colours: dict[str, str] = {**{str(phase): colour for phase, colour in PHASES}, "all": style.PURPLE}
    names = {"setup": "set-up, once", "all": "all phases"}
    places = range(len(ways))[::-1]
    for axes, scale, unit in ((left, 1e6, "MB"), (right, 1.0, "s")):
        most = 0.0
        for place, way in zip(places, ways, strict=True):
            values, level = way.bytes if unit == "MB" else way.seconds, 0.0
            for phase, colour in colours.items():
                if phase in values:
                    axes.barh(place, values[phase] / scale, left=level, height=0.6, color=colour, label=names.get(phase, phase))
                    level += values[phase] / scale
            shown = f"{level:,.0f}" if level >= 100 else f"{level:.3g}"
            axes.annotate(
                shown if values else "", (level, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=style.SMALL
            )
            most = max(most, level)
        axes.set_xlim(0, 1.3 * most or 1.0)
        axes.set_xlabel(f"{unit}, {'both directions' if unit == 'MB' else 'loopback; AERO: LAN'}", fontsize=style.FONT)
        style.grid(axes, "x")
    left.set_yticks(list(places), [way.name for way in ways])
    left.set_title(f"{setting.variant}, T = {setting.seq}", loc="left", fontsize=style.FONT)
    style.legend(figure, (left, right), 4)
    return figure
