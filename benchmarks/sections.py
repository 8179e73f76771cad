"""The report's tables: what is said of which results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import choose
from benchmarks.links import name_of
from benchmarks.output import budget, by_name, number, size
from benchmarks.plots import scale_lengths
from benchmarks.published import AERO, AERO_BEST, BASELINE, SMALLEST, SYSTEMS
from benchmarks.schema import Link, Result, Total

Table = tuple[Sequence[str], list[list[object]]]
Entry = tuple[str, str, str, list[Table]]  # title, picture, text, tables


def _times(a: float | None, b: float | None) -> str:
    return f"{a / b:.3g} x" if a and b else ""


def _headline(results: Sequence[Result]) -> Entry:
    """One table: what is ours and measured, what is others', measured in the same run or published."""
    lines: list[list[object]] = []
    ours = choose.smallest(results)
    ladder = {t.variant: t for t in choose.ladder_totals(results)}
    if ours is not None and ours.width >= 768:
        lines += _gpt2(results, ours, ladder.get(BASELINE))
    else:
        small, base = (ladder.get(name) for name in (next((n for n in ladder if n.startswith("SM+ScFuFFN_i")), ""), BASELINE))
        if small and base:
            what = f"{base.variant} : {small.variant}, online bytes, {small.layers} layers of {small.width}"
            lines.append([what, _times(base.bytes_sent, small.bytes_sent), f"AERO {AERO_BEST['communication']} x at GPT-2 size"])
    for result in results:
        for total in choose.totals([result], backend="crypten", phase="online"):
            mine = next((t for t in choose.totals([result], backend="privinf", phase="online") if _same(t, total)), None)
            if mine is not None:
                lines += _beside(result, mine, total)
    for m in choose.measures(results, name="one more token, seconds", link=Link())[-1:]:
        cost = number(choose.value(results, m, "one more token, bytes", m.of), "B")
        lines.append([f"one more token of {m.variant}, {m.seq} cached", f"{cost}, {m.value:.3g} s", "no other system does it"])
    return "Headline", "headline", "", [(("", "measured", "beside"), lines)]


def _beside(result: Result, mine: Total, total: Total) -> list[list[object]]:
    where = f"{total.variant}, {total.layers} layers of {total.width}, T = {total.seq}"
    error, other = (choose.value([result], t.setting, "worst logit error", t.backend) for t in (mine, total))
    return [
        [f"{where}: stock CrypTen's online seconds, times ours, same run", _ratio([result], total, "seconds"), ""],
        ["its online bytes, times ours", _ratio([result], total, "bytes"), ""],
        [
            "ours online",
            f"{size(mine.bytes_sent)}, {number(mine.seconds, 's')}",
            f"CrypTen {size(total.bytes_sent)}, {number(total.seconds, 's')}",
        ],
        ["rounds", mine.rounds, f"CrypTen {total.rounds}"],
        ["worst logit error", number(error), f"CrypTen {number(other)}"],
    ]


def _same(a: Total, b: Total) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in ("variant", "layers", "width", "seq", "link"))


def _ratio(results: Sequence[Result], total: Total, what: str) -> str:
    found = choose.value(results, total.setting, f"online {what}, times ours", "crypten")
    return f"{found:.3g} x" if found else ""


def _gpt2(results: Sequence[Result], ours: Total, base: Total | None) -> list[list[object]]:
    published = {(name, what): gigabytes for name, what, gigabytes, *_ in SYSTEMS}
    theirs = {line.network: line for line in AERO}
    size_of = f"{ours.layers} layers of {ours.width}, T = {ours.seq}"
    sigma = next(value for (name, _), value in published.items() if name == "SIGMA")
    lines: list[list[object]] = [
        [f"{ours.variant}, {size_of}: online bytes", size(ours.bytes_sent), f"AERO {theirs[SMALLEST].gigabytes} GB, no dealer"],
        ["rounds", ours.rounds, "SIGMA 1128, with GELU and LayerNorm"],
        ["online seconds, loopback, one thread a party", number(ours.seconds, "s"), f"AERO {theirs[SMALLEST].minutes * 60:.0f} s, LAN"],
    ]
    if base is not None and base.width == ours.width:
        ratio = _times(base.bytes_sent, ours.bytes_sent)
        aero = f"AERO {theirs[BASELINE].gigabytes / theirs[SMALLEST].gigabytes:.3g} x, at best {AERO_BEST['communication']} x"
        lines += [
            [f"{base.variant}: online bytes", size(base.bytes_sent), f"AERO {theirs[BASELINE].gigabytes} GB; SIGMA {sigma:.2f} GB"],
            [f"{base.variant} : {ours.variant}, online bytes", ratio, aero],
            [f"{base.variant} : {ours.variant}, online seconds", _times(base.seconds, ours.seconds), f"AERO {AERO_BEST['latency']} x"],
        ]
    return lines


def _ladder(results: Sequence[Result]) -> Entry:
    found = choose.ladder_totals(results)
    theirs = {line.network: line for line in AERO}
    base = next((t for t in found if t.variant == BASELINE), None)
    lines: list[list[object]] = []
    for t in found:
        other = {p.phase: p for p in choose.totals(results, **{"backend": "privinf", "variant": t.variant}) if _same(p, t)}
        a = theirs.get(t.variant)
        lines.append(
            [
                t.variant,
                size(t.bytes_sent),
                _times(base.bytes_sent, t.bytes_sent) if base else "",
                f"{a.gigabytes} GB" if a else "",
                _times(theirs[BASELINE].gigabytes, a.gigabytes) if a else "",
                t.rounds,
                number(t.seconds, "s"),
                _times(base.seconds, t.seconds) if base else "",
                f"{a.minutes} min" if a else "",
                _times(theirs[BASELINE].minutes, a.minutes) if a else "",
                size(other["offline"].bytes_sent) if "offline" in other else "",
                size(other["setup"].bytes_sent) if "setup" in other else "",
                number(choose.value(results, t.setting, "worst logit error", "privinf")),
                f"{a.perplexity}" if a else "",
            ]
        )
    head = ("network", "online", "fewer", "AERO", "fewer", "rounds", "online s", "faster", "AERO", "faster", "offline", "set-up", "error")
    where = f"{found[0].layers} layers of width {found[0].width}, T = {found[0].seq}" if found else ""
    text = (
        f"Ours: {where}, random weights, loopback; `error` is the worst logit error against float. AERO: as published, GPT-2 size, "
        "LAN, no dealer, its perplexities of trained models. `fewer` and `faster`: SM+LN+G's over this network's, in the same system."
    )
    return "The ladder beside AERO's table", "ladder", text if lines else "", [((*head, "AERO's perplexity"), lines)]


def _against(results: Sequence[Result]) -> Entry:
    lines = []
    found = [(result, t) for result in results for t in choose.totals([result], backend="crypten", phase="online")]
    for result, t in found:
        figures = {name: choose.value([result], t.setting, name, "crypten") for name in FAILURES}
        lines.append(
            [
                f"{t.variant}, {t.layers} x {t.width}, T = {t.seq}",
                size(t.bytes_sent),
                _ratio([result], t, "bytes"),
                t.rounds,
                _ratio([result], t, "rounds"),
                number(t.seconds, "s"),
                _ratio([result], t, "seconds"),
                number(choose.value([result], t.setting, "worst logit error", "crypten")),
                *(number(value) if value is None or value >= 0.001 or not value else f"{value:.2g}" for value in figures.values()),
            ]
        )
    head = ("network", "online", "times ours", "rounds", "times ours", "online s", "times ours", "worst logit error")
    text = (
        "The same lowered graph in the same run, samples interleaved. Its default provider lets party 0 make all correlations, so that "
        "party 0 can read everything. Failures are of real shares: a truncation that is off by more than two units; expected is the sum "
        "of |z| / 2^64."
    )
    return "Beside stock CrypTen", "", text if lines else "", [((*head, "truncations", "failed", "failures expected"), lines)]


FAILURES = ("truncations a pass", "truncation failures a pass", "truncation failures, expected a pass")


def _layers(results: Sequence[Result]) -> Entry:
    total = choose.smallest(results)
    rows = choose.rows_of(results, total.setting, phase="online") if total else []
    ops: dict[str, list[float]] = {}
    ahead: dict[str, list[int]] = {}
    for one in choose.predicted_of(results, total.setting) if total else []:
        sums = ahead.setdefault(one.op, [0, 0, 0])
        for place, cost in enumerate((one.peer_offline_bytes, one.dealer_bytes, one.setup_bytes)):
            sums[place] += cost
    for row in rows:
        cell = ops.setdefault(row.op or "(control)", [0.0] * 9)
        if row.party == "client":
            cell[0] += row.bytes_sent + row.bytes_received
            cell[1] += row.rounds
        cell[2] += row.macs or 0
        at = 3 if row.party == "client" else 6
        for place, part in enumerate(("compute_seconds", "wait_seconds", "wire_seconds")):
            cell[at + place] += getattr(row, part) or 0.0
    lines: list[list[object]] = [
        [
            op,
            size(c[0]),
            int(c[1]),
            *(size(cost) if cost else "" for cost in ahead.get(op, [0, 0, 0])),
            f"{c[2] / 1e6:,.0f}" if c[2] else "",
            *(f"{s:.3f}" for s in c[3:]),
        ]
        for op, c in ops.items()
    ]
    head = ("operator, all layers", "online bytes", "rounds", "offline S-C", "from the dealer", "set-up", "mega-MACs")
    names = [f"{party} {part} s" for party in ("client", "server") for part in ("compute", "wait", "wire")]
    text = ""
    if total:
        text = (
            f"{total.variant}, {total.layers} layers of width {total.width}, T = {total.seq}. Online as counted; offline, dealer and "
            "set-up split by operator as `privinf explain` predicts it (their sums are held against what is counted)."
        )
    return "Bytes per layer", "waterfall", text, [((*head, *names), lines)]


def _links(results: Sequence[Result]) -> Entry:
    found = choose.totals(choose.of_scenario(results, "links"), backend="privinf", phase="online")
    plain = next((t for t in found if t.link == Link()), None)
    rows = choose.rows_of(results, plain.setting, phase="online", party="client") if plain else []
    lines: list[list[object]] = []
    for t in found:
        model = ""
        if t.link.rtt_ms is not None and plain is not None and plain.seconds:
            model = number(choose.latency(rows, t.link.rtt_ms, t.link.mbit_s or 1, plain.seconds), "s")
        lines.append([name_of(t.link), size(t.bytes_sent), t.rounds, number(t.seconds, "s"), model])
    text = (
        "Model: rounds x RTT / 2 + bytes / rate + the seconds on loopback. A round is one step of the chain of dependent messages, hence "
        "half a round trip; bytes are those of the fuller direction in each operator. A link shaped by the kernel has one queue for both "
        "directions, so that it carries what an emulated one of half its rate does."
    )
    return "Latency by link", "links", text if lines else "", [(("link", "online", "rounds", "measured", "model"), lines)]


def _scale(results: Sequence[Result]) -> Entry:
    lengths: list[list[object]] = [
        [seq, size(a), size(r), size(a + r), size(p) if p else "", f"{a / (seq * (seq + 1) / 2):.0f} B", number(s, "s")]
        for seq, a, r, p, s in scale_lengths(results)
    ]
    head = ("T", "attention", "the rest", "all", "predicted", "attention / (T(T + 1) / 2)", "online s")
    runs = choose.of_scenario(results, "scale")
    shapes: list[list[object]] = [
        [f"{t.layers} x {t.width}", t.seq, size(t.bytes_sent), t.rounds, number(t.seconds, "s")]
        for t in choose.totals(runs, backend="privinf", phase="online", seq=64)
    ]
    text = "Payload, both ways, of one pass, as counted beside what `privinf explain` predicts."
    if len(lengths) > 2:
        seqs, attention, *_ = zip(*scale_lengths(results), strict=True)
        pair, row = choose.quadratic(seqs, attention)
        text += f" Attention is {pair:,.1f} B for each of T(T + 1)/2 causal pairs, all heads and layers, and {row:,.0f} B for each row."
    return "Growth", "scale", text if lengths else "", [(head, lengths), (("layers x width", "T", "online", "rounds", "online s"), shapes)]


def _generate(results: Sequence[Result]) -> Entry:
    runs = choose.of_scenario(results, "generate")
    goals = [goal for result in runs for goal in result.budget]
    lines: list[list[object]] = []
    for m in choose.measures(runs, name="one more token, bytes", of="privinf"):
        same = [choose.measures(runs, name=name, of="privinf", seq=m.seq)[-1] for name in (*MORE, *WHOLE, "first token, seconds")]
        lines.append([m.seq, size(m.value), *(number(f.value, f.unit) for f in same)])
    rates = [[m.name, number(m.value, m.unit)] for m in choose.measures(runs) if m.name.startswith("tokens per second")]
    head = ("cached", "bytes a token", "rounds", "seconds", "without a cache, bytes", "rounds", "seconds", "first token")
    text = (
        "A token over so many cached positions, beside the same token by a whole pass without a cache, and beside the first token, a pass "
        "over the cached positions alone. Online seconds."
    )
    return "Generation", "generate", text if lines else "", [budget(goals), (head, lines), (("", ""), rates)]


MORE = ("one more token, rounds", "one more token, seconds")
WHOLE = tuple(f"the same token without a cache, {what}" for what in ("bytes", "rounds", "seconds"))


def _serving(results: Sequence[Result]) -> Entry:
    """Clients at once, memory, slow links and large models."""
    runs = choose.of_scenario(results, "generate")
    many: list[list[object]] = []
    for m in choose.measures(runs, name="tokens a second, all clients"):
        waits = [choose.measures(runs, name=name, of=m.of) for name in WAITS]
        many.append([m.of, number(m.value, m.unit), *(number(found[-1].value, found[-1].unit) if found else "" for found in waits)])
    grown = [
        [m.of, m.name.removeprefix("memory, growth over "), number(m.value / 1e6, "MB"), number(max(m.samples) / 1e6, "MB")]
        for m in choose.measures(runs)
        if m.name.startswith("memory, growth over ")
    ]
    apart = [
        [f"{m.of}, {m.variant}, {m.seq} cached", name_of(m.link), m.name, number(m.value, m.unit)]
        for m in choose.measures(runs)
        if m.of in ("over a link", "GPT-2 size")
    ]
    notes = [note for result in runs for note in result.notes if note.startswith(("clients:", "memory:"))]
    shown = [
        (("", "tokens a second, all", *(name.replace(", worst wait", ", longest wait") for name in WAITS)), many),
        (("party", "over", "growth", "most"), grown),
        (("", "link", "what", "value"), apart),
    ]
    return "Generation as a service", "serving", " ".join(f"{note[0].upper()}{note[1:]}." for note in notes), shown


WAITS = ("first token, worst wait", "next token, worst wait", "worst wait, in fair shares")


def _soak(results: Sequence[Result]) -> Entry:
    runs = choose.of_scenario(results, "soak")
    goals = [goal for result in runs for goal in result.budget]
    came = [[m.of, number(m.value)] for m in choose.measures(runs, name="visitors")]
    sums = [[m.name, m.of, number(m.value, m.unit)] for m in choose.measures(runs) if not m.samples and m.name != "visitors"]
    quiet = [
        [f"{m.of}: {m.name}", *(number(f(m.samples) / scale, unit) for f in (min, max)), number(m.samples[-1] / scale, unit)]
        for m in choose.measures(runs)
        if m.samples
        for scale, unit in [(1e6, "MB") if m.unit == "B" else (1, "")]
    ]
    text = " ".join(f"{note[0].upper()}{note[1:]}." for result in runs for note in result.notes)
    head = ("from the first quiet moment to the last", "least", "most", "last")
    return "Soak", "soak", text, [budget(goals), (("visitors", "came"), came), (head, quiet), (("", "of", ""), sums)]


def _pareto(results: Sequence[Result]) -> Entry:
    runs = choose.of_scenario(results, "pareto")
    lines: list[list[object]] = []
    for m in choose.measures(runs, name="held-out perplexity"):
        more = [choose.measures(runs, name=name, of=m.of)[-1] for name in ("bits per byte", "online bytes", "online rounds")]
        lines.append([m.of, m.variant, f"{m.layers} x {m.width}", number(m.value), *(number(f.value, f.unit) for f in more)])
    head = ("checkpoint", "network", "layers x width", "held-out perplexity", "bits per byte", "online", "rounds")
    return "Perplexity against bytes", "pareto", "", [(head, lines)]


def _plain(results: Sequence[Result], scenario: str, title: str) -> Entry:
    found = [m for result in choose.of_scenario(results, scenario) for m in result.measures]
    if scenario == "micro":
        text = "In-memory twin of the transport, both parties and the dealer in one process: seconds compare between commits alone."
        return title, "", text if found else "", [by_name(found)]
    return title, scenario, "", [(("of", "what", "value"), [[m.of, m.name, number(m.value, m.unit)] for m in found])]


def tables(results: Sequence[Result]) -> list[Entry]:
    """All sections, also empty ones."""
    goals = [goal for result in choose.of_scenario(results, "budget") for goal in result.budget]
    return [
        _headline(results),
        _ladder(results),
        _layers(results),
        _against(results),
        ("The byte budget at GPT-2 size", "", "", [budget(goals)]),
        _links(results),
        _scale(results),
        _generate(results),
        _serving(results),
        _soak(results),
        _pareto(results),
        _plain(results, "passes", "Many passes against float"),
        _plain(results, "micro", "Single protocols"),
    ]
