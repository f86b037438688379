"""The time budget: steps counted as the engine takes them, times from measurements, nothing without one."""

import json
import math

import pytest

from fastcifar.config import Recipe, load_recipe
from fastcifar.ladder.rows import catalogue, ladder_rows
from fastcifar.models import budget


@pytest.fixture(scope="module")
def rows() -> dict[str, Recipe]:
    return {name: catalogue()[name] for name in ladder_rows() if isinstance(catalogue()[name], Recipe)}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("images", [1, 99, 100, 101, 50_000])
def test_steps(images, drop_last):
    recipe = load_recipe("lenet5", ["train.batch_size=100", f"train.drop_last={str(drop_last).lower()}"])
    expected = math.floor(images / 100) if drop_last else math.ceil(images / 100)
    assert budget.steps_per_epoch(recipe, images) == expected


def test_images_of_an_epoch_are_those_the_engine_takes(synthetic_store):
    from fastcifar.train.run import choose_rows

    for words in ([], ["data.subset=203"], ["data.subset=200", "data.holdout=50"], ["data.holdout=100"]):
        recipe = load_recipe("lenet5", ['data.source="synthetic"', *words])
        taken = len(choose_rows(recipe.data, synthetic_store, recipe.seed).train)
        assert budget.images_to_train(recipe, synthetic_store.count("train")) == taken


def test_what_changes_a_step_changes_its_key(rows):
    base = load_recipe("wrn-asam")
    for words in ("train.batch_size=64", "engine.precision=fp32", "model.widen=4", "ema.decay=0.99"):
        assert budget.step_key(load_recipe("wrn-asam", [words])) != budget.step_key(base)
    for words in ("seed=7", "train.epochs=3", "augment=[]", "loss.label_smoothing=0.2", "optimizer.lr=1.0"):
        assert budget.step_key(load_recipe("wrn-asam", [words])) == budget.step_key(base)
    assert budget.step_key(rows["pyramid"]) != budget.step_key(rows["pyramid-shakedrop"])


def test_prediction_adds_up():
    recipe = load_recipe("wrn-200")
    times = {budget.step_key(recipe): 0.01, budget.evaluation_key(recipe): 1e-5, budget.compilation_key(recipe): 60.0}
    found = budget.predict(recipe, times)
    # Raw and averaged weights each epoch; on the training images once each, and the best ones.
    evaluations = 2 * 200 * 10_000 + 3 * 50_000
    assert found.total_s == pytest.approx(60 + 200 * 391 * 0.01 + evaluations * 1e-5)


def test_without_a_measurement_there_is_no_prediction(rows):
    assert all(budget.predict(recipe, {}) is None for recipe in rows.values())


def test_whole_measurements_win_over_quick_ones(tmp_path):
    def write(name: str, value: float, quick: bool) -> None:
        results = [{"name": "a", "value": value}]
        content = {"benchmarks": [{"benchmark": "step_times", "quick": quick, "results": results},
                                  {"benchmark": "step", "results": [{"name": "b", "value": 1.0}]}]}  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))

    write("2026-01-01-nvidia-h200.json", 1000.0, False)
    write("2026-01-02-nvidia-h200.json", 2000.0, False)
    write("2026-01-03-nvidia-h200.json", 9000.0, True)
    write("2026-01-03-nvidia-h100.json", 5000.0, False)
    files = budget.results_of(tmp_path, "H200")
    assert [path.name[:10] for path in files] == ["2026-01-01", "2026-01-02", "2026-01-03"]
    assert budget.measured_times(files) == {"a": 2.0}
    assert budget.results_of(tmp_path, "a100") == []
