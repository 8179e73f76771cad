"""The report's pictures. Each takes results and gives a figure, labelled with its alternative text, or None where they hold nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import choose, style
from benchmarks.published import AERO, BASELINE, SMALLEST, SYSTEMS
from benchmarks.schema import Result
from benchmarks.style import CRYPTEN, EARLIER, OURS, PUBLISHED
from benchmarks.trusts import trust

KINDS = (  # what is looked for in an operator's name, what it is called, its colour; in the order of a layer
    (("embedding",), "embedding", style.SKY),
    (("c_attn",), "maps to q, k, v", style.GREEN),
    (("attention",), "attention", style.BLUE),
    (("c_proj", "fused", "c_fc", "mlp"), "other maps and FFN", style.ORANGE),
    (("gelu", "relu", "layer_norm", "scale"), "GELU, ReLU, LayerNorm", style.VERMILION),
    (("lm_head", "argmax"), "head and argmax", style.PURPLE),
    (("",), "other", style.GREY),
)


LOOKS = (
    (OURS, "privinf"),
    (CRYPTEN, "stock CrypTen, same run"),
    (PUBLISHED, "published"),
    (EARLIER, "SPU 0.9.5, measured earlier"),
)


def headline(results: Sequence[Result]) -> Figure | None:
    """Online bytes at GPT-2 size beside stock CrypTen and published systems, one group for each network."""
    ours = {t.variant: t for t in choose.ladder_totals(results) if t.width >= 768}
    groups = [(BASELINE, "GPT-2 with LayerNorm and GELU"), (SMALLEST, f"softmax only, {SMALLEST}")]
    groups = [(kind, name) for kind, name in groups if kind in ours]
    if not groups:
        return None
    lines: list[tuple[str, str, float, float, dict[str, Any]]] = []  # group, name, GB, times ours, style
    for kind, group in groups:
        mine = ours[kind].bytes_sent / 1e9
        others = [(s.name, s.gigabytes, EARLIER if "measured" in s.source else PUBLISHED) for s in SYSTEMS if s.kind == kind] + [
            ("CrypTen", t.bytes_sent / 1e9, CRYPTEN)
            for t in choose.totals(choose.of_scenario(results, "ladder"), backend="crypten", phase="online")
            if choose.same(t, ours[kind])
        ]
        lines += [(group, name, size, size / mine, look) for name, size, look in sorted(others, key=lambda one: -one[1])]
        lines.append((group, "privinf", mine, 1.0, OURS))
    told = ". ".join(f"{group}: " + ", ".join(f"{line[1]} {line[2]:.3g}" for line in lines if line[0] == group) for _, group in groups)
    counts = [sum(line[0] == group for line in lines) for _, group in groups]
    figure, panels = style.picture(
        f"Online bytes of one pass at GPT-2 size, GB, on a logarithmic axis. {told}.",
        0.29 * len(lines) + 0.6 * len(groups) + 0.7,
        len(groups),
        sharex=True,
        height_ratios=counts,
    )
    names = {id(look): name for look, name in LOOKS}
    for look, name in LOOKS:  # in this order, whatever comes first
        panels[0].plot([], [], linestyle="", markersize=8, label=name, **look)
    for axes, (_, group) in zip(panels, groups, strict=True):
        own = [line for line in lines if line[0] == group]
        places = range(len(own))[::-1]
        for place, (_, _, size, ratio, look) in zip(places, own, strict=True):
            axes.plot([size], [place], linestyle="", markersize=8, label=names[id(look)], **look)
            text = f"{size:.3g} GB" + (f", {ratio:.3g} x ours" if ratio > 1 else "")
            axes.annotate(text, (size, place), xytext=(9, 0), textcoords="offset points", va="center", fontsize=style.SMALL)
        axes.set_yticks(list(places), [name for _, name, *_ in own])
        axes.set_ylim(-0.6, len(own) - 0.4)
        axes.set_title(group, loc="left", fontsize=style.FONT, fontweight="bold")
        style.grid(axes, "both")
    sizes = [size for *_, size, _, _ in lines]
    panels[-1].set_xlim(min(sizes) / 1.6, max(sizes) * 14)
    style.log(panels[-1].xaxis)
    panels[-1].set_xlabel("online bytes of one pass, T = 128, GB (logarithmic)", fontsize=style.FONT)
    style.legend(figure, panels, 2)
    return figure


def ladder(results: Sequence[Result]) -> Figure | None:
    """Online bytes by network, ours and AERO's, and what each network saves in its own system."""
    found = choose.ladder_totals(results)
    if len(found) < 2:
        return None
    published = {line.network: line.gigabytes for line in AERO}
    base = next((t.bytes_sent for t in found if t.variant == BASELINE), found[0].bytes_sent)
    where = f"{found[0].layers} layers of {found[0].width}, T = {found[0].seq}"
    told = "; ".join(
        f"{t.variant} {t.bytes_sent / 1e6:.3g} MB" + (f", AERO {published[t.variant]} GB" if t.variant in published else "") for t in found
    )
    figure, (left, right) = style.picture(
        f"Online bytes of the ladder's networks, {where}: {told}.", 0.34 * len(found) + 1.2, 1, 2, sharey=True
    )
    places = {t.variant: place for place, t in zip(range(len(found))[::-1], found, strict=True)}
    left.plot([t.bytes_sent / 1e6 for t in found], list(places.values()), linestyle="", markersize=7, label="privinf", **OURS)
    at = [(1000 * published[name], place) for name, place in places.items() if name in published]
    left.plot(*zip(*at, strict=True), linestyle="", markersize=6, label="AERO, published, GPT-2 size", **PUBLISHED) if at else None
    style.log(left.xaxis)
    left.set_xlabel("online, MB (logarithmic)", fontsize=style.FONT)
    right.barh([p + 0.19 for p in places.values()], [base / t.bytes_sent for t in found], height=0.36, color=style.BLUE)
    theirs = [(p - 0.19, published[BASELINE] / published[name]) for name, p in places.items() if name in published]
    if theirs:
        right.barh([p for p, _ in theirs], [ratio for _, ratio in theirs], height=0.36, color=style.GREY)
    right.set_xlabel(f"times fewer bytes than {BASELINE}", fontsize=style.FONT)
    right.axvline(1, color=style.INK, linewidth=0.8)
    right.set_xlim(0, None)
    style.whole(right.xaxis)
    left.set_yticks(list(places.values()), list(places))
    style.grid(left, "both")
    style.grid(right, "x")
    style.legend(figure, left)
    return figure


def waterfall(results: Sequence[Result]) -> Figure | None:
    """Online bytes layer by layer, added up, by operator."""
    total = choose.smallest(results)
    rows = choose.rows_of(results, total.setting, phase="online", party="client") if total else []
    if not rows or total is None:
        return None
    layers = [name for name in dict.fromkeys(row.layer or row.op for row in rows) if name]
    what = f"{total.variant}, {total.layers} layers of {total.width}, T = {total.seq}"
    parts: dict[str, float] = {}
    figure, (axes,) = style.picture("", 3.7)
    level = 0.0
    for place, layer in enumerate(layers):
        for row in rows:
            if (row.layer or row.op) != layer:
                continue
            height = (row.bytes_sent + row.bytes_received) / 1e6
            _, name, colour = next(kind for kind in KINDS if any(word in row.op for word in kind[0]))
            axes.bar(place, height, bottom=level, color=colour, label=name, width=0.86)
            parts[name] = parts.get(name, 0.0) + height
            level += height
        axes.plot([place + 0.43, place + 0.57], [level, level], color=style.INK, linewidth=0.5)
    figure.set_label(
        f"Online bytes added up layer by layer, {what}: " + ", ".join(f"{name} {mb:.3g} MB" for name, mb in parts.items()) + "."
    )
    short = {"wte": "emb.", "lm_head": "head"}
    names = [name.removeprefix("h.").split(".")[0] for name in layers]
    axes.set_xticks(range(len(layers)), [short.get(name, name) for name in names], rotation=0 if len(layers) < 12 else 45)
    axes.set_xlabel("layer", fontsize=style.FONT)
    axes.set_ylabel("online so far, MB", fontsize=style.FONT)
    axes.set_title(what, loc="left", fontsize=style.FONT)
    style.grid(axes, "y")
    style.legend(figure, axes)
    return figure


def links(results: Sequence[Result]) -> Figure | None:
    """Seconds against the round trip for several rates: measured points over the model."""
    found = choose.totals(choose.of_scenario(results, "links"), backend="privinf", phase="online")
    free = choose.loopback(results)
    shaped = [t for t in found if t.link.rtt_ms is not None and t.seconds is not None]
    if free is None or free.seconds is None or not shaped:
        return None
    rows = choose.rows_of(choose.of_scenario(results, "links"), free.setting, phase="online", party="client")
    told = "; ".join(f"{t.link.rtt_ms:g} ms and {t.link.mbit_s:g} Mbit/s {t.seconds:.3g} s" for t in shaped)
    what = f"{free.variant}, T = {free.seq}"
    figure, (axes,) = style.picture(f"Online seconds of one pass over links, {what}: loopback {free.seconds:.3g} s; {told}.", 4.0)
    rates = sorted({t.link.mbit_s or 0 for t in shaped}, reverse=True)
    across = [step * 1.0 for step in range(round(max(t.link.rtt_ms or 0 for t in shaped) * 1.15) + 2)]
    for rate, colour, marker in zip(rates, style.SERIES, style.MARKERS, strict=False):
        axes.plot(across, [choose.latency(rows, rtt, rate or 1, free.seconds) for rtt in across], color=colour, linewidth=1.4)
        for t in shaped:
            if t.link.mbit_s == rate:
                face = colour if t.link.emulated else "white"
                at = [t.link.rtt_ms or 0.0], [t.seconds or 0.0]
                axes.plot(*at, color=colour, markerfacecolor=face, marker=marker, markersize=7, linestyle="", zorder=3)
        axes.plot([], [], color=colour, marker=marker, label=f"{rate:g} Mbit/s")
    axes.plot([], [], color=style.GREY, label="lines: rounds x RTT / 2 + bytes / rate")
    axes.plot([], [], color=style.GREY, marker="o", linestyle="", label="filled: emulated")
    if any(not t.link.emulated for t in shaped):
        axes.plot([], [], color=style.GREY, marker="o", markerfacecolor="white", linestyle="", label="hollow: shaped by the kernel")
    axes.axhline(free.seconds, color=style.INK, linewidth=1, linestyle=":", label="loopback")
    seconds = [free.seconds, *(t.seconds or 0.0 for t in shaped)]
    if max(seconds) > 5 * min(seconds):
        axes.set_ylim(min(seconds) / 1.5, max(seconds) * 1.5)
        style.log(axes.yaxis)
    else:
        axes.set_ylim(0, None)
    axes.set_xlim(-1.5, across[-1])
    axes.set_xlabel("round trip, ms", fontsize=style.FONT)
    axes.set_ylabel("online seconds of one pass", fontsize=style.FONT)
    axes.set_title(what, loc="left", fontsize=style.FONT)
    style.grid(axes, "both")
    style.legend(figure, axes, 2)
    return figure


def scale(results: Sequence[Result]) -> Figure | None:
    """Payload and seconds against the prompt's length: attention and the rest, measured, fitted and predicted."""
    lengths = scale_lengths(results)
    if len(lengths) < 3:
        return None
    seqs = [seq for seq, *_ in lengths]
    attention, rest = [a / 1e6 for _, a, _, _, _ in lengths], [r / 1e6 for _, _, r, _, _ in lengths]
    told = "; ".join(f"{seq} tokens {(a + r) / 1e6:.3g} MB and {s:.2g} s" for seq, a, r, _, s in lengths)
    figure, (upper, lower) = style.picture(f"Growth with the prompt's length: {told}.", 6.2, 2, 1, sharex=True, height_ratios=(3, 2))
    predicted = [(seq, p / 1e6) for seq, _, _, p, _ in lengths if p is not None]
    pair, row = choose.quadratic(seqs, attention)
    if predicted:
        upper.plot(*zip(*predicted, strict=True), color=style.INK, linewidth=1.2, label="all, as `explain` predicts")
    upper.plot(seqs, [a + r for a, r in zip(attention, rest, strict=True)], "+", color=style.INK, markersize=10, label="all, measured")
    upper.plot(seqs, [pair * t * (t + 1) / 2 + row * t for t in seqs], color=style.BLUE, linewidth=1.2, label="a T(T + 1)/2 + b T")
    upper.plot(seqs, attention, linestyle="", label="attention, measured", **OURS)
    upper.plot(seqs, [pair * t * (t + 1) / 2 for t in seqs], color=style.BLUE, linewidth=1.2, linestyle=":", label="a T(T + 1)/2")
    upper.plot(seqs, rest, "s", color=style.VERMILION, label="the rest, measured")
    upper.plot(seqs, [rest[-1] * t / seqs[-1] for t in seqs], color=style.VERMILION, linewidth=1.2, label="c T")
    style.log(upper.yaxis)
    upper.set_ylabel("online payload, MB", fontsize=style.FONT)
    lower.plot(seqs, [s for *_, s in lengths], linestyle="-", label="seconds, measured", **{**OURS, "color": style.GREEN, "marker": "D"})
    style.log(lower.yaxis)
    lower.set_ylabel("online s, loopback", fontsize=style.FONT)
    lower.set_xlabel("T, tokens (all axes logarithmic)", fontsize=style.FONT)
    style.steps(lower.xaxis, seqs)
    for axes in (upper, lower):
        style.grid(axes, "both")
    style.legend(figure, (upper, lower))
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
    whole = {what: choose.measures(runs, name=f"the same token without a cache, {what}", of="privinf") for what in ("bytes", "seconds")}
    told = "; ".join(f"after {m.seq} tokens {m.value / 1e6:.2g} MB and {s.value:.2g} s" for m, s in zip(cost, seconds, strict=True))
    figure, (upper, lower) = style.picture(
        f"One more token over the cache: {told}; the same token by a whole pass costs far more.", 5.4, 2, 1, sharex=True
    )
    lines = (("over the cache", cost, seconds, OURS, "-"), ("by a pass without a cache", whole["bytes"], whole["seconds"], CRYPTEN, "--"))
    for name, sizes, times, look, line in lines:
        upper.plot([m.seq for m in sizes], [m.value / 1e6 for m in sizes], linestyle=line, label=name, **look)
        lower.plot([m.seq for m in times], [m.value for m in times], linestyle=line, **look)
        for m in times:
            lower.plot([m.seq] * len(m.samples), m.samples, "_", color=style.INK, markersize=8, label="single samples, beside their median")
    upper.set_ylabel("online, MB a token", fontsize=style.FONT)
    lower.set_ylabel("online, seconds a token", fontsize=style.FONT)
    lower.set_xlabel("tokens before this one (bytes and seconds: logarithmic)", fontsize=style.FONT)
    for axes in (upper, lower):
        style.log(axes.yaxis)
        style.grid(axes, "both")
    style.legend(figure, (upper, lower), 2)
    return figure


def serving(results: Sequence[Result]) -> Figure | None:
    """Clients at once: tokens a second of all; and resident memory over many tokens and sessions."""
    runs = choose.of_scenario(results, "generate")
    rates = choose.measures(runs, name="tokens a second, all clients")
    levels = [m for m in choose.measures(runs) if m.name.startswith("memory, growth over ")]
    if not rates or not levels:
        return None
    told = "; ".join(f"{m.of} {m.value:.3g} tokens a second" for m in rates)
    most = "; ".join(f"{m.of} at most {max(m.samples) / 1e6:.0f} MB" for m in levels if "sessions" in m.name)
    figure, (upper, lower) = style.picture(f"All clients together: {told}. Resident memory over the sessions: {most}.", 5.8, 2, 1)
    upper.bar([m.of.split()[0] for m in rates], [m.value for m in rates], color=style.SKY, width=0.5, label="all clients together, median")
    for place, m in enumerate(rates):
        upper.plot([place] * len(m.samples), m.samples, "_", color=style.INK, markersize=12, label="single samples")
    upper.set_ylim(0, None)
    upper.set_xlabel("clients at once", fontsize=style.FONT)
    upper.set_ylabel("tokens a second", fontsize=style.FONT)
    _memory(lower, [(f"{m.of}, {m.name.removeprefix('memory, growth over ')}", m.of, m.samples) for m in levels])
    lower.set_xlabel("part of the run, %", fontsize=style.FONT)
    lower.set_ylabel("resident memory, MB", fontsize=style.FONT)
    for axes in (upper, lower):
        style.grid(axes, "y")
    style.legend(figure, (upper, lower))
    return figure


def soak(results: Sequence[Result]) -> Figure | None:
    """Resident memory of the parties: in the crowd, and at the quiet moments."""
    runs = choose.of_scenario(results, "soak")
    crowd, quiet = (choose.measures(runs, name=name) for name in ("memory in the crowd, at most", "memory when nobody is there"))
    if not crowd:
        return None
    told = "; ".join(f"{m.of} from {min(m.samples) / 1e6:.0f} to {max(m.samples) / 1e6:.0f} MB" for m in quiet)
    figure, panels = style.picture(f"Resident memory in the soak, when nobody is there: {told}.", 5.6, 2, 1, sharex=True, sharey=True)
    for axes, found, where in ((panels[0], crowd, "in the crowd"), (panels[1], quiet, "when nobody is there")):
        _memory(axes, [(m.of, m.of, m.samples) for m in found])
        axes.set_ylabel("memory, MB", fontsize=style.FONT)
        axes.set_title(where, loc="left", fontsize=style.FONT)
        style.grid(axes, "y")
    panels[1].set_xlabel("part of the time, %", fontsize=style.FONT)
    style.legend(figure, panels, 4)
    return figure


PARTIES = {"server": style.BLUE, "client": style.VERMILION, "dealer": style.GREEN, "gateway": style.PURPLE}


def _memory(axes: Axes, lines: Sequence[tuple[str, str, Sequence[float]]]) -> None:
    """Lines of (label, party, bytes) over their own length; of one party the second is dashed."""
    seen: set[str] = set()
    for label, party, values in lines:
        places = [100 * place / max(1, len(values) - 1) for place in range(len(values))]
        axes.plot(places, [v / 1e6 for v in values], "--" if party in seen else "-", color=PARTIES.get(party, style.GREY), label=label)
        seen.add(party)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.1 * max(max(values) for *_, values in lines) / 1e6))
    axes.set_xlim(0, 100)


BESIDE = ((7, 7, "left"), (7, -12, "left"), (-8, -3, "right"), (7, -12, "left"), (7, 7, "left"))
"""Where a point's name stands, in turn, so that AERO's three near ones do not cover each other."""


def pareto(results: Sequence[Result]) -> Figure | None:
    """What each network saves in bytes, and what it costs in perplexity, beside the baseline of its own system."""
    runs = choose.of_scenario(results, "pareto")
    points = []
    for m in choose.measures(runs, name="held-out perplexity"):
        cost = choose.measures(runs, name="online bytes", of=m.of)
        points += [(cost[-1].value, m.value, m.variant, f"{m.of}, {m.variant}")] if cost else []
    base = next(((x, y) for x, y, variant, _ in points if variant == BASELINE), None)
    if base is None or len(points) < 2:
        return None
    mine = [(base[0] / x, 100 * (y / base[1] - 1), name) for x, y, _, name in points]
    first = AERO[0]
    theirs = [(first.gigabytes / a.gigabytes, 100 * (a.perplexity / first.perplexity - 1), a.network) for a in AERO]
    told = "; ".join(f"{name}: {x:.3g} times fewer bytes, {y:+.0f} % perplexity" for x, y, name in mine[: len(points)])
    figure, (axes,) = style.picture(f"Bytes saved against perplexity lost. Here: {told}. AERO: 4.03 times fewer, +32 %.", 3.6)
    for found, look, name, side in (
        (mine, OURS, "here, checkpoints of models/", -1),
        (theirs, PUBLISHED, "AERO, published, GPT-2 size", 1),
    ):
        axes.plot([x for x, *_ in found], [y for _, y, _ in found], linestyle="", markersize=7, label=name, **look)
        for place, (x, y, text) in enumerate(found):
            if x == 1 and y == 0 and side < 0:
                continue  # both baselines are the same point, which is labelled once
            right, up, align = BESIDE[place % len(BESIDE)]
            axes.annotate(text, (x, y), xytext=(right, up), textcoords="offset points", fontsize=style.SMALL, ha=align)
    axes.set_xlim(0.8, 1.35 * max(x for x, *_ in mine + theirs))
    axes.margins(y=0.2)
    axes.set_xlabel(f"times fewer online bytes than {BASELINE} of the same system", fontsize=style.FONT)
    axes.set_ylabel(f"perplexity above {BASELINE}'s, %", fontsize=style.FONT)
    style.grid(axes, "both")
    style.legend(figure, axes)
    return figure


def passes(results: Sequence[Result]) -> Figure | None:
    """The histogram of each pass's worst logit error, and the bound."""
    for m in choose.measures(choose.of_scenario(results, "passes"), name="worst logit error"):
        alt = (
            f"Worst logit error of {len(m.samples)} passes: from {min(m.samples):.2g} to {max(m.samples):.2g}; the bound is {choose.BOUND}."
        )
        figure, (axes,) = style.picture(alt, 3.0)
        top = max(choose.BOUND, *m.samples)
        axes.hist(m.samples, bins=60, range=(0, top), color=style.BLUE, label="passes")
        axes.axvline(choose.BOUND, color=style.VERMILION, linestyle="--", label=f"bound, {choose.BOUND}")
        axes.set_xlim(0, 1.05 * top)
        style.whole(axes.yaxis)
        axes.set_xlabel("worst error of a logit in a pass, against float", fontsize=style.FONT)
        axes.set_ylabel(f"passes, of {len(m.samples)}", fontsize=style.FONT)
        style.grid(axes, "y")
        style.legend(figure, axes)
        return figure
    return None


FIGURES = {f.__name__: f for f in (headline, trust, ladder, waterfall, links, scale, generate, serving, soak, pareto, passes)}
