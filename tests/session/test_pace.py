"""Seconds from a cost and a measurement: exact arithmetic, what is kept, and what is measured anew. No machine's speed is tested here."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from privinf import shipped
from privinf.doctor.checks import checks
from privinf.gateway import page
from privinf.local import pace as local
from privinf.local.pace import USUAL, Seen, fitted, least, pace_of
from privinf.lowering import convert
from privinf.lowering.explain import explain
from privinf.models.checkpoint import save_checkpoint
from privinf.session import pace as module
from privinf.session.options import Options
from privinf.session.pace import BESIDE, Pace, Speeds, entries, kept, link_of, place, seconds
from privinf.training.families import built, variant_config
from privinf.transport.shaper import Link
from privinf.trust import DEALER, ENCRYPTED, TWO_PARTY
from protocols import kernels
from protocols.errors import ConfigError
from tests.support import trio as t
from tests.support.command import Call
from tests.support.command import call as call

PACE = Pace(
    walked=Speeds(2e-2, 2e-3, 1e-9, 5e-9, 4e-9, 2e-10),
    taped=Speeds(1e-3, 3e-4, 2e-10, 1e-8, 2e-9, 0.0),
    cold=Speeds(0.5, 1e-4, 1e-9, 1e-9, 1e-9, 0.0),
    table_s=1e-6,
    load=1.0,
    at=1.0,
)


def total(rounds: int, online: int, dealer: int, macs: int, setup: int) -> dict[str, int]:
    return {"rounds": rounds, "online_bytes": online, "dealer_bytes": dealer, "macs": macs, "setup_bytes": setup}


def priced(speeds: Speeds, total: dict[str, int], passes: int = 1) -> float:
    """By the formula."""
    once = (speeds.pass_s + speeds.weight_s * total["setup_bytes"]) * passes
    moved = speeds.online_s * total["online_bytes"] + speeds.dealer_s * total["dealer_bytes"]
    return once + speeds.round_s * total["rounds"] + moved + speeds.mac_s * total["macs"]


def test_seconds_are_those_of_the_formulas() -> None:
    lowered, link = t.lowered(), Link(20.0, 100.0)
    prompt, token = explain(lowered, 6)["total"], explain(lowered, 1, cached=6)["total"]
    found = seconds(lowered, PACE, link, 6)
    travels = {
        name: total["rounds"] * 0.01 + (total["online_bytes"] / 2 + total["peer_offline_bytes"]) / 12.5e6
        for name, total in (("prompt", prompt), ("token", token))
    }
    assert found["prompt_s"] == pytest.approx(priced(PACE.walked, prompt) + travels["prompt"])
    assert found["first_prompt_s"] == pytest.approx(found["prompt_s"] + priced(PACE.cold, prompt) + 1e-6 * entries(lowered))
    assert found["token_s"] == pytest.approx(priced(PACE.taped, token) + travels["token"])
    pieces = explain(lowered, 6, chunk=4)["total"]
    assert seconds(lowered, PACE, None, 6, chunk=4)["prompt_s"] == pytest.approx(priced(PACE.walked, pieces, 2))


def test_more_of_anything_takes_no_less() -> None:
    base = total(30, 10**6, 10**6, 10**8, 10**7)
    for name in base:
        assert PACE.walked.of(base | {name: base[name] * 2}) > PACE.walked.of(base)
    lowered = t.lowered()
    links = [None, Link(1.0, 1000.0), Link(60.0, 1000.0), Link(60.0, 30.0)]
    times = [seconds(lowered, PACE, link, 4) for link in links]
    for key in ("prompt_s", "token_s"):
        assert [found[key] for found in times] == sorted(found[key] for found in times) and len({found[key] for found in times}) == 4
    for part in ("walked", "taped", "cold"):
        for field in dataclasses.fields(Speeds)[: 6 if part == "walked" else 5]:
            slower = seconds(lowered, replace(PACE, **{part: replace(getattr(PACE, part), **{field.name: 1.0})}), None, 4)
            assert any(slower[key] > times[0][key] for key in times[0])  # type: ignore[operator]


def test_a_token_without_a_tape_and_one_without_a_context() -> None:
    large, small = total(30, 4_000_000, 4_000_000, 10**8, 10**7), total(30, 10**5, 10**6, 10**8, 10**7)
    assert PACE.token(large) == BESIDE * PACE.walked.of(large) and PACE.token(large, batch=2) == PACE.taped.of(large)
    assert PACE.token(small, tapes=False) == BESIDE * PACE.walked.of(small) and PACE.token(small) == PACE.taped.of(small)
    lowered = t.lowered()
    assert seconds(lowered, PACE, None, lowered.info.n_positions)["token_s"] is None


def test_tokens_of_a_recurrence_are_walked(tmp_path: Path) -> None:
    config = variant_config("mamba2", "M2(fix)", n_layer=1, n_head=2, n_embd=8, vocab_size=50, n_positions=16)
    save_checkpoint(built(config), config, tmp_path)
    lowered = convert(tmp_path)
    token = explain(lowered, 1, cached=4)["total"]
    assert seconds(lowered, PACE, None, 4)["token_s"] == pytest.approx(BESIDE * priced(PACE.walked, token)) and entries(lowered) == 0


def of_narrow_and_wide(pace: Pace, noise: Callable[[], float] = lambda: 1.0) -> list[Seen]:
    """What two networks of about the measured sizes would take, times `noise`."""

    def seen(rounds: int, online: int, dealer: int, macs: int, weights: int) -> Seen:
        totals = [total(rounds, online * n + 300 * n * n, dealer + online * n, macs * n, weights) for n in (1, 16, 64, 128)]
        token, first = totals[0], totals[1]
        prompts = tuple((each, pace.walked.of(each) * noise()) for each in totals[1:])
        cold_s = pace.walked.of(first) + pace.cold.of(first) + pace.table_s * 70_000
        return Seen(prompts, (token, pace.taped.of(token) * noise()), (first, cold_s), 70_000)

    return [seen(42, 20_000, 900_000, 500_000, 3 * 10**6), seen(32, 50_000, 2 * 10**6, 8 * 10**6, 50 * 10**6)]


@pytest.mark.parametrize("times", [0.5, 1.0, 7.0])
def test_a_measurement_gives_back_what_made_it(times: float) -> None:
    def slower(speeds: Speeds) -> Speeds:
        return Speeds(*(each * times for each in astuple(speeds)))

    made = Pace(slower(USUAL.walked), slower(USUAL.taped), slower(USUAL.cold), USUAL.table_s * times, load=1.0, at=1.0)
    found = fitted(of_narrow_and_wide(made), load=1.0, at=1.0)
    for part in ("walked", "taped", "cold"):
        assert astuple(getattr(found, part)) == pytest.approx(astuple(getattr(made, part)), rel=1e-6)
    assert found.table_s == pytest.approx(made.table_s) and (found.load, found.at) == (1.0, 1.0)


OTHERS = {  # a network between the measured ones, one with many rounds and one of GPT-2's size
    "between": total(64, 8_600_000, 14_000_000, 265_000_000, 29_000_000),
    "rounds": total(310, 21_600_000, 53_500_000, 350_000_000, 33_000_000),
    "large": total(140, 36_000_000, 39_000_000, 4_900_000_000, 400_000_000),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("unit", [None, "round_s", "online_s", "mac_s", "weight_s"])
def test_noise_and_a_unit_unlike_the_usual_leave_seconds_about_right(unit: str | None, other: dict[str, int]) -> None:
    """With times of which each is off by about 10 %, and a unit that takes twice as long as it does on the usual machine."""
    made = replace(USUAL, walked=replace(USUAL.walked, **({unit: 2 * getattr(USUAL.walked, unit)} if unit else {})))
    draw = random.Random(7)
    ratios = sorted(
        made.walked.of(other) / fitted(of_narrow_and_wide(made, lambda: math.exp(draw.gauss(0, 0.1))), load=0, at=0).walked.of(other)
        for _ in range(20)
    )
    assert ratios[2] > 1 / 1.3 and ratios[17] < 1.3


def test_the_least_squares_are_those_that_numpy_has_and_none_is_negative() -> None:
    draw = np.random.default_rng(5)
    for _ in range(20):
        rows, wanted = draw.normal(size=(9, 4)), draw.normal(size=9)
        found, free = least(rows, wanted), np.linalg.lstsq(rows, wanted, rcond=None)[0]
        gradient = rows.T @ (rows @ found - wanted)
        assert (found >= 0).all() and (gradient > -1e-6).all() and abs(gradient @ found) < 1e-6  # Karush, Kuhn and Tucker
        assert (free < 0).any() or found == pytest.approx(free, abs=1e-6)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measurements that were made, of no machine."""
    made: list[str] = []

    def measure(cache: Path, device: str) -> Pace:
        made.append(device)
        return replace(PACE, at=float(len(made)))

    monkeypatch.setattr(local, "measured", measure)
    return made


def test_a_kept_measurement_is_taken(tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pace_of(tmp_path).at == pace_of(tmp_path).at == 1 and place(tmp_path, "cpu").stat().st_mode & 0o077 == 0
    assert pace_of(tmp_path, anew=True).at == pace_of(tmp_path).at == 2
    monkeypatch.setattr(module, "VERSION", "another")
    assert pace_of(tmp_path).at == 3
    monkeypatch.setattr(module.platform, "node", lambda: "elsewhere")
    assert pace_of(tmp_path).at == 4 and measured == ["cpu"] * 4


@pytest.mark.parametrize("how", ["cut", "list", "nan", "negative", "text", "deep", "bytes", "missing", "flat"])
def test_a_broken_one_is_measured_anew(tmp_path: Path, measured: list[str], how: str) -> None:
    pace_of(tmp_path)
    path = place(tmp_path, "cpu")
    whole = json.loads(path.read_bytes())
    other = {"nan": float("nan"), "negative": -1.0, "text": "1"}
    if how in other:
        whole["pace"]["walked"]["round_s"] = other[how]
    if how == "missing":
        del whole["pace"]["table_s"]
    if how == "flat":
        whole["pace"]["cold"] = 1.0
    raw = {"cut": path.read_bytes()[:-9], "list": b"[]", "deep": b"[" * 60000, "bytes": b"\xff\x00"}
    path.write_bytes(raw.get(how) or json.dumps(whole).encode())
    assert kept(tmp_path, "cpu", kernels.status()) is None
    assert pace_of(tmp_path).at == pace_of(tmp_path).at == 2 and len(measured) == 2


def test_links_have_names() -> None:
    assert link_of("loopback") is None and link_of("4G") == Link(50.0, 30.0) and link_of("20ms:100") == Link(20.0, 100.0)
    with pytest.raises(ConfigError, match="cannot read the link"):
        link_of("moon")


def test_explain_and_doctor_show_it(tmp_path: Path, measured: list[str], call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    model = t.lowered_directory()
    words = ("explain", model, "--seq", 4, "--cache", tmp_path)
    before = next(check for check in checks(cache=tmp_path) if check.name == "speed")
    assert before.ok and "not measured" in before.detail
    plain, found = (json.loads(call(*words, *more, "--json").out) for more in ((), ("--link", "wan")))
    told = found.pop("seconds")
    assert found == plain and told["link"] == {"rtt_ms": 60.0, "mbit_s": 305.0} and told["device"] == "cpu"
    assert {key: told[key] for key in ("prompt_s", "first_prompt_s", "token_s")} == seconds(t.lowered(), PACE, link_of("wan"), 4)
    shown = call(*words, "--link", "loopback").out
    assert "over loopback, cpu: prompt" in shown and "a further token" in shown and measured == ["cpu"]
    call(*words, "--link", "loopback", "--measure")
    assert measured == ["cpu"] * 2
    detail = next(check for check in checks(cache=tmp_path) if check.name == "speed").detail
    assert "a round 2 ms" in detail and "the shipped model over loopback, of 64 tokens: prompt " in detail
    monkeypatch.setattr(shipped, "NAME", "nowhere")
    assert next(check for check in checks(cache=tmp_path) if check.name == "speed").detail.endswith("a core")


def test_the_gateways_page_shows_it_where_it_holds(tmp_path: Path, measured: list[str]) -> None:
    def shown(trust: str = DEALER, embedding: str | None = None) -> dict[str, object] | None:
        client = SimpleNamespace(options=Options(cache=tmp_path, trust=trust, embedding=embedding))
        found: Any = SimpleNamespace(model=SimpleNamespace(lowered=t.lowered(), trust=trust), client=client)
        return page._pace(found)

    assert shown() is None
    pace = pace_of(tmp_path)
    room = t.lowered().info.n_positions
    told = {"prompt_tokens": room, **seconds(t.lowered(), PACE, None, room), "machine": pace.speeds()}
    assert room < 64 and shown() == told and measured == ["cpu"]
    assert shown(TWO_PARTY) is shown(embedding=ENCRYPTED) is None


@pytest.mark.parametrize("words", [("--link", "moon"), ("--measure",), ("--link", "lan", "--trust", "two-party")])
def test_what_cannot_be_said_is_refused(tmp_path: Path, measured: list[str], call: Call, words: tuple[str, ...]) -> None:
    done = call("explain", t.lowered_directory(), "--seq", 4, "--cache", tmp_path, *words)
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1 and not measured
