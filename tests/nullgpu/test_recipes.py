"""Every ladder row and speed recipe on the null device: two epochs with an odd last batch, evaluation and a checkpoint.

The smoke configs have each row's options on a hundred images, the narrow ones of the wide models; the real widths are
in test_ledger.py. One process a group, and one recipe of each group stops after an epoch and is resumed, which builds
and compiles everything once more. The residual networks have no narrow config: three shapes of them would be minutes of
compilation, so that they are captured uncompiled here.
"""

from functools import cache
from pathlib import Path

import pytest

from fastcifar.config import CombineRecipe, load_recipe, shipped_recipes
from tests.nullgpu.checks import assert_clean, assert_evaluation_is_replayed, assert_steps_are_replayed
from tests.nullgpu.harness import ChildFailed, Job, on_null_device
from tests.nullgpu.report import Report

ODD = ["train.epochs=2", "train.batch_size=30"]  # three whole batches and one of ten
UNCOMPILED = {"residual": "graph"}
SPEED = [*ODD, "train.drop_last=false", "data.subset=100", "model.widths=[16,32,32]", "eval.every_epochs=1"]
WARM_UP = {name: ["schedule.warmup_epochs=1"] for name in ("beyond/speed95", "beyond/speed96")}
# Each group with the recipe that is stopped and resumed.
GROUPS = {
    "aug": "smoke/aug-cutmix-late", "wrn": "smoke/wrn-200", "pyramid": "smoke/pyramid400",
    "residual": "smoke/residual-deep", "beyond": "beyond/speed94", "other": "smoke/deep-cosine",
}  # fmt: skip


@cache
def recipes() -> dict[str, str]:
    """Return the recipes that train something, each with its group."""
    folder = {path: f"{path.parent.name}/{path.stem}" for path in shipped_recipes()}
    smoke = [name for name in folder.values() if name.startswith("smoke/")]
    trained = [name for name in smoke if not isinstance(load_recipe(name), CombineRecipe)]
    named = [*trained, "beyond/speed94", "beyond/speed95", "beyond/speed96"]
    return {name: next((g for g in GROUPS if g in name), "other") for name in sorted(named)}


def job(name: str, folder: Path) -> Job:
    changes = [*(SPEED if name.startswith("beyond/") else ODD), *WARM_UP.get(name, ())]
    changes.append(f"engine.mode={UNCOMPILED.get(recipes()[name], 'auto')}")
    resume = name in GROUPS.values()
    return Job("run", {"recipe": name, "out": str(folder / name), "changes": changes, "resume": resume})


@pytest.fixture(scope="session")
def reports_of(null_device: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return a function that gives the reports of a group, its process run once: a failure is every recipe's."""

    @cache
    def executed(group: str) -> dict[str, Report] | ChildFailed:
        folder = tmp_path_factory.mktemp(group)
        names = [name for name, its in recipes().items() if its == group]
        jobs = [job(name, folder) for name in names]
        try:
            return dict(zip(names, on_null_device(jobs, folder / "child", deadline_s=1700), strict=True))
        except ChildFailed as failed:
            return failed

    def reports(group: str) -> dict[str, Report]:
        if isinstance(found := executed(group), ChildFailed):
            raise found
        return found

    return reports


def params() -> list:
    """Return every recipe, its group in its id: see conftest.py."""
    return [pytest.param(name, id=f"{group}: {name}") for name, group in recipes().items()]


@pytest.mark.nullgpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", params())
def test_a_recipe_runs_as_it_should_on_a_gpu(reports_of, name: str) -> None:
    report = reports_of(recipes()[name])[name]
    assert_clean(report)
    assert_steps_are_replayed(report)
    assert_evaluation_is_replayed(report)
    assert report.facts["mode"] == UNCOMPILED.get(recipes()[name], "compile+graph")
    assert [rows for rows, _ in report.captures()] == [30, 10] * (2 if name in GROUPS.values() else 1)
    assert [region.rows for region in report.of("step")] == [30, 30, 30, 10] * 2
    summary = report.facts["summary"]
    assert (summary["status"], summary["epochs_done"]) == ("finished", 2)
    assert len(report.of("evaluation")) >= 2
