"""A sweep over runs without training: what it looks at, what it prunes, how it ends and how it goes on."""

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from fastcifar.config import load_recipe
from fastcifar.errors import UserError
from fastcifar.interrupt import Interrupted
from fastcifar.ladder.execute import Deadline, OutOfTime, RowFailed
from fastcifar.ladder.runner import Runner
from fastcifar.run_directory import AtWorkError, RunDirectory
from fastcifar.sweep import search
from fastcifar.sweep.search import Problem, Sweep, best_of, ended, study_errors
from fastcifar.sweep.spaces import split_settings
from tests.command import fastcifar
from tests.ladder.test_runner import wait_for
from tests.sweep.fakes import EPOCHS, FIXED, LR, FakeRuns, holdout


def sweep(out, runs, *spaces, trials=8, jobs=1, prune=False, fixed=FIXED):
    problem = Problem("smoke/lenet5", fixed, split_settings(list(spaces or (LR,)))[1])
    said = []
    found = Sweep(problem, runs, out, jobs, prune, said.append)
    found.said = said
    found.execute(trials)
    return found


def values(found):
    return {t.params["optimizer.lr"]: t.value for t in ended(found.study)}


def test_the_best_on_the_holdout_wins_though_it_is_the_worst_on_the_test_set(tmp_path):
    found = sweep(tmp_path, FakeRuns(), "optimizer.lr=[0.001, 0.01, 0.1]")
    assert values(found) == {"0.001": holdout(0.001) + EPOCHS, "0.01": 60 + EPOCHS, "0.1": holdout(0.1) + EPOCHS}
    best = load_recipe(found.write_best())
    assert best.optimizer.lr == 0.01
    assert best == RunDirectory.open(tmp_path / best_of(found.study).user_attrs["run"]).recipe


def test_every_combination_is_tried_once_where_there_are_few(tmp_path):
    runs = FakeRuns()
    found = sweep(tmp_path, runs, "optimizer.lr=[0.001, 0.01]", "train.batch_size=int(10, 12)", trials=50)
    tried = {tuple(t.params.values()) for t in ended(found.study)}
    assert tried == {(lr, size) for lr in ("0.001", "0.01") for size in (10, 11, 12)}
    assert len(runs.trained) == len(set(runs.trained)) == 6 * EPOCHS
    again = FakeRuns()
    sweep(tmp_path, again, "optimizer.lr=[0.001, 0.01]", "train.batch_size=int(10, 12)", trials=50)
    assert again.trained == []


def test_every_combination_is_tried_though_a_smaller_search_has_drawn_one_twice(tmp_path):
    grid = "optimizer.lr=[0.01, 0.02, 0.03, 0.04]"
    small = sweep(tmp_path, FakeRuns(), grid, trials=1)
    for _ in range(2):  # what the sampler may do in a search of three
        small.study.enqueue_trial(ended(small.study)[0].params)
    sweep(tmp_path, FakeRuns(), grid, trials=3)
    assert len(values(small)) == 1
    for _ in range(2):
        found = sweep(tmp_path, FakeRuns(), grid, trials=20)
        assert sorted(values(found)) == ["0.01", "0.02", "0.03", "0.04"]
        assert len(ended(found.study)) == 6


def test_a_combination_whose_trial_was_lost_in_a_kill_is_tried_again(tmp_path):
    grid = "optimizer.lr=[0.01, 0.02]"
    found = sweep(tmp_path, FakeRuns(), grid, trials=1)
    trial = found.study.ask({"optimizer.lr": optuna.distributions.CategoricalDistribution(("0.01", "0.02"))})
    found.study.tell(trial, state=optuna.trial.TrialState.FAIL)  # and not put into the queue again
    assert sorted(values(sweep(tmp_path, FakeRuns(), grid, trials=2))) == ["0.01", "0.02"]


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_study_goes_on_to_the_number_of_trials_asked_for(tmp_path, jobs):
    assert len(ended(sweep(tmp_path, FakeRuns(), trials=4, jobs=jobs).study)) == 4
    runs = FakeRuns()
    found = sweep(tmp_path, runs, trials=7, jobs=jobs)
    assert len(ended(found.study)) == 7
    assert len(runs.trained) == 3 * EPOCHS
    assert len(values(found)) == 7, "a value was drawn again"


def test_trials_run_side_by_side(tmp_path):
    together = threading.Barrier(2, timeout=300)
    sweep(tmp_path, FakeRuns(lambda job, epoch: together.wait()), trials=2, jobs=2)


def test_trials_that_are_worse_than_the_median_on_the_holdout_are_pruned(tmp_path):
    grid = "optimizer.lr=[0.01, 0.011, 0.012, 0.013, 0.014, 0.1]"
    found = sweep(tmp_path, FakeRuns(), grid, prune=True)
    states = {t.params["optimizer.lr"]: t.state.name for t in ended(found.study)}
    assert states.pop("0.1") == "PRUNED"
    assert set(states.values()) == {"COMPLETE"}
    assert [text for text in found.said if "pruned: optimizer.lr = 0.1" in text]
    assert {t.state.name for t in ended(sweep(tmp_path / "all", FakeRuns(), grid).study)} == {"COMPLETE"}


@pytest.mark.parametrize("error", [RowFailed("diverged"), UserError("diverged")])
def test_a_failed_trial_is_told_and_the_others_go_on(tmp_path, error):
    def fail(job, epoch):
        if job.row == "trial-0001":
            raise error

    found = sweep(tmp_path, FakeRuns(fail), trials=4)
    assert [t.state.name for t in ended(found.study)] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert "trial-0001: failed: diverged" in found.said


NO_SPACE = "metrics.jsonl: cannot be written: No space left on device. Free some space"
DIVERGED = "the loss was not finite at step 7 of epoch 3: lower optimizer.lr"


@pytest.mark.parametrize(
    ("reason", "grid"), [(NO_SPACE, LR), ("was killed by SIGKILL; see a.log", "optimizer.lr=[0.01, 0.02, 0.03]")]
)
def test_trials_that_a_full_disk_or_a_kill_has_failed_go_on_with_each_next_command(tmp_path, reason, grid):
    def fail(job, epoch):
        if (job.row, epoch) in (("trial-0001", 3), ("trial-0002", 1)):
            raise RowFailed(reason)

    first, second = FakeRuns(fail), FakeRuns(fail)
    assert [t.state.name for t in ended(sweep(tmp_path, first, grid, trials=3).study)] == ["COMPLETE", "FAIL", "FAIL"]
    assert len(ended(sweep(tmp_path, second, grid, trials=3).study)) == 3
    assert second.trained == [], "each failed once more, and was not tried again within the command"
    third = FakeRuns()
    found = sweep(tmp_path, third, grid, trials=3)
    assert [t.state.name for t in ended(found.study)] == ["COMPLETE"] * 3
    assert sorted(first.trained + third.trained) == [(f"trial-{n:04d}", e + 1) for n in range(3) for e in range(EPOCHS)]
    for trial in ended(found.study):
        assert trial.value == holdout(float(trial.params["optimizer.lr"])) + EPOCHS
    again = FakeRuns()
    sweep(tmp_path, again, grid, trials=3)
    assert again.trained == []


def test_a_trial_that_a_full_disk_has_failed_before_its_run_began_is_tried_again(tmp_path):
    class NoSpace(FakeRuns):
        def __call__(self, job, deadline, progress):
            if job.row == "trial-0001":
                raise UserError(NO_SPACE)
            super().__call__(job, deadline, progress)

    sweep(tmp_path, NoSpace(), trials=3)
    assert [t.state.name for t in ended(sweep(tmp_path, FakeRuns(), trials=3).study)] == ["COMPLETE"] * 3


def test_a_trial_that_fails_twice_in_the_same_way_stays_failed(tmp_path):
    attempts = []

    def fail(job, epoch):
        if (job.row, epoch) == ("trial-0001", 3):
            attempts.append(job.row)
            raise RowFailed(DIVERGED.replace("step 7", f"step {len(attempts)}"))

    for expected in (1, 2, 2, 2):
        found = sweep(tmp_path, FakeRuns(fail), trials=3)
        assert len(attempts) == expected
        assert sorted(t.state.name for t in ended(found.study)) == ["COMPLETE", "COMPLETE", "FAIL"]
    failed = next(t for t in ended(found.study) if t.state.name == "FAIL")
    assert failed.user_attrs["message"] == DIVERGED.replace("step 7", "step 2")


def test_first_trials_that_a_full_disk_has_failed_do_not_count_against_the_next_command(tmp_path):
    def fail(job, epoch):
        raise RowFailed(NO_SPACE)

    with pytest.raises(UserError, match="the first 3 trials failed"):
        sweep(tmp_path, FakeRuns(fail), trials=5)

    def fail_once(job, epoch):
        if job.row == "trial-0000":
            raise RowFailed(DIVERGED)

    found = sweep(tmp_path, FakeRuns(fail_once), trials=5)
    assert sorted(t.state.name for t in ended(found.study)) == ["COMPLETE"] * 4 + ["FAIL"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_where_no_trial_gets_anywhere_the_sweep_ends_with_the_reason(tmp_path, jobs):
    def fail(job, epoch):
        raise RowFailed("no data here")

    with pytest.raises(UserError, match=r"first \d trials failed; .*no data here"):
        sweep(tmp_path, FakeRuns(fail), trials=50, jobs=jobs)
    assert len(list(tmp_path.glob("trial-*"))) <= 4


@pytest.mark.parametrize("jobs", [1, 3])
def test_interrupts_lose_no_epoch_and_no_trial(tmp_path, seed, jobs):
    dice, trained, lock = random.Random(seed), [], threading.Lock()
    for _ in range(3):
        left = [dice.randrange(1, 10)]

        def cut(job, epoch, left=left):
            with lock:
                left[0] -= 1
            if left[0] <= 0:
                raise Interrupted("SIGINT")

        runs = FakeRuns(cut)
        with pytest.raises(Interrupted):
            sweep(tmp_path, runs, trials=12, jobs=jobs)
        trained += runs.trained
    runs = FakeRuns()
    found = sweep(tmp_path, runs, trials=12, jobs=jobs)
    trained += runs.trained
    assert len(ended(found.study)) == 12
    assert len(trained) == len(set(trained)) == 12 * EPOCHS
    assert len({t.user_attrs["run"] for t in ended(found.study)}) == 12
    for trial in ended(found.study):
        assert trial.value == holdout(trial.params["optimizer.lr"]) + EPOCHS
        assert list(trial.intermediate_values) == list(range(1, EPOCHS + 1))


def test_a_run_that_another_process_keeps_locked_ends_the_sweep_and_is_no_failed_trial(tmp_path):
    def refuse(job, epoch):
        if job.row == "trial-0001":
            raise AtWorkError("process 1 is at work")

    with pytest.raises(AtWorkError):
        sweep(tmp_path, FakeRuns(refuse), trials=3)
    found = sweep(tmp_path, FakeRuns(), trials=3)
    assert [t.state.name for t in ended(found.study)] == ["COMPLETE"] * 3
    assert {"trial-0000", "trial-0001"} <= {t.user_attrs["run"] for t in ended(found.study)}


def test_an_error_in_one_place_stops_the_others_and_is_raised(tmp_path):
    class Broken(FakeRuns):
        def __call__(self, job, deadline, progress):
            if job.row == "trial-0000":
                raise ZeroDivisionError
            wait_for(lambda: deadline.over)
            raise OutOfTime

    with pytest.raises(ZeroDivisionError):
        sweep(tmp_path, Broken(), trials=2, jobs=2)
    assert len(ended(sweep(tmp_path, FakeRuns(), trials=2).study)) == 2


def test_a_trial_that_was_finished_but_not_told_is_not_trained_again(tmp_path):
    found = sweep(tmp_path, FakeRuns(), trials=1)
    trial = found.study.ask()
    job, _ = found.job(trial, [space.suggest(trial) for space in found.problem.spaces])
    FakeRuns()(job, Deadline(), lambda text: None)
    runs = FakeRuns()
    assert len(ended(sweep(tmp_path, runs, trials=2).study)) == 2
    assert runs.trained == []


@pytest.mark.parametrize(
    ("fixed", "spaces", "message"),
    [
        (["train.epochs=2"], [LR], r"add --set data\.holdout=5000"),
        (FIXED, [], "nothing to search"),
        (FIXED, ["data.holdout=[10, 20]"], "cannot search it"),
        (FIXED, ["seed=int(1, 5)"], "cannot search it"),
        (FIXED, ["optimizer.lrr=log(0.1, 1)"], 'did you mean "lr"'),
        (FIXED, ["optimizer.lr=uniform(-1, 1)"], r"optimizer\.lr"),
        (FIXED, ["train.epochs=[1, 2, \"many\"]"], r"train\.epochs"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_made(tmp_path, fixed, spaces, message):
    words = [word for setting in (*fixed, *spaces) for word in ("--set", setting)]
    done = fastcifar("sweep", "smoke/lenet5", *words, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_values_that_do_not_go_together_are_a_failed_trial(tmp_path):
    spaces = 'optimizer.name=["sgd", "adam"]', "optimizer.lr=[0.01]", "asam=[false, {rho = 0.5}]"
    found = sweep(tmp_path, FakeRuns(), *spaces)
    failed = [t for t in ended(found.study) if t.state.name != "COMPLETE"]
    assert [list(t.params.values()) for t in failed] == [['"adam"', "0.01", '{"rho" = 0.5}']]
    assert 'asam works with optimizer.name = "sgd"' in failed[0].user_attrs["message"]
    assert len(ended(found.study)) == 4


def test_a_combination_is_refused(tmp_path):
    done = fastcifar("sweep", "smoke/stacking", "--set", "combine.kind=[1]", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    sweep(tmp_path, FakeRuns(), trials=1)
    with pytest.raises(UserError, match="another recipe or other spaces"):
        sweep(tmp_path, FakeRuns(), "optimizer.lr=log(0.001, 0.2)")
    with pytest.raises(UserError, match="another recipe or other spaces"):
        sweep(tmp_path, FakeRuns(), fixed=[*FIXED, "optimizer.weight_decay=0.1"])


def identity_of(out):
    """Return the settings and spaces that a study has stored, and how to store others."""
    study = stored(out)
    content = json.loads(study.user_attrs["problem"])
    return content, lambda: study.set_user_attr("problem", json.dumps(content, sort_keys=True))


def test_a_search_from_before_recipes_had_some_key_goes_on(tmp_path):
    spaces = "optimizer.lr=[0.01, 0.02]", "asam=[false, {rho = 0.5}]", 'schedule.name=["cosine", "constant"]'
    words = {"fixed": [*FIXED, 'optimizer.name="sgd"']}
    sweep(tmp_path, FakeRuns(), *spaces, trials=1, **words)
    (settings, _), store = identity_of(tmp_path)
    del settings["train"]["grad_clip"], settings["eval"]["tta"], settings["ema"]
    store()
    assert len(ended(sweep(tmp_path, FakeRuns(), *spaces, trials=2, **words).study)) == 2
    store()
    with pytest.raises(UserError, match="another recipe or other spaces"):
        sweep(tmp_path, FakeRuns(), *spaces, fixed=[*words["fixed"], "train.grad_clip=1.0"])


def test_a_search_with_a_key_that_recipes_have_lost_is_refused(tmp_path):
    sweep(tmp_path, FakeRuns(), trials=1)
    (settings, _), store = identity_of(tmp_path)
    settings["train"]["forgotten"] = 1
    store()
    with pytest.raises(UserError, match="another recipe or other spaces"):
        sweep(tmp_path, FakeRuns())


@pytest.mark.parametrize("damage", ["cut", "no database"])
def test_a_damaged_study_is_refused(tmp_path, damage):
    sweep(tmp_path, FakeRuns(), trials=1)
    whole = (tmp_path / "study.db").read_bytes()
    (tmp_path / "study.db").write_bytes(whole[:50_000] if damage == "cut" else bytes(100) + whole[100:])
    with pytest.raises(UserError, match=r"study\.db: is damaged as a study"):
        sweep(tmp_path, FakeRuns(), trials=2)


def test_a_study_that_disagrees_with_its_best_run_is_not_believed(tmp_path):
    sweep(tmp_path, FakeRuns(), trials=1)
    with closing(sqlite3.connect(tmp_path / "study.db")) as database, database:
        database.execute("UPDATE trial_values SET value = value + 20")
    with pytest.raises(UserError, match=r"study\.db: says .* for trial-0000, which says otherwise"):
        sweep(tmp_path, FakeRuns(), trials=1).write_best()


def test_a_disk_that_the_study_cannot_be_written_to_is_one_message(tmp_path):
    (tmp_path / "study.db").mkdir()
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(UserError, match=r"study\.db: cannot be .* written as a study \(.*unable to open"):
        with study_errors(tmp_path / "study.db"):
            optuna.create_study(storage=storage)
    with pytest.raises(ZeroDivisionError), study_errors(tmp_path / "study.db"):
        _ = 1 / 0


def test_without_optuna_one_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="a sweep needs Optuna"):
        search.import_optuna()


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_trains_prints_a_table_and_its_best_recipe_runs(tmp_path, monkeypatch):
    """Real trainings, in this process."""
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.setattr(Runner, "_train_apart", lambda self, job, deadline, progress: train_and_tell(job, progress))
    words = ["sweep", "smoke/lenet5", "--set", "data.holdout=20", "--set", "optimizer.lr=[0.001, 0.01]", "--out", "out"]
    done = fastcifar(*words, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "never the test set" in done.stderr
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 2
    first = RunDirectory.open(tmp_path / found["trials"][0]["run"])
    assert first.metrics()[-1]["holdout"]["raw"]["accuracy"] == found["trials"][0]["holdout_accuracy"]
    assert found["trials"][0]["holdout_accuracy"] >= found["trials"][1]["holdout_accuracy"]
    again = fastcifar(*words, cwd=tmp_path)
    assert again.returncode == 0
    assert f"{first.summary['last']['accuracy']:.2f}%" in again.stdout
    run = fastcifar("run", "out/best.toml", "--out", "best", "--quiet", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["last"]["accuracy"] == first.summary["last"]["accuracy"]


def train_and_tell(job, progress):
    from fastcifar.ladder.runner import train_here

    train_here(job, None)
    progress("")


COMMAND = """
import sys
from fastcifar import interrupt
interrupt.install()
from fastcifar.ladder.runner import Runner
fake, command = [sys.executable, "-m", "tests.sweep.fake_trial"], Runner._command
Runner._command = lambda self, job: [*fake, *command(self, job)[1:]]
from fastcifar.cli.main import main
main()
"""


def command_with(out, *options):
    """Return the command line of a sweep in a process of its own, and its environment."""
    settings = [word for setting in (*FIXED, LR) for word in ("--set", setting)]
    command = [sys.executable, "-c", COMMAND, "sweep", "smoke/lenet5", *settings, *options, "--out", str(out)]
    return command, os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def stored(out):
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{out / 'study.db'}")


def test_one_signal_ends_all_trials_and_the_same_command_goes_on(tmp_path):
    command, environment = command_with(tmp_path, "--trials", "3", "--jobs", "2")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for(lambda: len(list(tmp_path.glob("*/metrics.jsonl"))) == 2 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "the same command goes on from here" in said
    assert "Traceback" not in said
    assert [len(RunDirectory.open(run).metrics()) for run in tmp_path.glob("trial-*")] == [1, 1]
    (tmp_path / "go").touch()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [RunDirectory.open(run).finished for run in tmp_path.glob("trial-*")] == [True] * 3
    assert len(ended(stored(tmp_path))) == 3


def test_the_trial_that_a_killed_sweep_has_left_at_work_is_waited_for(tmp_path):
    command, environment = command_with(tmp_path, "--trials", "2")
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    try:
        wait_for((tmp_path / "trial-0000" / "metrics.jsonl").exists)
        killed.kill()
        killed.wait()
        with (tmp_path / "said").open("w") as file:
            again = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment)
        wait_for(lambda: "waiting for its end" in (tmp_path / "said").read_text() or again.poll() is not None)
    finally:
        killed.kill()
        (tmp_path / "go").touch()  # the trial's process, which is in a session of its own, ends too
    assert again.wait(300) == 0, (tmp_path / "said").read_text()
    first, second = ended(stored(tmp_path))
    assert first.user_attrs["run"] == "trial-0000"
    assert [first.state.name, second.state.name] == ["COMPLETE", "COMPLETE"]
