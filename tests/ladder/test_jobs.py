"""Rows side by side: the order, the table, failures, one Ctrl-C for all, and how the machine is divided."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastcifar.interrupt import Interrupted
from fastcifar.ladder import places
from fastcifar.ladder.execute import LadderExecution, OutOfTime, RowFailed
from fastcifar.ladder.places import Places, gpus, shares
from fastcifar.ladder.rows import jobs_for
from fastcifar.ladder.state import Ledger
from fastcifar.run_directory import RunDirectory
from tests.command import fastcifar
from tests.ladder.fakes import FakeRows
from tests.ladder.test_execute import SMALL, accuracies, table
from tests.ladder.test_runner import wait_for

WAIT_S = 300.0


def execute_ladder(jobs, rows, out, view, side_by_side):
    ledger = Ledger(jobs)
    LadderExecution(ledger, rows, out, view, jobs=side_by_side).execute()
    return ledger


@pytest.mark.parametrize("side_by_side", [2, 50])
def test_the_table_is_the_one_of_rows_after_one_another(tmp_path, view, side_by_side):
    rows = [*SMALL, "aug-none", "ensemble-hard"]
    execute_ladder(jobs_for(rows, 2, tmp_path / "one"), FakeRows(), tmp_path / "one", view, 1)
    ended, lock = set(), threading.Lock()

    def members_first(job, epoch):
        with lock:
            assert set(job.members.values()) <= ended

    class Remembering(FakeRows):
        def __call__(self, job, deadline, progress):
            super().__call__(job, deadline, progress)
            with lock:
                ended.add(job.folder)

    fake = Remembering(members_first)
    execute_ladder(jobs_for(rows, 2, tmp_path / "many"), fake, tmp_path / "many", view, side_by_side)
    assert len(fake.trained) == len(set(fake.trained))
    assert accuracies(table(tmp_path / "many")) == accuracies(table(tmp_path / "one"))


def test_rows_run_at_the_same_time_and_the_table_shows_them_all(tmp_path, view):
    together = threading.Barrier(2, timeout=WAIT_S)  # of rows after one another the first would wait in vain

    def meet(job, epoch):
        if epoch == 2:
            together.wait()

    execute_ladder(jobs_for(["lenet5"], 2, tmp_path), FakeRows(meet), tmp_path, view, 2)
    assert any(rows[0].message == "epoch 1; epoch 1" for rows in view.tables)
    assert table(tmp_path)["rows"][0]["best"]["n"] == 2


def test_no_more_rows_than_places_run_at_the_same_time(tmp_path, view):
    running, most, lock = set(), [0], threading.Lock()

    class Counting(FakeRows):
        def __call__(self, job, deadline, progress):
            with lock:
                running.add(job.folder)
                most[0] = max(most[0], len(running))
            super().__call__(job, deadline, progress)
            with lock:
                running.remove(job.folder)

    execute_ladder(jobs_for(["lenet5", "deep"], 4, tmp_path), Counting(), tmp_path, view, 3)
    assert most[0] <= 3


def test_a_failed_row_is_reported_and_the_others_go_on(tmp_path, view):
    rows = FakeRows(bad={"wrn-200": RowFailed("out of memory")})
    execute_ladder(jobs_for(SMALL, 2, tmp_path), rows, tmp_path, view, 3)
    states = {row["name"]: (row["state"], row["message"]) for row in table(tmp_path)["rows"]}
    assert states.pop("wrn-200") == ("failed", "out of memory")
    assert states.pop("stacking") == states.pop("ensemble-soft") == ("blocked", "needs wrn-200")
    assert set(states.values()) == {("done", "")}


@pytest.mark.parametrize("error", [OutOfTime, ZeroDivisionError, lambda: Interrupted("SIGINT")])
def test_what_ends_one_place_ends_the_others_at_the_deadline_that_they_share(tmp_path, view, error):
    others = threading.Barrier(2, timeout=WAIT_S)

    def rows(job, deadline, progress):
        others.wait()
        if job.seed == 42:
            raise error()
        wait_for(lambda: deadline.over, WAIT_S)
        raise OutOfTime

    raised = error()
    jobs = jobs_for(["lenet5"], 3, tmp_path)
    if isinstance(raised, OutOfTime):
        execute_ladder(jobs, rows, tmp_path, view, 2)
    else:
        with pytest.raises(type(raised)):
            execute_ladder(jobs, rows, tmp_path, view, 2)
    assert [seed["state"] for seed in table(tmp_path)["rows"][0]["seeds"]] == ["waiting"] * 3


def test_interrupts_at_random_leave_the_table_of_an_uninterrupted_execution(tmp_path, view, seed):
    straight, out = tmp_path / "straight", tmp_path / "cut"
    execute_ladder(jobs_for(SMALL, 2, straight), FakeRows(), straight, view, 1)
    dice, trained, lock = random.Random(seed), [], threading.Lock()
    for _ in range(3):
        left = [dice.randrange(1, 12)]

        def cut(job, epoch, left=left):
            with lock:
                left[0] -= 1
            if left[0] <= 0:  # as a signal does: every place stops
                raise Interrupted("SIGINT")

        fake = FakeRows(cut)
        with pytest.raises(Interrupted):
            execute_ladder(jobs_for(SMALL, 2, out), fake, out, view, 3)
        trained += fake.trained
        assert "running" not in {row["state"] for row in table(out)["rows"]}
    last = FakeRows()
    execute_ladder(jobs_for(SMALL, 2, out), last, out, view, 3)
    assert accuracies(table(out)) == accuracies(table(straight))
    assert len(trained + last.trained) == len(set(trained + last.trained)), "an epoch was trained twice"


# ------------------------------------------------------------------------------------------------- a machine divided


@pytest.fixture
def machine(monkeypatch):
    """Let the machine have so many cores and GPUs."""

    def have(cores, gpu_lines):
        for name in (*places.THREAD_VARIABLES, "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(places, "usable_cores", lambda: cores)
        monkeypatch.setattr(places, "NVIDIA_SMI", (sys.executable, "-c", f"print({gpu_lines!r})"))

    return have


def test_threads_are_divided_and_gpus_taken_in_turn(machine):
    machine(16, "GPU-a\nGPU-b")
    assert shares(1) == [{}]
    given = shares(3)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in given] == ["GPU-a", "GPU-b", "GPU-a"]
    assert {share[name] for share in given for name in places.THREAD_VARIABLES} == {"5"}
    assert shares(40)[0]["OMP_NUM_THREADS"] == "1"


def test_one_gpu_is_shared_and_numbers_that_the_user_has_set_stay(machine, monkeypatch):
    machine(8, "GPU-a")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert all("CUDA_VISIBLE_DEVICES" not in share and "OMP_NUM_THREADS" not in share for share in shares(2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(2)] == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []


@pytest.mark.parametrize("command", [("/no/such/program",), (sys.executable, "-c", "import sys; sys.exit(9)")])
def test_without_a_driver_there_are_no_gpus(machine, monkeypatch, command):
    machine(8, "")
    monkeypatch.setattr(places, "NVIDIA_SMI", command)
    assert gpus() == []


def test_a_place_is_given_back_however_a_run_ends(machine):
    machine(2, "GPU-a\nGPU-b")
    shared = Places(2)
    for _ in range(3):
        with pytest.raises(RowFailed), shared.place():
            raise RowFailed
    with shared.place() as first, shared.place() as second:
        assert {share["CUDA_VISIBLE_DEVICES"] for share in (first, second)} == {"GPU-a", "GPU-b"}


def test_jobs_in_one_process_are_refused(tmp_path):
    done = fastcifar("ladder", "--only", "smoke/lenet5", "--jobs", "2", "--same-process", cwd=tmp_path)
    assert done.returncode == 2
    assert "--same-process" in done.stderr


# --------------------------------------------------------------------------------------------------------- the signal

COMMAND = """
import sys
from fastcifar import interrupt
interrupt.install()
from fastcifar.ladder import rows
from fastcifar.ladder.runner import Runner
rows.cost = lambda recipe: 0  # it orders rows, and needs torch
fake_row = [sys.executable, "-m", "tests.ladder.fake_row"]
Runner._command = lambda self, job: [*fake_row, job.row, str(job.seed), sys.argv[-1]]
from fastcifar.cli.main import main
main()
"""


def test_one_signal_ends_all_rows_with_their_checkpoints_and_the_same_command_goes_on(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": "0,1"}
    environment = {k: v for k, v in environment.items() if k not in places.THREAD_VARIABLES}
    command = [sys.executable, "-c", COMMAND, "ladder", "--only", "lenet5", "--seeds", "3", "--jobs", "2", "--out"]
    process = subprocess.Popen([*command, str(tmp_path)], stderr=subprocess.PIPE, text=True, env=environment)
    runs = [tmp_path / "lenet5" / f"seed-{seed}" for seed in (42, 43, 44)]
    wait_for(lambda: all((run / "metrics.jsonl").exists() for run in runs[:2]) or process.poll() is not None, WAIT_S)
    process.send_signal(signal.SIGTERM)  # Ctrl-C is in tests/sweep
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143, said
    assert "the same command goes on from here" in said
    assert [len(RunDirectory.open(run).metrics()) for run in runs[:2]] == [1, 1]
    assert not runs[2].exists()
    given = [json.loads(path.read_text()) for path in tmp_path.glob("*.json") if path.stem.isdigit()]
    assert sorted(share["CUDA_VISIBLE_DEVICES"] for share in given) == ["0", "1"]
    assert {share["OMP_NUM_THREADS"] for share in given} == {str(max(1, places.usable_cores() // 2))}
    (tmp_path / "go").touch()
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": done") == 3
    assert table(tmp_path)["rows"][0]["best"]["n"] == 3
