"""The report's tables: what is said of which results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import choose, trusts
from benchmarks.headline import error, headline, times
from benchmarks.links import name_of
from benchmarks.networks import GPT2, QUICK
from benchmarks.output import budget, by_name, number, size, spread
from benchmarks.plots import scale_lengths
from benchmarks.published import AERO, BASELINE
from benchmarks.schema import Result, Total

Table = tuple[Sequence[str], Sequence[Sequence[object]]]
Entry = tuple[str, str, str, Sequence[Table]]  # title, picture, text, tables


def _headline(results: Sequence[Result]) -> Entry:
    text = (
        "privinf has a dealer, a third party trusted not to collude; stock CrypTen's party 0 can read everything; AERO and SPU CHEETAH "
        "have no dealer. Networks of the ladder have random weights. Bytes are of both directions; ranges are from the least to the most "
        "over the passes in brackets. Published figures are of other machines."
    )
    shown = headline(results)
    return "Headline", "headline", text if shown[1] else "", [shown]


def _ladder(results: Sequence[Result]) -> Entry:
    runs, found = choose.of_scenario(results, "ladder"), choose.ladder_totals(results)
    theirs = {line.network: line for line in AERO}
    base = next((t for t in found if t.variant == BASELINE), None)
    costs: list[list[object]] = []
    speed: list[list[object]] = []
    for t in found:
        other = {p.phase: p for p in choose.totals(runs, backend="privinf", variant=t.variant) if choose.same(p, t)}
        a = theirs.get(t.variant)
        costs.append(
            [
                t.variant,
                size(t.bytes_sent),
                times(base.bytes_sent, t.bytes_sent) if base else "",
                f"{a.gigabytes} GB" if a else "",
                times(theirs[BASELINE].gigabytes, a.gigabytes) if a else "",
                size(other["offline"].bytes_sent) if "offline" in other else "",
                size(other["setup"].bytes_sent) if "setup" in other else "",
            ]
        )
        speed.append(
            [
                t.variant,
                t.rounds,
                number(t.seconds, "s"),
                times(base.seconds, t.seconds) if base else "",
                f"{a.minutes} min" if a else "",
                times(theirs[BASELINE].minutes, a.minutes) if a else "",
                error(runs, t, "privinf"),
                f"{a.perplexity}" if a else "",
            ]
        )
    where = f"{found[0].layers} layers of width {found[0].width}, T = {found[0].seq}" if found else ""
    text = (
        f"Ours: {where}, a context of {GPT2['n_positions'] if found and found[0].width >= 768 else QUICK['n_positions']} positions, random "
        "weights, loopback; `error` is the worst logit error against float, with the passes that showed their logits. AERO: as published, "
        "GPT-2 size, LAN, no dealer, its perplexities of trained models. `fewer` and `faster`: SM+LN+G's over this network's, in the same "
        "system."
    )
    head = ("network", "online", "fewer", "AERO", "AERO fewer", "offline", "set-up")
    more = ("network", "rounds", "online s", "faster", "AERO", "AERO faster", "error", "AERO's perplexity")
    return "The ladder beside AERO's table", "ladder", text if costs else "", [(head, costs), (more, speed)]


def _against(results: Sequence[Result]) -> Entry:
    costs: list[list[object]] = []
    errors: list[list[object]] = []
    for result in results:
        for t in choose.totals([result], backend="crypten", phase="online"):
            name = f"{t.variant}, {t.layers} x {t.width}, T = {t.seq}"

            def ratio(what: str, t: Total = t, result: Result = result) -> str:
                found = choose.value([result], t.setting, f"online {what}, times ours", "crypten")
                return f"{found:.3g} x" if found else ""

            shown = (size(t.bytes_sent), ratio("bytes"), t.rounds, ratio("rounds"), number(t.seconds, "s"), ratio("seconds"))
            costs.append([name, *shown])
            same = {key: getattr(t, key) for key in ("variant", "layers", "width", "seq", "link")}
            audits = [choose.measures([result], name=name, of="crypten", **same) for name in FAILURES]
            counts = [spread(found[-1].samples or (found[-1].value,)) if found else "" for found in audits]
            errors.append([name, error([result], t, "crypten"), error([result], t, "privinf"), *counts])
    text = (
        "The same lowered graph in the same run, samples interleaved. Its default provider lets party 0 make all correlations, so that "
        "party 0 can read everything. Errors and failures swing from pass to pass: from the least to the most, over so many passes. "
        "Failures are of real shares: a truncation that is off by more than two units; expected is the sum of |z| / 2^64."
    )
    head = ("network", "online", "times ours", "rounds", "times ours", "online s", "times ours")
    more = ("network", "worst logit error", "ours", "truncations a pass", "failed", "failures expected")
    return "Beside stock CrypTen", "", text if costs else "", [(head, costs), (more, errors)]


FAILURES = ("truncations a pass", "truncation failures a pass", "truncation failures, expected a pass")
PARTS = ("compute", "wait", "wire")


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
        if row.party == "dealer":
            continue
        cell = ops.setdefault(row.op or "(control)", [0.0] * 9)
        if row.party == "client":
            cell[0] += row.bytes_sent + row.bytes_received
            cell[1] += row.rounds
        cell[2] += row.macs or 0
        at = 3 if row.party == "client" else 6
        for place, part in enumerate(PARTS):
            cell[at + place] += getattr(row, f"{part}_seconds") or 0.0
    costs: list[list[object]] = [
        [op, size(c[0]), int(c[1]), *(size(cost) if cost else "" for cost in ahead.get(op, [0, 0, 0]))] for op, c in ops.items()
    ]
    seconds: list[list[object]] = [[op, f"{c[2] / 1e6:,.0f}" if c[2] else "", *(f"{s:.3f}" for s in c[3:])] for op, c in ops.items()]
    head = ("operator, all layers", "online bytes", "rounds", "offline S-C", "from the dealer", "set-up")
    names = [f"{party} {part} s" for party in ("client", "server") for part in PARTS]
    text = ""
    if total:
        text = (
            f"{total.variant}, {total.layers} layers of width {total.width}, T = {total.seq}. Online as counted; offline, dealer and "
            "set-up split by operator as `privinf explain` predicts it (their sums are held against what is counted)."
        )
    return "Bytes per layer", "waterfall", text, [(head, costs), (("operator, all layers", "mega-MACs", *names), seconds)]


def _links(results: Sequence[Result]) -> Entry:
    found = choose.totals(choose.of_scenario(results, "links"), backend="privinf", phase="online")
    plain = choose.loopback(results)
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
    told = ("tokens per second", "one reply, tokens", "a batch of")
    rates = [[m.name, number(m.value, m.unit)] for m in choose.measures(runs) if m.name.startswith(told)]
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
        if m.of == "over a link"
    ]
    notes = [note for result in runs for note in result.notes if note.startswith(("clients:", "memory:"))]
    shown: list[Table] = [
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


def _plain(results: Sequence[Result], scenario: str, title: str, picture: str = "") -> Entry:
    found = [m for result in choose.of_scenario(results, scenario) for m in result.measures]
    if scenario == "micro":
        text = "In-memory twin of the transport, both parties and the dealer in one process: seconds compare between commits alone."
        return title, "", text if found else "", [by_name(found)]
    goals = [goal for result in choose.of_scenario(results, scenario) for goal in result.budget]
    return title, picture, "", [budget(goals), (("of", "what", "value"), [[m.of, m.name, number(m.value, m.unit)] for m in found])]


BUDGET = (
    "SM+ScFuFFN_i6, 12 layers of 768, T = 128, with rings planned for GPT-2's whole context of 1024 positions, which costs 2 % more than "
    "the ladder's 256; lines that name a network are the ladder's. A further token is timed as its caller sees it, the dealer's part "
    "included. `must` and `goal` are what this project asks of itself."
)

ALONE = (
    "SM+ScFuFFN_i6, 12 layers of 768, T = 128, with rings planned for 1024 positions, all phases but set-up, both directions, both parties "
    "on one machine. A query that stands alone makes what it needs and keeps nothing for others. The shipped model is timed from the start "
    "of the processes, with nothing in any cache; the softmax element is that of the heads of all layers at once."
)


def tables(results: Sequence[Result]) -> list[Entry]:
    """All sections, also empty ones."""
    goals = [goal for result in choose.of_scenario(results, "budget", "ladder") for goal in result.budget]
    alone = [goal for result in choose.of_scenario(results, "two-party budget") for goal in result.budget]
    return [
        _headline(results),
        trusts.section(results),
        _ladder(results),
        _layers(results),
        _against(results),
        ("The byte budget at GPT-2 size", "", BUDGET if goals else "", [budget(goals)]),
        ("The budget of the two parties alone at GPT-2 size", "", ALONE if alone else "", [budget(alone)]),
        _links(results),
        _scale(results),
        _generate(results),
        _serving(results),
        _soak(results),
        _pareto(results),
        _plain(results, "passes", "Many passes against float", "passes"),
        _plain(results, "precision", "Precision"),
        _plain(results, "micro", "Single protocols"),
    ]
