"""Records: what a run must be to become one, what a record holds, and that the committed ones agree with themselves."""

import json
import math
import os
import re
from dataclasses import replace
from statistics import fmean, stdev

import pytest
from scipy.stats import t

from fastcifar.errors import UserError
from fastcifar.ladder import rows
from fastcifar.ladder.metrics import recorded
from fastcifar.ladder.records import FILES, NAME, read_records, record_of, result_rows
from fastcifar.ladder.rows import jobs_for
from fastcifar.ladder.runner import combine
from fastcifar.locations import records_folder
from fastcifar.run_directory import RunDirectory, as_json
from tests.ladder.fakes import FakeRows
from tests.run_directories import change_recipe, make_members
from tools import records
from tools.records import add, main

COMMITTED = read_records()


@pytest.fixture
def run_dirs(tmp_path):
    """Return run directories of lenet5 with two seeds."""
    jobs = jobs_for(["lenet5"], 2, tmp_path / "runs")
    for job in jobs:
        FakeRows()(job, None, lambda text: None)
    return [job.folder for job in jobs]


def change_summary(folder, **values):
    """Change values of a run's summary, as if it had ended so."""
    run = RunDirectory.open(folder)
    run.write_summary({**run.summary, **values})


def test_a_record_holds_log_recipe_environment_and_metrics_of_each_seed(tmp_path, run_dirs):
    (folder,) = add(run_dirs, tmp_path / "records")
    (record,) = read_records(tmp_path / "records")
    assert folder.name == f"{record.date}-lenet5-none"
    assert [seed.seed for seed in record.seeds] == [42, 43]
    for run, seed in zip(run_dirs, record.seeds, strict=True):
        assert [(folder / f"seed-{seed.seed}" / name).read_bytes() for name in FILES] == [
            (run / name).read_bytes() for name in FILES
        ]
        summary = json.loads((run / "summary.json").read_text())
        assert (seed.best, seed.last) == (summary["best"]["accuracy"], summary["last"]["accuracy"])
        assert (seed.git, seed.absent) == ("0000000000", [])
    best = [seed.best for seed in record.seeds]
    error = stdev(best) / math.sqrt(2)
    assert record.best.model_dump() == pytest.approx({"mean": fmean(best), "standard_error": error, "n": 2})
    assert record.p_value == pytest.approx(2 * t.sf(abs(fmean(best) - 59.48) / (stdev(best) * math.sqrt(1.5)), 1))
    assert "t-test" in record.test


def test_one_seed_is_no_test_and_a_second_joins_the_record(tmp_path, run_dirs):
    add(run_dirs[:1], tmp_path / "records")
    (record,) = read_records(tmp_path / "records")
    assert (record.p_value, record.test) == (None, "n = 1: no test")
    add(run_dirs[1:], tmp_path / "records")
    (record,) = read_records(tmp_path / "records")
    assert [seed.seed for seed in record.seeds] == [42, 43]


def test_a_later_run_of_a_seed_replaces_it_and_dates_the_record(tmp_path, run_dirs):
    (folder,) = add(run_dirs, tmp_path / "records")
    change_summary(run_dirs[0], best={"epoch": 1, "accuracy": 61.5, "loss": 1.0})
    path = folder / NAME
    old = json.loads(path.read_text())
    for seed in old["seeds"]:
        seed["date"] = "2020-01-01"
    older = folder.with_name("2020-01-01-lenet5-none")
    path.write_text(json.dumps(old | {"date": "2020-01-01"}))
    folder.rename(older)
    assert add(run_dirs[:1], tmp_path / "records") == [folder]
    assert not older.exists()
    (record,) = read_records(tmp_path / "records")
    assert [(seed.seed, seed.date == record.date) for seed in record.seeds] == [(42, True), (43, False)]
    assert record.seeds[0].best == 61.5
    assert (folder / "seed-43" / "metrics.jsonl").is_file()


def test_a_run_that_got_less_far_is_refused_and_the_record_stays(tmp_path, run_dirs, capsys, monkeypatch):
    (folder,) = add(run_dirs, tmp_path / "records")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    change_summary(run_dirs[0], status="stopped", epochs_done=1)
    os.utime(run_dirs[0] / "summary.json", (0, 0))
    monkeypatch.setattr(records, "records_folder", lambda: tmp_path / "records")
    assert main(["add", *map(str, reversed(run_dirs))]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{run_dirs[0]}: ended after 1 of 3 epochs on 1970-01-01, but the record {folder.name}" in said
    assert {path: path.read_bytes() for path in (tmp_path / "records").rglob("*") if path.is_file()} == before


def test_two_runs_of_a_seed_at_once_are_refused(tmp_path, run_dirs):
    with pytest.raises(UserError, match=f"^{run_dirs[0]}: is a run of lenet5 with seed 42 on none, as {run_dirs[0]}"):
        add([*run_dirs, run_dirs[0]], tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_seeds_of_a_combination_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "cost", lambda recipe: 0)  # it orders rows, and takes seconds
    jobs = jobs_for(["ensemble-soft"], 2, tmp_path)[-2:]
    members = make_members(tmp_path / "members", (1.0,) * len(jobs[0].members))
    folders = dict(zip(jobs[0].members, [run.folder for run in members.values()], strict=True))
    for job in jobs:
        combine(replace(job, members=folders))
        change_summary(job.folder, git="0123456789")
    (folder,) = add([job.folder for job in jobs], tmp_path / "records")
    (record,) = read_records(tmp_path / "records")
    assert [seed.seed for seed in record.seeds] == [42, 43]
    assert sorted(path.name for path in folder.glob("seed-*")) == ["seed-42", "seed-43"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"git": "1234567890"}, "began with git 0000000000 and went on after epoch 7 with 1234567890"),
        ({"git": "0000000000+"}, "went on after epoch 7 with 0000000000[+]"),
        ({"git": None}, "went on after epoch 7 with an unknown one"),
        ({"hardware": "another"}, "began with hardware none and went on after epoch 7 with another"),
    ],
)
def test_a_run_of_two_revisions_or_kinds_of_hardware_is_refused(tmp_path, run_dirs, changed, said):
    run = RunDirectory.open(run_dirs[0])
    place = {"epochs_done": 7, "hardware": run.environment["hardware"], "git": "0000000000"}
    run.commit({"environment.json": as_json(run.environment | {"resumed": [place, place | changed]})})
    with pytest.raises(UserError, match=said):
        add(run_dirs, tmp_path / "records")
    run.commit({"environment.json": as_json(run.environment | {"resumed": [place]})})  # other versions, say
    assert add(run_dirs, tmp_path / "records")


@pytest.mark.parametrize(("git", "said"), [("0123456789+", "files differed"), (None, "is unknown"), ("main", "none")])
def test_a_dirty_or_unknown_revision_is_refused_and_nothing_written(tmp_path, run_dirs, git, said):
    change_summary(run_dirs[1], git=git)
    with pytest.raises(UserError, match=said):
        add(run_dirs, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_a_run_of_other_settings_is_refused(tmp_path, run_dirs, capsys):
    change_recipe(run_dirs[0], ("lr = 0.0003", "lr = 0.001"))
    assert main(["add", *map(str, run_dirs)]) == 2
    assert "is no result of lenet5, for it differs from the recipe in optimizer.lr" in capsys.readouterr().err


def test_another_precision_loader_or_evaluation_is_the_same_row(tmp_path, run_dirs):
    change_recipe(run_dirs[0], ('"bf16"', '"fp32"'), ('tta = "none"', 'tta = "flip"'), ("workers = 2", "workers = 7"))
    add(run_dirs, tmp_path / "records")


@pytest.mark.parametrize(
    ("asked", "meant", "recorded_as"), [("fp32", None, "fp32"), ("auto", "bf16", "bf16"), ("auto", None, None)]
)
def test_the_precision_is_the_recipes_or_what_auto_stood_for(tmp_path, run_dirs, asked, meant, recorded_as):
    run = RunDirectory.open(run_dirs[0])
    text = (run.folder / "recipe.toml").read_text()
    recipe = re.sub(r'^precision = ".*"$', f'precision = "{asked}"', text, flags=re.MULTILINE)
    run.commit({"recipe.toml": recipe, "environment.json": json.dumps({**run.environment, "precision": meant})})
    add(run_dirs[:1], tmp_path / "records")
    (record,) = read_records(tmp_path / "records")
    assert record.seeds[0].precision == recorded_as


def test_a_damaged_or_renamed_record_is_named(tmp_path, run_dirs):
    (folder,) = add(run_dirs, tmp_path)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="rename the folder"):
        read_records(tmp_path)
    (tmp_path / "elsewhere" / NAME).write_text(json.dumps({"row": "lenet5"}))
    with pytest.raises(UserError, match=r"record\.json: is not a record"):
        read_records(tmp_path)


@pytest.mark.parametrize("record", COMMITTED, ids=lambda record: record.folder_name)
def test_a_committed_record_follows_from_its_seeds(record):
    published = record.published.model_dump() if record.published else None
    assert record_of(record.row, record.hardware, published, record.seeds) == record
    for seed in record.seeds:
        folder = records_folder() / record.folder_name / f"seed-{seed.seed}"
        assert [name for name in FILES if not (folder / name).is_file()] == seed.absent


def test_a_newer_record_of_a_seed_replaces_an_older_one():
    old, *_ = COMMITTED
    newer = old.model_copy(update={"seeds": [old.seeds[0].model_copy(update={"last": 99.0})]})
    found = result_rows([old, newer])
    assert len(found) == len(old.seeds)
    assert found[0]["last"] == 99.0
    assert found[0]["hardware"] == old.hardware


CHANGES = {
    "complete": {"complete": True, "epochs_done": 20, "epochs": 20, "date": "2026-11-20"},
    "of fewer epochs": {"complete": True, "epochs_done": 10, "epochs": 10, "date": "2026-11-21"},
    "cut": {"complete": False, "epochs_done": 5, "epochs": 20, "date": "2026-11-22"},
    "cut sooner": {"complete": False, "epochs_done": 2, "epochs": 20, "date": "2026-11-23"},
}


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["complete", "cut"], "complete"),
        (["cut sooner", "cut"], "cut"),
        (["cut", "complete"], "complete"),
        (["complete", "of fewer epochs"], "of fewer epochs"),
    ],
)
def test_of_two_results_of_a_seed_on_one_hardware_the_one_that_got_further_counts(names, counts):
    old, *_ = COMMITTED
    seeds = [old.seeds[0].model_copy(update=CHANGES[name]) for name in names]
    (row,) = result_rows([old.model_copy(update={"seeds": [seed]}) for seed in seeds])
    assert CHANGES[counts].items() <= row.items()


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["complete", "cut"], ["complete"]),
        (["cut sooner", "cut"], ["cut"]),
        (["cut", "complete"], ["complete"]),
        (["complete", "of fewer epochs"], ["of fewer epochs"]),
        (["complete", "complete again"], ["complete", "complete again"]),
    ],
)
def test_each_hardware_on_which_the_newest_recipe_ended_has_its_own_metrics(names, counts):
    old, *_ = COMMITTED
    seeds = {name: old.seeds[0].model_copy(update=CHANGES[name.removesuffix(" again")]) for name in names}
    kept = [old.model_copy(update={"hardware": name, "seeds": [seed]}) for name, seed in seeds.items()]
    rows = result_rows(kept)
    assert len(rows) == len(names)
    assert [metrics.hardware for metrics in recorded(old.row, rows)] == counts
    assert recorded("another row", rows) == []
