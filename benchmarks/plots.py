"""The report's pictures. Each takes results and gives a figure, or None where they hold nothing for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks import choose
from benchmarks.published import AERO, SYSTEMS
from benchmarks.schema import Link, Result

OURS, THEIRS, OTHER = "#1f6f8b", "#b0b7bd", "#c8553d"
KINDS = {
    "embedding": "#8d99ae",
    "c_attn": "#6a994e",
    "attention": OURS,
    "c_proj": "#a7c957",
    "fused": "#f2a65a",
    "c_fc": "#f2a65a",
    "mlp": "#f2a65a",
    "gelu": OTHER,
    "relu": OTHER,
    "layer_norm": "#9a6fb0",
    "scale": "#9a6fb0",
    "lm_head": "#8d99ae",
    "argmax": "#3d405b",
}


def _figure(width: float = 7.2, height: float = 3.4, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _log(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "1235" else ""))


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], colours: Sequence[str], texts: Sequence[str], *, log: bool = False
) -> None:
    places = range(len(values))[::-1]
    axes.barh(places, values, color=colours, height=0.72)
    axes.set_yticks(places, labels)
    for place, number, text in zip(places, values, texts, strict=True):
        axes.annotate(text, (number, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    if log:
        axes.set_xscale("log")
    axes.set_xlim(min(values) / 2.5 if log else 0, max(values) * (6 if log else 1.25))


def headline(results: Sequence[Result]) -> Figure | None:
    """Online bytes of the smallest network beside published systems."""
    ours = choose.smallest(results)
    if ours is None or ours.width < 768:
        return None
    lines = [(f"{name}: {what.replace(', published', '')}", gigabytes, THEIRS) for name, what, gigabytes, *_ in SYSTEMS]
    for total in choose.totals(results, backend="crypten", phase="online", width=ours.width, seq=ours.seq):
        lines.append((f"CrypTen: {total.variant}, measured", total.bytes_sent / 1e9, OTHER))
    for total in choose.ladder_totals(results):
        if total.variant == "SM+LN+G" and total.width == ours.width:
            lines.append((f"privinf: {total.variant}, measured", total.bytes_sent / 1e9, OURS))
    lines.append((f"privinf: {ours.variant}, measured", ours.bytes_sent / 1e9, OURS))
    figure, axes = _figure(8.2, 0.34 * len(lines) + 1)
    labels, values, colours = zip(*lines, strict=True)
    _bars(axes, labels, values, colours, [f"{v:.3g} GB" for v in values], log=True)
    axes.set_xlabel("online bytes of one pass, GPT-2 size, T = 128, GB")
    return figure


def ladder(results: Sequence[Result]) -> Figure | None:
    """Online bytes by network, ours and AERO's, each relative to its own SM+LN+G."""
    found = choose.ladder_totals(results)
    if len(found) < 2:
        return None
    published = {line.network: line.gigabytes for line in AERO}
    figure, (left, right) = _figure(9.2, 0.33 * len(found) + 1.1, 2)
    names = [t.variant for t in found]
    _bars(left, names, [t.bytes_sent / 1e6 for t in found], [OURS] * len(found), [f"{t.bytes_sent / 1e6:.3g} MB" for t in found])
    left.set_xlabel(f"ours, online, {found[0].layers} layers of {found[0].width}, T = {found[0].seq}, MB")
    places = range(len(names))[::-1]
    base = next((t.bytes_sent for t in found if t.variant == "SM+LN+G"), found[0].bytes_sent)
    right.barh([p + 0.19 for p in places], [base / t.bytes_sent for t in found], height=0.36, color=OURS, label="ours, this size")
    theirs = [(p, published["SM+LN+G"] / published[name]) for p, name in zip(places, names, strict=True) if name in published]
    if theirs:
        right.barh([p - 0.19 for p, _ in theirs], [ratio for _, ratio in theirs], height=0.36, color=THEIRS, label="AERO, GPT-2 size")
    right.set_yticks(places, [""] * len(names))
    right.set_xlabel("times fewer bytes than SM+LN+G")
    right.axvline(1, color="black", linewidth=0.6)
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)  # above all bars
    return figure


def waterfall(results: Sequence[Result]) -> Figure | None:
    """Online bytes layer by layer, added up, by operator."""
    total = choose.smallest(results)
    rows = choose.rows_of(results, total.setting, phase="online", party="client") if total else []
    if not rows or total is None:
        return None
    layers = list(dict.fromkeys(row.layer or row.op or "control" for row in rows))
    layers = [name for name in layers if name != "control"]
    figure, axes = _figure(8.2, 3.6)
    level, used = 0.0, set()
    for place, layer in enumerate(layers):
        for row in rows:
            if (row.layer or row.op) != layer:
                continue
            height = (row.bytes_sent + row.bytes_received) / 1e6
            kind = next((kind for kind in KINDS if kind in row.op), "other")
            axes.bar(place, height, bottom=level, color=KINDS.get(kind, THEIRS), label=None if kind in used else kind, width=0.86)
            used.add(kind)
            level += height
        axes.plot([place + 0.43, place + 1 - 0.43], [level, level], color="black", linewidth=0.5)
    axes.set_xticks(range(len(layers)), [name.removeprefix("h.").split(".")[0] for name in layers], rotation=60, fontsize=8)
    axes.set_ylabel("online bytes so far, both ways, MB")
    axes.set_title(f"{total.variant}, {total.layers} layers of {total.width}, T = {total.seq}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def links(results: Sequence[Result]) -> Figure | None:
    """Seconds against the round trip for several rates: measured points over the model."""
    found = choose.totals(choose.of_scenario(results, "links"), backend="privinf", phase="online")
    plain = next((t for t in found if t.link == Link()), None)
    shaped = [t for t in found if t.link.rtt_ms is not None and t.seconds is not None]
    if plain is None or plain.seconds is None or not shaped:
        return None
    rows = choose.rows_of(results, plain.setting, phase="online", party="client")
    figure, axes = _figure(7.6, 3.8)
    rates = sorted({t.link.mbit_s for t in shaped}, reverse=True)  # type: ignore[type-var]
    across = [step * 1.0 for step in range(0, round(max(t.link.rtt_ms or 0 for t in shaped) * 1.3) + 2)]
    for index, rate in enumerate(rates):
        colour = f"C{index}"
        axes.plot(across, [choose.latency(rows, r, rate or 1, plain.seconds) for r in across], color=colour, linewidth=1)
        for t in shaped:
            if t.link.mbit_s == rate:
                style: dict[str, Any] = {"marker": "o"} if t.link.emulated else {"marker": "s", "markerfacecolor": "white"}
                axes.plot([t.link.rtt_ms], [t.seconds], color=colour, linestyle="", **style)
        axes.plot([], [], color=colour, marker="o", label=f"{rate:g} Mbit/s")
    axes.plot([], [], color="gray", marker="s", markerfacecolor="white", linestyle="", label="shaped by the kernel")
    axes.axhline(plain.seconds, color="gray", linewidth=0.8, linestyle=":", label="loopback")
    seconds = [plain.seconds, *(t.seconds or 0.0 for t in shaped)]
    if max(seconds) > 5 * min(seconds):
        _log(axes)
    else:
        axes.set_ylim(0, None)
    axes.set_xlabel("round trip, ms")
    axes.set_ylabel("online seconds of one pass")
    axes.set_title(f"{plain.variant}, T = {plain.seq}: points measured, lines the model", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def scale(results: Sequence[Result]) -> Figure | None:
    """Payload against the prompt's length: attention and the rest, measured and predicted, and the slopes T^2 / 2 and T."""
    lengths = scale_lengths(results)
    if len(lengths) < 3:
        return None
    figure, (left, right) = _figure(9.2, 3.8, 2)
    seqs = [seq for seq, *_ in lengths]
    attention, rest = [a / 1e6 for _, a, _, _, _ in lengths], [r / 1e6 for _, _, r, _, _ in lengths]
    predicted = [(seq, p / 1e6) for seq, _, _, p, _ in lengths if p is not None]
    left.plot(*zip(*predicted, strict=True), color="black", linewidth=1, label="all, predicted by `explain`")
    left.plot(seqs, [a + r for a, r in zip(attention, rest, strict=True)], "k+", markersize=9, label="all, measured")
    left.plot(seqs, attention, "o", color=OURS, label="attention, measured")
    left.plot(seqs, rest, "s", color=OTHER, label="the rest, measured")
    last = seqs[-1]
    pair, row = choose.quadratic(seqs, attention)
    left.plot(seqs, [pair * t * (t + 1) / 2 for t in seqs], color=OURS, linewidth=0.9, linestyle=":")
    left.plot(seqs, [pair * t * (t + 1) / 2 + row * t for t in seqs], color=OURS, linewidth=0.9)
    left.plot(seqs, [rest[-1] * t / last for t in seqs], color=OTHER, linewidth=0.9)
    left.set(xscale="log", yscale="log", xlabel="T, tokens", ylabel="online payload, MB")
    left.set_xticks(seqs, [str(seq) for seq in seqs], minor=False)
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8, title="lines: a T(T + 1)/2 + b T, dotted without b; and c T", title_fontsize=8)
    right.plot(seqs, [s for *_, s in lengths], "o-", color=OURS)
    right.set(xscale="log", xlabel="T, tokens", ylabel="online seconds on loopback")
    _log(right)
    right.set_xticks(seqs, [str(seq) for seq in seqs])
    right.xaxis.minorticks_off()
    return figure


def scale_lengths(results: Sequence[Result]) -> list[tuple[int, int, int, float | None, float]]:
    """(T, payload of attention, payload of the rest, all predicted, seconds) of the network that was run at most lengths."""
    runs = choose.of_scenario(results, "scale")
    found = choose.totals(runs, backend="privinf", phase="online")
    shapes = [(t.layers, t.width) for t in found]
    if not shapes:
        return []
    shape = max(set(shapes), key=shapes.count)
    lines = []
    for t in sorted((t for t in found if (t.layers, t.width) == shape), key=lambda t: t.seq):
        attention, rest = choose.split(choose.rows_of(runs, t.setting, phase="online", party="client"))
        lines.append((t.seq, attention, rest, choose.value(runs, t.setting, "online payload, predicted", "privinf"), t.seconds or 0.0))
    return lines


def generate(results: Sequence[Result]) -> Figure | None:
    """One more token: bytes and seconds against the cached length, beside a pass without a cache."""
    runs = choose.of_scenario(results, "generate")
    cost = choose.measures(runs, name="one more token, bytes", of="privinf")
    seconds = choose.measures(runs, name="one more token, seconds", of="privinf")
    if len(cost) < 2:
        return None
    figure, (left, right) = _figure(8.2, 3.2, 2)
    whole = {what: choose.measures(runs, name=f"the same token without a cache, {what}", of="privinf") for what in ("bytes", "seconds")}
    left.plot([m.seq for m in cost], [m.value / 1e6 for m in cost], "o-", color=OURS, label="over the cache")
    left.plot([m.seq for m in whole["bytes"]], [m.value / 1e6 for m in whole["bytes"]], "s--", color=OTHER, label="without a cache")
    left.set(xlabel="tokens before this one", ylabel="online, MB a token")
    for found, colour, form in ((seconds, OURS, "o-"), (whole["seconds"], OTHER, "s--")):
        for m in found:
            right.plot([m.seq] * len(m.samples), m.samples, ".", color=THEIRS)
        right.plot([m.seq for m in found], [m.value for m in found], form, color=colour)
    right.set(xlabel="tokens before this one", ylabel="online, seconds a token")
    for axes in (left, right):
        _log(axes)
    left.legend(frameon=False, fontsize=8)
    return figure


def serving(results: Sequence[Result]) -> Figure | None:
    """Clients at once: tokens a second of all; and resident memory over many tokens and sessions."""
    runs = choose.of_scenario(results, "generate")
    rates = choose.measures(runs, name="tokens a second, all clients")
    levels = [m for m in choose.measures(runs) if m.name.startswith("memory, growth over ")]
    if not rates or not levels:
        return None
    figure, (left, right) = _figure(8.6, 3.2, 2)
    left.bar([m.of.split()[0] for m in rates], [m.value for m in rates], color=OURS, width=0.6)
    for place, m in enumerate(rates):
        left.plot([place] * len(m.samples), m.samples, ".", color="black", markersize=4)
    left.set(xlabel="clients at once", ylabel="tokens a second, all together")
    _memory(right, [(f"{m.of}, {m.name.removeprefix('memory, growth over ')}", m.of, m.samples) for m in levels])
    right.set(xlabel="share of the sessions", ylabel="resident memory, MB")
    return figure


def soak(results: Sequence[Result]) -> Figure | None:
    """Resident memory of the parties: in the crowd, and at the quiet moments."""
    runs = choose.of_scenario(results, "soak")
    crowd, quiet = (choose.measures(runs, name=name) for name in ("memory in the crowd, at most", "memory when nobody is there"))
    if not crowd:
        return None
    figure, (left, right) = _figure(8.6, 3.2, 2)
    for axes, found, where in ((left, crowd, "in the crowd"), (right, quiet, "when nobody is there")):
        _memory(axes, [(m.of, m.of, m.samples) for m in found])
        axes.set(xlabel=f"share of the time, {where}", ylabel="resident memory, MB")
    return figure


PARTIES = {"server": OURS, "client": OTHER, "dealer": "#6a994e", "gateway": "#9a6fb0"}


def _memory(axes: Axes, lines: Sequence[tuple[str, str, Sequence[float]]]) -> None:
    """Lines of (label, party, bytes) over their own length; of one party the second is dashed."""
    seen: set[str] = set()
    for label, party, values in lines:
        places = [place / max(1, len(values) - 1) for place in range(len(values))]
        axes.plot(places, [v / 1e6 for v in values], "--" if party in seen else "-", color=PARTIES.get(party, THEIRS), label=label)
        seen.add(party)
    axes.set_ylim(0, 1.35 * max(max(values) for *_, values in lines) / 1e6)
    axes.legend(frameon=False, fontsize=7, ncols=2)


def pareto(results: Sequence[Result]) -> Figure | None:
    """Perplexity against online bytes: trained checkpoints here, AERO's published ones."""
    runs = choose.of_scenario(results, "pareto")
    points = []
    for m in choose.measures(runs, name="held-out perplexity"):
        cost = choose.measures(runs, name="online bytes", of=m.of)
        points += [(cost[-1].value / 1e6, m.value, f"{m.of}: {m.variant}")] if cost else []
    if not points:
        return None
    figure, (left, right) = _figure(9.2, 3.2, 2)
    theirs = [(line.gigabytes, line.perplexity, line.network) for line in AERO]
    for axes, marks, colour in ((left, points, OURS), (right, theirs, THEIRS)):
        axes.plot([x for x, *_ in marks], [y for _, y, _ in marks], "o", color=colour)
        for place, (x, y, name) in enumerate(marks):
            axes.annotate(name, (x, y), xytext=(6, (-12, 6, -3)[place % 3]), textcoords="offset points", fontsize=8)
        axes.margins(0.25)
    left.set(xlabel="online bytes of one pass, MB", ylabel="held-out perplexity, T = 128", title="here, each checkpoint's own size")
    right.set(xlabel="communication, GB", ylabel="perplexity, T = 128", title="AERO, published, GPT-2 size")
    return figure


def passes(results: Sequence[Result]) -> Figure | None:
    """The histogram of each pass's worst logit error, and the bound."""
    for m in choose.measures(choose.of_scenario(results, "passes"), name="worst logit error"):
        figure, axes = _figure(height=2.8)
        axes.hist(m.samples, bins=40, color=OURS)
        axes.axvline(choose.BOUND, color=OTHER, linestyle="--", label=f"bound, {choose.BOUND}")
        axes.set(xlabel="worst error of a logit in a pass, against float", ylabel=f"passes, of {len(m.samples)}", xlim=(0, None))
        axes.legend(frameon=False)
        return figure
    return None


FIGURES = {f.__name__: f for f in (headline, ladder, waterfall, links, scale, generate, serving, soak, pareto, passes)}
