"""Executing the ladder: the order, what is skipped and resumed, failures, interrupts, the deadline."""

import errno
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from fastcifar.config import CombineRecipe
from fastcifar.errors import UserError
from fastcifar.interrupt import Interrupted
from fastcifar.ladder.execute import LadderExecution, OutOfTime, RowFailed, alone_in
from fastcifar.ladder.rows import catalogue, choose, jobs_for, ladder_rows, with_members
from fastcifar.ladder.state import Ledger, Note, stored_state
from fastcifar.run_directory import RunDirectory
from tests.ladder.fakes import FakeRows, stop_early

SMALL = ["lenet5", "deep", "ensemble-soft", "stacking"]


def execute_ladder(jobs, rows, out, view, until_s=None):
    ledger = Ledger(jobs)
    LadderExecution(ledger, rows, out, view, until_s).execute()
    return ledger


def table(out):
    return json.loads((out / "ladder.json").read_text())


def test_the_ladder_is_all_36_rows():
    assert len(ladder_rows()) == 36
    assert "smoke" not in ladder_rows()
    assert not [name for name in ladder_rows() if "/" in name]


def test_cheap_rows_come_first_and_members_before_their_combinations(tmp_path):
    jobs = jobs_for(ladder_rows(), 2, tmp_path)
    assert len(jobs) == 72
    done = set()
    for job in jobs:
        assert set(job.members.values()) <= done
        done.add(job.folder)
    trained = [job for job in jobs if not job.members]
    assert all(a.cost <= b.cost for a, b in pairwise(trained))
    assert trained[0].row == "lenet5"
    assert trained[-1].row == "pyramid400"


def test_seeds_count_up_and_reach_the_recipe(tmp_path):
    jobs = jobs_for(["lenet5"], 3, tmp_path)
    assert [(job.seed, job.recipe.seed) for job in jobs] == [(42, 42), (43, 43), (44, 44)]
    assert len({job.folder for job in jobs}) == 3


def test_a_combination_brings_its_members_and_takes_those_of_its_seed(tmp_path):
    assert with_members(["stacking"]) == ["wrn-200", "pyramid200", "pyramid400", "stacking"]
    for job in jobs_for(["smoke/stacking"], 2, tmp_path):
        if job.members:
            assert list(job.members) == ["smoke-pyramid400", "smoke-pyramid200", "smoke-wrn-200"]
            assert {folder.name for folder in job.members.values()} == {f"seed-{job.seed}"}


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [("wrn-2*", ["wrn-200"]), ("smoke/wrn-200", ["smoke/wrn-200"]), ("*-hard", ["ensemble-hard"])],
)
def test_only_takes_a_pattern(pattern, wanted):
    assert choose([pattern]) == wanted


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(UserError, match=r'no recipe matches "wrn-300".*did you mean "wrn-200"'):
        choose(["lenet5", "wrn-300"])


def test_everything_runs_once_and_is_then_skipped(tmp_path, view):
    rows = FakeRows()
    execute_ladder(jobs_for(SMALL, 2, tmp_path), rows, tmp_path, view)
    assert len(rows.trained) == len(set(rows.trained))
    assert {row["state"] for row in table(tmp_path)["rows"]} == {"done"}
    again = FakeRows()
    execute_ladder(jobs_for(SMALL, 2, tmp_path), again, tmp_path, view)
    assert again.trained == []


def test_more_seeds_later_run_only_the_new_ones(tmp_path, view):
    execute_ladder(jobs_for(["lenet5"], 1, tmp_path), FakeRows(), tmp_path, view)
    more = FakeRows()
    execute_ladder(jobs_for(["lenet5"], 3, tmp_path), more, tmp_path, view)
    assert {seed for _, seed, _ in more.trained} == {43, 44}
    row = table(tmp_path)["rows"][0]
    assert row["best"]["n"] == 3
    assert row["best"]["standard_error"] > 0


def test_files_keep_the_rows_and_seeds_of_earlier_executions(tmp_path, view):
    execute_ladder(jobs_for(["lenet5"], 2, tmp_path), FakeRows(), tmp_path, view)
    execute_ladder(jobs_for(["deep"], 1, tmp_path), FakeRows(), tmp_path, view)
    ledger = execute_ladder(jobs_for(["lenet5"], 1, tmp_path), FakeRows(), tmp_path, view)
    assert [(row["name"], len(row["seeds"])) for row in table(tmp_path)["rows"]] == [("lenet5", 2), ("deep", 1)]
    assert [(row.name, len(row.seeds)) for row in ledger.table()] == [("lenet5", 1)]


def test_a_run_directory_that_may_not_be_read_fails_its_row_and_the_others_go_on(tmp_path, view, monkeypatch):
    jobs, is_file = jobs_for(["lenet5"], 3, tmp_path), Path.is_file

    def refuse(path):
        if jobs[1].folder in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    execute_ladder(jobs, FakeRows(), tmp_path, view)
    first, second, third = table(tmp_path)["rows"][0]["seeds"]
    assert [seed["state"] for seed in (first, second, third)] == ["done", "failed", "done"]
    assert "seed-43: cannot be read: Permission denied" in second["message"]


def test_a_cut_row_goes_on_where_it_was(tmp_path, view):
    jobs = jobs_for(["lenet5"], 1, tmp_path)
    execute_ladder(jobs, FakeRows(), tmp_path, view)
    before = table(tmp_path)
    stop_early(RunDirectory.open(jobs[0].folder), 2)
    assert stored_state(jobs[0]) == "cut"
    rest = FakeRows()
    execute_ladder(jobs, rest, tmp_path, view)
    assert rest.trained == [("lenet5", 42, 3)]
    assert accuracies(table(tmp_path)) == accuracies(before)


@pytest.mark.parametrize("error", [RowFailed("out of memory"), UserError("no data")])
def test_a_failed_row_is_reported_and_the_rest_goes_on(tmp_path, view, error):
    rows = FakeRows(bad={"wrn-200": error})
    execute_ladder(jobs_for(SMALL, 1, tmp_path), rows, tmp_path, view)
    states = {row["name"]: (row["state"], row["message"]) for row in table(tmp_path)["rows"]}
    assert states["wrn-200"] == ("failed", str(error))
    assert states["stacking"] == ("blocked", "needs wrn-200")
    assert states["pyramid400"] == ("done", "")
    assert any("wrn-200" in text and str(error) in text for text in view.said)
    execute_ladder(jobs_for(SMALL, 1, tmp_path), FakeRows(), tmp_path, view)
    assert {row["state"] for row in table(tmp_path)["rows"]} == {"done"}


def test_a_row_that_ends_without_a_result_has_failed(tmp_path, view):
    execute_ladder(jobs_for(["lenet5"], 1, tmp_path), lambda job, deadline, progress: None, tmp_path, view)
    assert table(tmp_path)["rows"][0]["state"] == "failed"


def test_a_run_of_other_settings_is_not_taken_for_the_row(tmp_path, view):
    jobs = jobs_for(["lenet5", "deep"], 1, tmp_path)
    other = catalogue()["lenet5-kaiming"]
    RunDirectory.create(jobs[0].folder, other, {})
    execute_ladder(jobs, FakeRows(), tmp_path, view)
    rows = table(tmp_path)["rows"]
    assert rows[0]["state"] == "failed"
    assert "other settings" in rows[0]["message"]
    assert rows[1]["state"] == "done"


def test_a_changed_title_does_not_make_a_run_another(tmp_path, view):
    jobs = jobs_for(["lenet5"], 1, tmp_path)
    RunDirectory.create(jobs[0].folder, jobs[0].recipe.model_copy(update={"title": "an older title"}), {})
    assert stored_state(jobs[0]) == "cut"


def accuracies(content):
    """Return a table without what differs from run to run."""
    timeless = (
        "name",
        "state",
        "message",
        "published",
        "best",
        "last",
        "selected",
        "difference_best",
        "difference_last",
    )
    seeds = ("seed", "state", "epochs_done", "epochs", "last", "best", "selected", "complete")
    return [
        {key: row[key] for key in timeless} | {"seeds": [{key: seed[key] for key in seeds} for seed in row["seeds"]]}
        for row in content["rows"]
    ]


@pytest.mark.parametrize("luck", range(5))
def test_five_interrupts_at_random_leave_the_table_of_an_uninterrupted_execution(tmp_path, view, luck):
    rows = [*SMALL, "aug-none", "residual"]
    straight = tmp_path / "straight"
    whole = FakeRows()
    execute_ladder(jobs_for(rows, 2, straight), whole, straight, view)
    dice = random.Random(luck)
    steps = len(whole.trained) + len(jobs_for(rows, 2, straight))
    trained, out = [], tmp_path / "cut"
    for _ in range(5):
        left = [dice.randrange(1, max(2, steps // 5))]

        def cut(job, epoch, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise Interrupted("SIGINT")

        fake = FakeRows(cut)
        with pytest.raises(Interrupted):
            execute_ladder(jobs_for(rows, 2, out), fake, out, view)
        trained += fake.trained
        assert "running" not in {row["state"] for row in table(out)["rows"]}
    last = FakeRows()
    execute_ladder(jobs_for(rows, 2, out), last, out, view)
    trained += last.trained
    assert accuracies(table(out)) == accuracies(table(straight))
    assert sorted(trained) == sorted(whole.trained), "an epoch was lost or trained twice"


def test_the_deadline_ends_the_execution_and_the_rest_waits(tmp_path, view):
    def over(job, epoch):
        if job.row == "deep" and epoch == 2:
            raise OutOfTime

    jobs = jobs_for(["lenet5", "deep", "aug-none"], 1, tmp_path)
    execute_ladder(jobs, FakeRows(over), tmp_path, view)
    assert [row["state"] for row in table(tmp_path)["rows"]] == ["done", "cut", "waiting"]
    assert any("time is over" in text for text in view.said)
    rest = FakeRows()
    execute_ladder(jobs, rest, tmp_path, view)
    assert ("deep", 42, 1) not in rest.trained
    assert [row["state"] for row in table(tmp_path)["rows"]] == ["done"] * 3


def test_no_time_at_all_runs_nothing(tmp_path, view):
    rows = FakeRows()
    execute_ladder(jobs_for(["lenet5"], 1, tmp_path), rows, tmp_path, view, until_s=0.0)
    assert rows.trained == []


def test_the_running_row_shows_how_far_it_is(tmp_path, view):
    execute_ladder(jobs_for(["lenet5"], 1, tmp_path), FakeRows(), tmp_path, view)
    seen = [(rows[0].state, rows[0].message) for rows in view.tables]
    assert ("running", "epoch 2") in seen
    assert seen[-1] == ("done", "")


def test_two_ladders_in_one_folder_are_refused(tmp_path, view):
    with alone_in(tmp_path), pytest.raises(UserError, match="another `fastcifar ladder`"):
        execute_ladder(jobs_for(["lenet5"], 1, tmp_path), FakeRows(), tmp_path, view)
    assert not (tmp_path / "ladder.json").exists(), "the table is the other one's"
    execute_ladder(jobs_for(["lenet5"], 1, tmp_path), FakeRows(), tmp_path, view)
    assert table(tmp_path)["rows"][0]["state"] == "done"


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path, view):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: .*choose another --out"):
        execute_ladder(jobs_for(["lenet5"], 1, tmp_path), FakeRows(), tmp_path / "file" / "x", view)


def test_a_combination_is_a_row_like_others(tmp_path, view):
    ledger = execute_ladder(jobs_for(["ensemble-hard"], 1, tmp_path), FakeRows(), tmp_path, view)
    row = next(row for row in ledger.table() if row.name == "ensemble-hard")
    assert isinstance(catalogue()["ensemble-hard"], CombineRecipe)
    assert row.difference_best.points == pytest.approx(row.best.mean - 97.71)


def test_a_damaged_run_is_a_failed_row_not_a_crash(tmp_path, view):
    jobs = jobs_for(["lenet5", "deep"], 1, tmp_path)
    execute_ladder(jobs, FakeRows(), tmp_path, view)
    (jobs[0].folder / "summary.json").write_text("{")
    execute_ladder(jobs, FakeRows(), tmp_path, view)
    assert [row["state"] for row in table(tmp_path)["rows"]] == ["failed", "done"]


def test_notes_do_not_hide_a_result(tmp_path, view):
    jobs = jobs_for(["lenet5"], 1, tmp_path)
    execute_ladder(jobs, FakeRows(), tmp_path, view)
    ledger = Ledger(jobs)
    ledger.notes[jobs[0].folder] = Note("failed", "long ago")
    assert ledger.table()[0].state == "done"
