"""``benchmarks/step_times.py``: what is measured of a kind is kept at once, and the next start goes on after it."""

import sys
from pathlib import Path

import pytest

from fastcifar.cli import bench
from fastcifar.config import load_recipe
from fastcifar.errors import UserError
from fastcifar.models.budget import compilation_key, step_key

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import common  # noqa: E402
import resuming  # noqa: E402
import step_times  # noqa: E402

NAMES = ("lenet5", "deep-bn", "wrn-sgd")


@pytest.fixture
def measured(tmp_path, monkeypatch) -> list[str]:
    """The recipes that were measured, in order: three kinds, each of two rows that cost nothing."""
    calls: list[str] = []

    def measure_apart(recipe, quick):
        calls.append(recipe.name)
        return [common.result(key(recipe), [float(len(calls))], "ms") for key in (step_key, compilation_key)]

    monkeypatch.setattr(resuming, "new_results_folder", lambda: tmp_path)
    monkeypatch.setattr(step_times, "kinds", lambda quick: [load_recipe(name) for name in NAMES])
    monkeypatch.setattr(step_times, "measure_apart", measure_apart)
    return calls


def held(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    (report,) = bench.read_results(path)["benchmarks"]
    return report


def test_an_interrupted_start_is_gone_on_with(measured, tmp_path, monkeypatch):
    measure = step_times.measure_apart

    def interrupted(recipe, quick):
        if recipe.name == "wrn-sgd":
            raise KeyboardInterrupt
        return measure(recipe, quick)

    monkeypatch.setattr(step_times, "measure_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step_times.run(False)
    assert len(held(tmp_path)["results"]) == 4
    monkeypatch.setattr(step_times, "measure_apart", measure)
    rows = step_times.run(False)
    assert measured == list(NAMES)
    assert [row["value"] for row in rows] == [1, 1, 2, 2, 3, 3]


def test_a_finished_report_is_measured_anew(measured, tmp_path):
    rows = step_times.run(False)
    (path,) = tmp_path.glob("*.json")
    bench.merge(path, common.report_of("step_times", False, rows))  # as `fastcifar bench` does at the end
    step_times.run(False)
    assert measured == [*NAMES, *NAMES]


def test_other_sources_begin_anew(measured, tmp_path):
    rows = {row["name"]: row for row in step_times.run(False)}
    (path,) = tmp_path.glob("*.json")
    report = common.report_of("step_times", False, list(rows.values())) | {"complete": False}
    report["environment"] |= {"git": "another"}
    bench.merge(path, report)
    assert resuming.unfinished("step_times")[1] is None


def test_a_kind_that_fails_does_not_stop_the_others(measured, tmp_path, monkeypatch):
    measure = step_times.measure_apart

    def failing(recipe, quick):
        if recipe.name == "deep-bn":
            raise UserError("deep-bn: out of memory")
        return measure(recipe, quick)

    monkeypatch.setattr(step_times, "measure_apart", failing)
    with pytest.raises(UserError, match="out of memory"):
        step_times.run(False)
    assert measured == ["lenet5", "wrn-sgd"]
    assert len(held(tmp_path)["results"]) == 4


def test_a_quick_start_keeps_nothing(measured, tmp_path):
    step_times.run(True)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_has_the_recipes_batch_size():
    recipe = load_recipe("lenet5", ["train.batch_size=4", "eval.batch_size=7", "engine.device=cpu"])
    kind = step_times.Kind(recipe)
    assert (kind.evaluator.batch_size, len(kind.images), len(kind.batch.rows)) == (7, 7, 4)
    assert kind.odd is None  # 50,000 images are whole batches of 4
    assert kind.evaluate(2) > 0
    assert kind.train(2) > 0
