"""The benchmarks' common ground: alternation, medians, pairwise ratios, one JSON object on stdout."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import common  # noqa: E402
from fastcifar.errors import UserError  # noqa: E402

ROW = {"name", "value", "unit", "spread", "n", "baseline", "ratio", "ratio_spread"}


def test_sides_take_turns_and_the_warmup_is_dropped():
    calls = []

    def side(name):
        def measure() -> float:
            calls.append(name)
            return float(len(calls))

        return measure

    measures = common.alternate({"a": side("a"), "b": side("b")}, n=3, warmup=2)
    assert "".join(calls) == "ababababab"
    assert measures == {"a": [5, 7, 9], "b": [6, 8, 10]}


def test_a_row_holds_median_spread_and_pairwise_ratio(rng):
    ours, theirs = rng.uniform(1, 2, 9), rng.uniform(1, 2, 9)
    row = common.result("ours", ours, "images/s", "theirs", theirs)
    assert set(row) == ROW
    assert row["value"] == np.median(ours)
    assert row["spread"] == [ours.min(), ours.max()]
    assert row["ratio"] == pytest.approx(np.median(ours / theirs))
    assert row["ratio_spread"] == pytest.approx([(ours / theirs).min(), (ours / theirs).max()])


def test_a_ratio_above_one_is_faster_for_times_too():
    row = common.result("ours", [1.0, 2.0], "s", "theirs", [3.0, 6.0], higher_is_better=False)
    assert row["ratio"] == 3.0


def test_sides_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        common.result("ours", [1.0, 2.0], "s", "theirs", [3.0])


def test_a_time_is_positive():
    assert common.timed(lambda: sum(range(10_000))) > 0


def test_json_is_one_object_on_stdout_and_the_table_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--json", "--quick"])
    monkeypatch.setenv("FASTCIFAR_STRICT", "1")  # which main would set, and leave to the tests after this one
    common.main("x", lambda quick: [common.result("a", [1.0 + quick], "s")])
    done = capsys.readouterr()
    report = json.loads(done.out)
    assert report["benchmark"] == "x"
    assert report["quick"] is True
    assert report["results"][0]["value"] == 2.0
    assert {"date", "hardware", "packages", "git"} <= set(report["environment"])
    assert "x on" in done.err


def test_a_user_error_is_one_line(monkeypatch, capsys):
    def run(quick: bool) -> list[dict]:
        raise UserError("no data")

    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setenv("FASTCIFAR_STRICT", "1")
    with pytest.raises(SystemExit, match=r"^fastcifar: bench x: no data$"):  # which Python prints, with status 1
        common.main("x", run)
    assert capsys.readouterr().out == ""
