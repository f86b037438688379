"""``benchmarks/step_times.py``: what is measured of a kind is kept at once, and the next start goes on after it."""

import sys
from pathlib import Path

import pytest
import torch

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
DESCRIBED = common.describe() | {"git": "0123456789"}


@pytest.fixture
def measured(tmp_path, monkeypatch) -> list[str]:
    """The recipes that were measured, in order: three kinds, each of two rows that cost nothing."""
    calls: list[str] = []

    def measure_apart(recipe, quick):
        calls.append(recipe.name)
        return [common.result(key(recipe), [float(len(calls))], "ms") for key in (step_key, compilation_key)]

    monkeypatch.setattr(resuming, "new_results_folder", lambda: tmp_path)
    monkeypatch.setattr(common, "describe", lambda: DESCRIBED)
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


def test_a_stopped_start_after_a_finished_one_is_gone_on_with_and_loses_nothing(measured, tmp_path, monkeypatch):
    rows = step_times.run(False)
    (path,) = tmp_path.glob("*.json")
    bench.merge(path, common.report_of("step_times", False, rows))
    resuming.keep(resuming.unfinished("step_times")[0], "step_times", rows[:2])
    finished, stopped = bench.read_results(path)["benchmarks"]
    assert [len(finished["results"]), len(stopped["results"])] == [6, 2]
    assert resuming.unfinished("step_times") == (path, stopped)
    step_times.run(False)
    assert measured == [*NAMES, *NAMES[1:]]


def test_other_sources_begin_anew(measured, tmp_path):
    rows = {row["name"]: row for row in step_times.run(False)}
    (path,) = tmp_path.glob("*.json")
    report = common.report_of("step_times", False, list(rows.values())) | {"complete": False}
    report["environment"] |= {"git": "another"}
    bench.merge(path, report)
    assert resuming.unfinished("step_times")[1] is None


@pytest.mark.parametrize("revision", ["0123456789+", None])
def test_sources_that_may_have_changed_begin_anew(measured, tmp_path, monkeypatch, revision):
    monkeypatch.setattr(common, "describe", lambda: DESCRIBED | {"git": revision})
    step_times.run(False)
    step_times.run(False)
    assert measured == [*NAMES, *NAMES]


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


def test_a_distilled_step_is_left_out_for_its_teacher_is_another_run(monkeypatch):
    monkeypatch.setattr(step_times, "device", lambda: torch.device("cuda"))  # on which every kind is measured
    found = step_times.kinds(False)
    assert {"speed96-faster", "pyramid200-late-asam"} <= {recipe.name for recipe in found}
    assert [recipe.name for recipe in found if recipe.distill is not None] == []


def test_a_step_that_selects_is_measured_with_its_proxy():
    changes = ["model.widths=[4,4,4]", "select.model.widths=[4,4,4]", "train.batch_size=16", "eval.batch_size=16"]
    kind = step_times.Kind(load_recipe("beyond/speed96-faster", [*changes, "engine.device=cpu"]))
    assert kind.step.selection is not None
    assert kind.train(2) > 0


def test_a_late_start_of_asam_is_averaged_over_the_run(monkeypatch):
    tiny = ["train.batch_size=4", "eval.batch_size=4", "engine.device=cpu"]
    changes = ["optimizer={name='sgd',lr=0.01}", "asam={rho=0.1,start=0.75}", *tiny]
    kind = step_times.Kind(load_recipe("lenet5", changes))

    def timed(work, device):
        passes = kind.step.forward_passes.item()
        work()
        return (kind.step.forward_passes.item() - passes) / 1e3

    monkeypatch.setattr(step_times, "timed", timed)
    assert kind.train(4) == pytest.approx(0.75 * 1 + 0.25 * 2)


def test_evaluation_has_the_recipes_batch_size():
    recipe = load_recipe("lenet5", ["train.batch_size=4", "eval.batch_size=7", "engine.device=cpu"])
    kind = step_times.Kind(recipe)
    assert (kind.evaluator.batch_size, len(kind.images), len(kind.batch.rows)) == (7, 7, 4)
    assert kind.odd is None  # 50,000 images are whole batches of 4
    assert kind.evaluate(2) > 0
    assert kind.train(2) > 0
