"""The harness where the two parties are alone: rows, prediction, the budget's table, single protocols; small sizes, real transfers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.backends import ALONE, OURS, trusting
from benchmarks.measure import Run
from benchmarks.micro import cases, run_case
from benchmarks.scenarios.alone import Extent, alone
from benchmarks.schema import check
from privinf.trust import DEALER, TWO_PARTY
from protocols.errors import ConfigError
from tests.benchmarks.conftest import TINY


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The scenario on one layer, without a shipped model: a pass, and one that reveals its logits."""
    run = Run("two-party budget")
    alone(run, tmp_path_factory.mktemp("alone"), shipped=None, extent=Extent(TINY, 5, 0, "SM(t)+ScFuFFN"))
    return run


def test_rows_bear_their_trust_and_sums_are_the_sockets(budget: Run) -> None:
    """Two parties, three phases; byte for byte what each party's socket has counted."""
    result = check(budget.result(True))
    assert {(r.trust, r.backend, r.alone) for r in result.rows} == {("two-party", "privinf", True)}
    assert {(s.party, s.peer) for s in result.sockets} == {("client", "server"), ("server", "client")}
    assert {t.phase for t in result.totals if t.bytes_sent > 1000 and t.seconds} == {"setup", "offline", "online"}


def test_what_is_made_offline_is_predicted(budget: Run) -> None:
    found = {m.name: m.value for m in budget.measures if m.of == ALONE}
    for name in ("online payload", "offline payload", "set-up payload", "online rounds", "offline rounds"):
        assert found[name] == found[f"{name}, predicted"] > 0
    offline = [r for r in budget.rows if (r.phase, r.party) == ("offline", "client")]
    assert found["offline payload"] == sum(r.payload or 0 for r in offline) and sum(r.seconds or 0.0 for r in offline) > 0
    assert not budget.broken


def test_each_line_of_the_budget_has_its_row(budget: Run) -> None:
    """Measured, but for the model that was left out; a pass from a stock as predicted, with its part of the stock."""
    lines = {goal.name: goal for goal in budget.budget}
    absent = [name for name, goal in lines.items() if goal.measured is None]
    assert [lines[name].why for name in absent] == ["not measured", "not measured"]
    assert all("shipped model" in name for name in absent)
    found = {m.name: m.value for m in budget.measures}
    part = [found[name] for name in ("bytes of a pass, offline and online, from it, predicted", "its part of the stock, bytes, predicted")]
    assert [goal.measured for name, goal in lines.items() if "from a stock of rows for 8192 positions" in name] == [sum(part) / 1e6]
    stock = found["bytes of a stock of rows for 8192 positions, predicted"]
    assert part[1] == math.ceil(stock * 5 / 8192) and part[0] < found["offline payload"] + found["online payload"]
    client = [r for r in budget.rows if r.party == "client" and r.phase != "setup"]
    first = budget.budget[0]
    assert (first.must, first.goal) == (1000, 650)
    assert first.measured == pytest.approx(sum(r.bytes_sent + r.bytes_received for r in client) / 1e6)
    assert lines["offline rounds"].measured == sum(r.rounds for r in client if r.phase == "offline")
    assert all(goal.measured is None or goal.measured > 0 or not goal.must for goal in lines.values())
    errors = [m.value for m in budget.measures if m.name == "worst logit error"]
    assert errors and max(errors) < 0.05


def test_a_single_protocol_has_its_offline_part() -> None:
    """As many bytes online as with a dealer, who sends nothing here."""
    case = next(case for case in cases() if case.name.startswith("comparison"))
    dealt, made = (run_case(case, 1, trust) for trust in (DEALER, TWO_PARTY))
    assert (made.online_bytes, made.rounds) == (dealt.online_bytes, dealt.rounds)
    assert made.dealer_bytes == 0 < dealt.dealer_bytes and made.offline_bytes > dealt.offline_bytes and made.offline_rounds > 0


def test_backends_are_those_of_the_trust_model() -> None:
    assert trusting(["plain", "privinf", "crypten"], TWO_PARTY) == ["plain", ALONE, "crypten"]
    assert trusting([OURS, "plain"], DEALER) == [OURS, "plain"]
    with pytest.raises(ConfigError, match="no trust model 'nobody'"):
        trusting([OURS], "nobody")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["micro", "--trust", "nobody"], "no trust model 'nobody'"),
        (["budget", "--quick"], "one size"),
    ],
)
def test_errors_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1
