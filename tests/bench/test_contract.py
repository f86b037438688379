"""The speed records' timing contract: the run is the ordinary one, and the clock runs when it should."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import t

from fastcifar.cli import bench
from fastcifar.config.schema import Recipe
from fastcifar.environment import describe
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from fastcifar.train import contract, run
from fastcifar.train.contract import ContractResult, ContractRun
from tests.train.tiny import recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import common
import resuming
import time_to_accuracy

SPEEDNET = {"name": "speednet", "widths": [4, 4, 4], "whiten_bias_epochs": 1}


def tiny(**changes) -> Recipe:
    data = {"source": "synthetic", "subset": 80, "test_subset": 50, "loader": {"name": "resident"}}
    tables = {"data": data, "model": SPEEDNET, "optimizer": {"name": "sgd", "lr": 0.01}}
    return recipe(**{**tables, "train": {"epochs": 2, "batch_size": 40}} | changes)


@pytest.mark.parametrize(
    "changes",
    [{"lookahead": {"every": 3}, "eval": {"tta": "flip"}}, {"ema": {"decay": 0.9}, "select": {"model": SPEEDNET}}],
)
def test_it_trains_what_an_ordinary_run_trains(changes: dict, tmp_path: Path) -> None:
    """Reset and whitening within the memory that was made for them; the averages begin at the whitened weights."""
    wanted = tiny(**changes)
    folder = RunDirectory.create(tmp_path / "run", wanted, describe())
    summary = run.train(wanted, folder, quiet=True)
    one = ContractRun(wanted)
    with torch.no_grad():
        for tensor in one.model.state_dict().values():  # whatever is there: the reset must bring it back
            tensor.zero_()
    result = one()
    kind = "raw" if wanted.ema is None else "ema"
    with one.step.weights(kind):
        ours = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    for name, tensor in load_file(tmp_path / "run" / "weights" / "last.safetensors").items():
        assert torch.equal(tensor, ours[name]), name
    assert result.accuracy == (summary["tta"] or summary["last"])["accuracy"]
    assert result.seconds > 0
    assert result.evaluation_s > 0


def test_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of events instead of seconds: what happens while it runs."""
    events: list[str] = []

    def watched(where, name: str) -> None:
        work = getattr(where, name)

        def noted(*arguments, **options):
            events.append(name)
            return work(*arguments, **options)

        monkeypatch.setattr(where, name, noted)

    class Spans(contract.Clock):
        def span(self, name: str):
            events.append(name)
            return super().span(name)

    monkeypatch.setattr(contract, "Clock", Spans)
    for where, name in ((contract.hooks, "fit_images"), (contract, "open_data"), (contract, "build_step")):
        watched(where, name)
    one = ContractRun(tiny())
    assert events == ["open_data", "build_step", "compilation_s"]
    for where, name in ((one._loader, "epoch"), (one._augment, "plain"), (one._test, "metrics")):
        watched(where, name)
    one()
    assert events[3:7] == ["training_s", "plain", "fit_images", "epoch"]
    assert events[7:10] == ["epoch", "evaluation_s", "metrics"]


def test_the_rows_of_runs() -> None:
    runs = [ContractResult(*row) for row in ((2.0, 0.1, 94.1), (4.0, 0.3, 94.3), (3.0, 0.2, 93.9))]
    rows = {row["name"].removeprefix("x: "): row["value"] for row in time_to_accuracy.contract_rows("x", runs, 94.0)}
    assert rows["reset, whitening and training, mean"] == pytest.approx(3.0)
    assert rows["reset, whitening and training, standard error"] == pytest.approx(3**-0.5)
    assert rows["accuracy, mean"] == pytest.approx(94.1)
    assert rows["evaluation (not counted), mean"] == pytest.approx(0.2)
    # t = 0.1 / (0.2 / sqrt 3), two degrees of freedom, the upper tail.
    assert rows["p of a mean of no more than 94.0%"] == pytest.approx(t.sf(0.1 / (0.2 / 3**0.5), 2))
    single = time_to_accuracy.contract_rows("x", runs[:1], 94.0)
    assert [row["name"] for row in single if "error" in row["name"] or "p of" in row["name"]] == []


def test_the_command_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = []
    row = {"name": "a", "value": 1.0, "unit": "s"}
    head = {"quick": True, "environment": {"date": "2026-01-31", "hardware": "x"}, "results": [row]}

    def run_one(script: Path, options: list[str]) -> dict:
        given.append((script.name, options))
        return {"benchmark": "time_to_accuracy_contract", **head}

    monkeypatch.setattr(bench, "run_one", run_one)
    bench.bench(["time-to-accuracy"], quick=True, contract=True, recipe=["wrn-sgd"], runs=3, to=tmp_path / "r.json")
    assert given == [("time_to_accuracy.py", ["--quick", "--contract", "--recipe=wrn-sgd", "--runs=3"])]
    with pytest.raises(UserError, match=r"`fastcifar bench time-to-accuracy --contract`"):
        bench.bench(["step"], contract=True)


@pytest.mark.parametrize(("recipe", "message"), [("nope.toml", "no such recipe file"), ("stacking", "trains nothing")])
def test_a_recipe_that_cannot_be_timed_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, recipe: str, message: str
) -> None:
    monkeypatch.setattr(bench, "run_one", lambda script, options: pytest.fail("it was run"))
    with pytest.raises(UserError, match=message):
        bench.bench(["time-to-accuracy"], recipe=[recipe])


def test_runs_are_kept_at_once_and_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resuming, "new_results_folder", lambda: tmp_path)
    monkeypatch.setattr(common, "describe", lambda: describe() | {"git": "0123456789"})
    trained = []

    def interrupted_before(last: int) -> None:
        def run(wanted):
            if wanted.seed == last:
                raise KeyboardInterrupt
            trained.append(wanted.seed)
            return lambda: ContractResult(1.5, 0.5, float(wanted.seed))

        monkeypatch.setattr(time_to_accuracy, "ContractRun", run)

    interrupted_before(44)
    with pytest.raises(KeyboardInterrupt):
        time_to_accuracy.contract({"beyond/speed94": 3}, quick=False)
    (path,) = tmp_path.iterdir()
    (report,) = bench.read_results(path)["benchmarks"]
    assert not report["complete"]
    assert next(row["value"] for row in report["results"] if "accuracy, mean" in row["name"]) == 42.5
    # A finished report of another recipe leaves those runs where they are.
    other = {"complete": True, "recipes": ["beyond/speed97"], "results": [{"name": "seconds", "value": 3.0}]}
    bench.merge(path, report | other)
    assert sorted(each["complete"] for each in bench.read_results(path)["benchmarks"]) == [False, True]
    interrupted_before(0)
    rows = time_to_accuracy.contract({"beyond/speed94": 3, "beyond/speed96": 1}, quick=False)
    assert trained == [42, 43, 44, 42]
    assert next(row for row in rows if row["name"] == "beyond/speed94: accuracy, mean")["value"] == 43
    # One of its own takes them along: the next start trains anew.
    assert set(resuming.kept_runs(time_to_accuracy.CONTRACT))
    for recipes in (["beyond/speed94"], ["beyond/speed96", "beyond/speed94"]):
        bench.merge(path, report | {"complete": True, "recipes": recipes})
    assert resuming.kept_runs(time_to_accuracy.CONTRACT) == {}
    # Of changed sources nobody knows whether they are the same.
    monkeypatch.setattr(common, "describe", lambda: describe() | {"git": "0123456789+"})
    resuming.keep(path, time_to_accuracy.CONTRACT, report["results"], runs=report["runs"])
    assert resuming.kept_runs(time_to_accuracy.CONTRACT) == {}


def test_from_its_own_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(resuming, "new_results_folder", lambda: tmp_path)
    monkeypatch.setattr(time_to_accuracy, "ContractRun", lambda wanted: lambda: ContractResult(1.5, 0.5, wanted.seed))
    words = ["time_to_accuracy.py", "--contract", "--json", "--runs=3", "--recipe=beyond/speed94"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("FASTCIFAR_STRICT", "1")  # as the benchmark sets it for its process; here it ends with the test
    time_to_accuracy.main()
    printed = capsys.readouterr()
    assert "beyond/speed94: seed 44: 1.500 s, 44.00%" in printed.err
    report = json.loads(printed.out)
    assert report["benchmark"] == "time_to_accuracy_contract"
    values = {row["name"].removeprefix("beyond/speed94: "): row["value"] for row in report["results"]}
    assert values["accuracy, mean"] == 43
    assert values["p of a mean of no more than 94.01%"] > 0.99


def test_a_combination_is_refused() -> None:
    with pytest.raises(UserError, match="combines trained runs"):
        time_to_accuracy.recipes("ensemble-soft", 1)
