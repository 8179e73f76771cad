"""Seconds from a cost and a measurement: exact arithmetic, what is kept, and what is measured anew. No machine's speed is tested here."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from privinf import shipped
from privinf.doctor.checks import checks
from privinf.gateway import page
from privinf.local import pace as local
from privinf.local.pace import Seen, fitted, pace_of, solved
from privinf.lowering.explain import explain
from privinf.session import pace as module
from privinf.session.options import Options
from privinf.session.pace import Pace, kept, link_of, place, seconds
from privinf.transport.shaper import Link
from privinf.trust import DEALER, ENCRYPTED, TWO_PARTY
from protocols import kernels
from protocols.errors import ConfigError
from tests.support import trio as t
from tests.support.command import Call
from tests.support.command import call as call

PACE = Pace(2e-3, 5e-9, 2e-10, 1e-9, 3e-4, 2e-10, cold_s=0.5, load=1.0, at=1.0)


def total(rounds: int, online: int, dealer: int, macs: int, setup: int) -> dict[str, int]:
    return {"rounds": rounds, "online_bytes": online, "dealer_bytes": dealer, "macs": macs, "setup_bytes": setup}


def test_seconds_are_those_of_the_formulas() -> None:
    lowered, link = t.lowered(), Link(20.0, 100.0)
    prompt, token = explain(lowered, 6)["total"], explain(lowered, 1, cached=6)["total"]
    found = seconds(lowered, PACE, link, 6)
    moved = prompt["online_bytes"] + prompt["dealer_bytes"]
    walked = 2e-3 * (prompt["rounds"] + 8) + 5e-9 * moved + 2e-10 * prompt["macs"] + 1e-9 * prompt["setup_bytes"]
    assert found["prompt_s"] == pytest.approx(walked + prompt["rounds"] * 0.01 + prompt["online_bytes"] / 2 / 12.5e6)
    assert found["first_prompt_s"] == pytest.approx(0.5 + found["prompt_s"])
    taped = 3e-4 * token["rounds"] + 2e-10 * token["setup_bytes"]
    assert found["token_s"] == pytest.approx(taped + token["rounds"] * 0.01 + token["online_bytes"] / 2 / 12.5e6)
    pieces = explain(lowered, 6, chunk=4)["total"]
    by_passes = seconds(lowered, PACE, None, 6, chunk=4)["prompt_s"]
    assert by_passes == pytest.approx(PACE.walked(pieces) + 2e-3 * 8 + 1e-9 * pieces["setup_bytes"])


def test_more_of_anything_takes_no_less() -> None:
    base = total(30, 10**6, 10**6, 10**8, 10**7)
    for name in base:
        assert PACE.walked(base | {name: base[name] * 2}) > PACE.walked(base)
    lowered = t.lowered()
    links = [None, Link(1.0, 1000.0), Link(60.0, 1000.0), Link(60.0, 30.0)]
    times = [seconds(lowered, PACE, link, 4) for link in links]
    for key in ("prompt_s", "token_s"):
        assert [found[key] for found in times] == sorted(found[key] for found in times) and len({found[key] for found in times}) == 4
    slower = [seconds(lowered, replace(PACE, **{field.name: 1.0}), None, 4) for field in dataclasses.fields(Pace)[:6]]
    assert all(found["prompt_s"] > times[0]["prompt_s"] or found["token_s"] > times[0]["token_s"] for found in slower)


def test_a_token_without_a_tape_and_one_without_a_context() -> None:
    large = total(30, 4_000_000, 4_000_000, 10**8, 10**7)
    assert PACE.token(large) == PACE.walked(large) and PACE.token(large, batch=2) < PACE.walked(large)
    lowered = t.lowered()
    assert seconds(lowered, PACE, None, lowered.info.n_positions)["token_s"] is None


def test_a_measurement_gives_back_what_made_it() -> None:
    def seen(short: dict[str, int], long: dict[str, int], token: dict[str, int]) -> Seen:
        taped = 3e-4 * token["rounds"] + 2e-10 * token["setup_bytes"]
        return Seen(short, long, token, PACE.walked(short), PACE.walked(long), taped, PACE.walked(short) + 0.5)

    narrow = seen(total(58, 10**5, 10**6, 10**7, 10**6), total(58, 10**7, 10**7, 10**8, 10**6), total(58, 1, 1, 1, 10**6))
    wide = seen(total(18, 10**5, 10**6, 10**8, 10**8), total(18, 10**6, 10**6, 10**9, 10**8), total(18, 1, 1, 1, 10**8))
    assert asdict(fitted([narrow, wide], load=1.0, at=1.0)) == pytest.approx(asdict(PACE))


@pytest.mark.parametrize("times", [(1.0, 100.0), (100.0, 1.0), (-1.0, -1.0)])
def test_no_unit_takes_less_than_nothing(times: tuple[float, float]) -> None:
    found = solved([(1.0, 2.0), (2.0, 3.0)], times)
    assert min(found) >= 0 and (max(found) > 0) == (max(times) > 0)


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


@pytest.mark.parametrize("how", ["cut", "list", "nan", "negative", "text", "deep", "bytes", "missing"])
def test_a_broken_one_is_measured_anew(tmp_path: Path, measured: list[str], how: str) -> None:
    pace_of(tmp_path)
    path = place(tmp_path, "cpu")
    whole = json.loads(path.read_bytes())
    other = {"nan": float("nan"), "negative": -1.0, "text": "1"}
    if how in other:
        whole["pace"]["round_s"] = other[how]
    if how == "missing":
        del whole["pace"]["byte_s"]
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
