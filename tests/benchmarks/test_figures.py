"""Figures are of one source: README, docs/figures.md, the results they came from and the shipped model agree, and nothing is cut off."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from msgspec.structs import replace
from PIL import Image

from benchmarks import choose, keep, plots, report
from benchmarks.__main__ import main
from benchmarks.networks import model_id
from benchmarks.schema import Goal, Link, Measure, Result, Row, Total, encode
from protocols.errors import ConfigError, PrivinfError

ROOT = Path(__file__).parents[2]
PAGE, KEPT = ROOT / "docs" / "figures.md", ROOT / "docs" / "figures" / "results.json"
LINK = {"variant": "SM+ScFuFFN_i6", "heads": 12, "device": "cpu", "link": Link()}
LAYERS = ("wte", *(f"h.{layer}.attn" for layer in range(12)), "lm_head")


def row(size: int, layer: str, **more: Any) -> Row:
    about = {**LINK, "layers": 12, "width": 768, "seq": 128, "backend": "privinf", "trust": "dealer", "phase": "online", "party": "client"}
    cells = {"peer": "server", "op": "attn.attention", "bytes_sent": size, "bytes_received": size, "payload": 2 * size, "rounds": 3}
    return Row(**{**about, **cells, **more}, layer=layer, seconds=0.1234567, samples=(0.1, 0.2))


def total(of: Row, count: int, **more: Any) -> Total:
    names = ("variant", "layers", "heads", "width", "seq", "backend", "device", "link", "phase", "rounds")
    cells = {name: getattr(of, name) for name in names} | {"bytes_sent": count, "bytes_received": count, "seconds": 1.0, "samples": (1.0,)}
    return Total(**{**cells, **more})


def made_up() -> list[Result]:
    """Results with something for every picture."""
    about: dict[str, Any] = {"started": "2026-01-01T00:00:00Z", "machine": {"processor": "one", "cores": 2, "load": 0.1}, "complete": True}
    about |= {"commit": "0123456789ab", "command": "python -m benchmarks nothing", "versions": {"python": "3.11"}}
    ladder = [row(10**6 * size, layer, variant=name) for name, size in (("SM+LN+G", 3), ("SM+ScFuFFN_i6", 1)) for layer in LAYERS]
    totals = [total(r, 28 * r.bytes_sent) for r in ladder[:: len(LAYERS)]]
    totals += [total(ladder[-1], 10**10, backend="crypten")]
    size = ("SM+ScFuFFN_i6", 12, 768, 128)
    beside = [
        Measure("worst logit error", 2.0, "", "crypten", *size, samples=(0.009, 2.0)),
        Measure("online bytes, times ours", 64.0, "x", "crypten", *size),
    ]
    goals = (Goal("online bytes", "MB", "CrypTen 5600; SPU 3370 to 4650; SIGMA about 590", 170, 90, 87.3),)
    found = [Result("ladder", **about, rows=tuple(ladder), totals=tuple(totals), measures=tuple(beside), budget=goals)]
    plain = [row(1000, layer, layers=6, width=256) for layer in LAYERS]
    shaped = [total(plain[0], 28000, link=Link(20.0 * place, 100.0 * (place + 1), True), seconds=2.0 + place) for place in range(4)]
    found.append(Result("links", **about, model={"m": "a" * 16}, rows=tuple(plain), totals=(total(plain[0], 28000), *shaped)))
    grown = [
        row(seq * seq, layer, seq=seq, layers=4, width=256, op=op)
        for seq in (16, 32, 64)
        for layer, op in (("h.0", "attn.attention"), ("h.1", "x"))
    ]
    found.append(Result("scale", **about, rows=tuple(grown), totals=tuple(total(r, r.bytes_sent, seconds=r.seq / 99) for r in grown[::2])))
    more: list[Measure] = []
    for seq in (1, 64, 128):
        for name in ("one more token, ", "the same token without a cache, "):
            more += [
                Measure(f"{name}{what}", seq / 7, unit, "privinf", *size[:3], seq)
                for what, unit in (("bytes", "B"), ("rounds", ""), ("seconds", "s"))
            ]
        more.append(Measure("first token, seconds", 0.5, "s", "privinf", *size[:3], seq))
    more += [Measure(f"{who}, tokens a second", 30.0 * n, "1/s", "m", *size) for n, who in ((1, "one reply"), (3, "a batch of 8"))]
    more += [Measure("tokens a second, all clients", 8.0, "1/s", f"{n} clients", samples=(8.0, 9.0)) for n in (1, 2)]
    more += [Measure("memory, growth over 9 sessions", 1e6, "B", party, samples=(3e8, 3.1e8)) for party in ("server", "client")]
    found.append(Result("generate", **about, model={"m": "a" * 16}, measures=tuple(more)))
    ahead = [
        Measure(name, value, unit, of, network, 6, 256, 128)
        for of, network, worse in (("m", "SM(t)+ScFuFFN", 1.4), ("b", "SM+LN+G", 1.0))
        for name, value, unit in (
            ("held-out perplexity", 10 * worse, ""),
            ("bits per byte", 1.0, ""),
            ("online bytes", 5e7 / worse, "B"),
            ("online rounds", 100, ""),
        )
    ]
    found.append(Result("pareto", **about, measures=tuple(ahead)))
    found.append(Result("passes", **about, measures=(Measure("worst logit error", 0.02, "", "3 passes", samples=(0.01, 0.011, 0.02)),)))
    quiet = [
        Measure(name, 3e8, "B", "server", samples=(3e8, 3.2e8)) for name in ("memory in the crowd, at most", "memory when nobody is there")
    ]
    found.append(Result("soak", **about, measures=tuple(quiet)))
    ours = [
        row(10**6 * size, "", phase=phase, alone=True, trust="two-party") for phase, size in (("online", 1), ("offline", 9), ("setup", 5))
    ]
    with_dealer = [row(10**6, "", phase=phase) for phase in ("online", "offline")]
    sums = [total(r, r.bytes_sent, alone=r.alone) for r in (*ours, *with_dealer)] + [total(ours[0], 10**9, backend="crypten")]
    found.append(Result("trust", **about, rows=tuple(ours), totals=tuple(sums)))
    return [*found, Result("two-party budget", **about, budget=(Goal("from a stock", "MB", "AERO 6290", 750, 450, None, "not built"),))]


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return made_up()


# ---- what stands in the repository


def test_readme_page_and_results_agree() -> None:
    """Written again from the kept results, word for word; the pictures bear their fingerprint."""
    results = keep.read([KEPT])
    found = report.sections(results)
    assert PAGE.read_text("utf-8") == report.as_markdown(found, PAGE.stem), (
        "run: python -m benchmarks report docs/figures/results.json --docs"
    )
    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme == report.in_readme(readme, report.block(found, "docs/figures"))
    pictures = {section.name for section in found if section.figure}
    assert {path.stem for path in KEPT.parent.glob("*.png")} == pictures
    for name in pictures:
        with Image.open(KEPT.parent / f"{name}.png") as picture:
            assert picture.info["Source"] == keep.fingerprint(results), f"{name}.png is of other results"
    assert KEPT.stat().st_size < 500_000 and all(result.complete for result in results)


def test_figures_are_of_the_shipped_models() -> None:
    """Their ids are of the files in models/; every scenario of a trained model ran that one."""
    results = {result.scenario: result for result in keep.read([KEPT])}
    measured = {results[name].model["pylib"] for name in ("shipped", "links", "generate", "passes", "pareto")}
    assert measured == {model_id(ROOT / "models" / "pylib")}
    assert results["pareto"].model["pylib-gpt2"] == model_id(ROOT / "models" / "pylib-gpt2")


def test_what_other_pages_say_is_what_was_measured() -> None:
    """The cards' perplexities, and the rounds that performance.md takes apart."""
    results, told = keep.read([KEPT]), (ROOT / "docs" / "performance.md").read_text("utf-8")
    for m in choose.measures(results, name="held-out perplexity"):
        card = (ROOT / "models" / m.of / "README.md").read_text("utf-8")
        assert re.search(rf"held-out perplexity \| {m.value:.2f}\b", card), f"{m.of}: no page says {m.value:.2f}"
    rounds = next(t.rounds for t in choose.ladder_totals(results) if t.variant == "SM+ScFuFFN_i6")
    assert f"neither maximum nor bound is taken: {rounds} and" in told


def test_a_models_id_is_of_its_weights_configuration_and_tokenizer(tmp_path: Path) -> None:
    names = ("config.json", "model.safetensors", "tokenizer.json")
    for name in names:
        (tmp_path / name).write_text(name)
    ids = {model_id(tmp_path)}
    (tmp_path / "README.md").write_text("words")
    assert {model_id(tmp_path)} == ids
    for name in names:
        (tmp_path / name).write_text("changed")
        ids.add(model_id(tmp_path))
    assert len(ids) == 4


# ---- how it is kept and written


def test_what_is_kept_gives_the_same_page(results: list[Result], tmp_path: Path) -> None:
    """And is small: rows that no table reads are gone; kept again, it is the same."""
    once = keep.trimmed(results)
    assert keep.encode(keep.trimmed(once)) == keep.encode(once)
    assert sum(len(result.rows) for result in once) < sum(len(result.rows) for result in results)
    again = report.sections(once)
    assert {section.name for section in again if section.figure} == set(plots.FIGURES) and all(s.alt for s in again if s.figure)
    for root in (tmp_path / "first", tmp_path / "second"):
        (root / "docs").mkdir(parents=True)
        (root / "README.md").write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    report.write_docs(results, tmp_path / "first")
    report.write_docs(keep.read([tmp_path / "first/docs/figures/results.json"]), tmp_path / "second")
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert len(files) == 3 + len(plots.FIGURES)
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    text = (tmp_path / "first" / "README.md").read_text()
    assert (
        "the dealer's part included: a batch of 8 | 90 |" in text
        and "0.009 to 2 (2)" in text
        and "commit 0123456789ab" in text
        and "docs/figures/headline.png" in text
    )


def test_trust_models_stand_side_by_side(results: list[Result]) -> None:
    """A line for each system, phase by phase, others' as published; and nothing where the two were never alone."""
    page = report.as_markdown(report.sections(results))
    told = page.split("## Trust models side by side")[1].split("## ")[0]
    lines = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in told.splitlines() if (cells := line.split("|"))[1:]}
    assert lines["privinf, two parties"][1:4] == ["1 MB", "9 MB", "5 MB"] and lines["privinf, dealer"][1:4] == ["1 MB", "1 MB", ""]
    assert lines["stock CrypTen"][1] == "1 GB" and lines["AERO"][1] == "all phases 6.29 GB" and lines["AERO"][4] == "254 s"
    assert "| bytes before the query; of it | 9 MB; 1 MB |  | AERO 6.29 GB; SPU CHEETAH 4.65 GB |" in page.split("## Headline")[1]
    assert "| from a stock | AERO 6290 | 750 MB | 450 MB | not built |" in page
    without = [result for result in results if result.scenario not in ("trust", "two-party budget")]
    page = report.as_markdown(report.sections(without))
    assert "Trust models" not in page and "two parties alone" not in page and "trust" not in {s.name for s in report.sections(without)}


def test_figures_with_a_dealer_are_not_mixed_with_those_without(results: list[Result]) -> None:
    mixed = [r for r in results if r.scenario == "trust"]
    assert {t.alone for t in choose.totals(mixed, backend="privinf")} == {False}
    assert {t.alone for t in choose.totals(mixed, backend="privinf", alone=True)} == {True}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"commit": "another"}, "different commits"),
        ({"machine": {"processor": "two", "cores": 2}}, "different machines"),
        ({"versions": {"python": "3.12"}}, "different versions"),
        ({"model": {"m": "b" * 16}}, "two models m"),
    ],
)
def test_results_of_different_sources_are_no_one_page(results: list[Result], change: dict[str, Any], says: str, tmp_path: Path) -> None:
    mixed = [results[1], replace(results[3], **change)]
    with pytest.raises(ConfigError, match=says):
        keep.one_source(mixed)
    for place, result in enumerate(mixed):
        (tmp_path / f"{place}.json").write_bytes(encode(replace(result, totals=())))
    assert main(["report", *map(str, sorted(tmp_path.glob("*.json"))), "--out", str(tmp_path / "page.md")]) == 2
    assert not (tmp_path / "page.md").exists()


def test_a_tree_with_changes_is_marked(results: list[Result]) -> None:
    text = report.sections([replace(result, commit="0123456789ab+") for result in results])[-1].text[0]
    assert "commit 0123456789ab with changes that are not in it" in text


def test_small_sizes_and_lacking_stages_leave_the_documentation_alone(
    results: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written, few = list[Any](), results[5:6]
    monkeypatch.setattr("benchmarks.report.write_docs", lambda *words: written.append(words))
    monkeypatch.setattr("benchmarks.stages.everything", lambda *_, **__: (few, ["budget"]))
    assert main(["all", "--quick", "--docs", "--out", str(tmp_path)]) == 2
    assert (
        main(["all", "--docs", "--out", str(tmp_path)]) == PrivinfError("").exit_code
        and "budget left no complete result" in capsys.readouterr().err
    )
    assert not written and (tmp_path / "report.html").is_file()
    monkeypatch.setattr("benchmarks.stages.everything", lambda *_, **__: (few, []))
    assert main(["all", "--docs", "--out", str(tmp_path)]) == 0 and len(written) == 1


BOX = """one => {
    const box = one.parentElement, style = getComputedStyle(box)
    return [one.scrollWidth > box.clientWidth + 1, style.overflowX, style.backgroundImage]
}"""


def test_no_table_or_picture_is_cut_off(results: list[Result], tmp_path: Path) -> None:
    """The page itself never scrolls sideways; a table that is wider than it scrolls in its box, which shows that there is more."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser is installed")
    page = tmp_path / "report.html"
    report.write(results, html=page)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        for width in (390, 1280):
            shown = browser.new_page(viewport={"width": width, "height": 900})
            shown.goto(page.as_uri())
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            shown.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            wide = shown.evaluate("[...document.querySelectorAll('table, img, pre')].map(" + BOX + ")")
            assert len(wide) > 20 and any(over for over, *_ in wide)
            assert all(scrolls == "auto" and "gradient" in cue for over, scrolls, cue in wide if over)
        browser.close()


def test_no_legend_covers_data_and_none_is_cut(results: list[Result]) -> None:
    """Every picture's legend and words lie within it, and its legend outside every panel."""
    for name, make in plots.FIGURES.items():
        figure = make(keep.trimmed(results))
        assert figure is not None, name
        FigureCanvasAgg(figure).draw()
        canvas = figure.bbox
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert box.x0 >= -1 and box.x1 <= canvas.x1 + 1 and box.y1 <= canvas.y1 + 1, f"{name}: the legend is cut"
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes), f"{name}: the legend covers data"
        assert not any(axes.get_legend() for axes in figure.axes)
        labelled = figure.legends[0].get_texts() if figure.legends else []
        assert labelled and all(re.search(r"\w", text.get_text()) for text in labelled), name
