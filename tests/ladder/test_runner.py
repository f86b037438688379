"""Rows in a process of their own: they train, stop, resume, and may crash without harm; the smoke configs run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from fastcifar.config import Recipe
from fastcifar.config.schema import UserModelConfig
from fastcifar.data import store
from fastcifar.ladder import rows, runner
from fastcifar.ladder.execute import Deadline, LadderExecution, OutOfTime, RowFailed
from fastcifar.ladder.rows import catalogue, choose, jobs_for
from fastcifar.ladder.runner import Runner, epochs_in_words
from fastcifar.ladder.state import Ledger, stored_state
from fastcifar.locks import locked
from fastcifar.run_directory import OWNER, RunDirectory
from tests.command import fastcifar
from tests.ladder.fakes import FakeRows, epoch_row
from tests.ladder.held import HOLD
from tests.ladder.test_execute import accuracies, table

EPOCHS, STEPS = 4, 4  # the row's process waits for the interrupt in its second or third epoch


def says(job, script):
    """Return a runner whose row processes run a script of ours in place of a training."""

    class Scripted(Runner):
        def _command(self, job):
            return [sys.executable, "-c", script]

    return Scripted(job.folder.parents[1])


@pytest.fixture
def job(tmp_path):
    return jobs_for(["lenet5"], 1, tmp_path)[0]


def test_the_last_line_of_a_failing_row_is_its_message(job):
    script = "import sys; print('something'); print('fastcifar: no data here', file=sys.stderr); sys.exit(2)"
    with pytest.raises(RowFailed, match=r"^no data here$"):
        says(job, script)(job, Deadline(), lambda text: None)


def test_a_row_that_is_killed_names_the_signal_and_its_log(job):
    script = "import os; print('a warning of long ago', flush=True); os.kill(os.getpid(), 9)"
    with pytest.raises(RowFailed, match=r"^was killed by SIGKILL; see .*lenet5-seed-42\.log$"):
        says(job, script)(job, Deadline(), lambda text: None)


def test_a_row_that_fails_silently_names_its_log(job):
    with pytest.raises(RowFailed, match=r"status 3; see .*lenet5-seed-42\.log"):
        says(job, "raise SystemExit(3)")(job, Deadline(), lambda text: None)


def test_a_row_whose_log_is_removed_meanwhile_fails_with_its_status(job):
    log = job.folder.parents[1] / "logs" / "lenet5-seed-42.log"
    with pytest.raises(RowFailed, match="status 3"):
        says(job, f"print('x', flush=True); import os; os.remove({str(log)!r}); raise SystemExit(3)")(
            job, Deadline(), lambda text: None
        )


def test_a_log_that_cannot_be_written_fails_its_row_alone(tmp_path, view, monkeypatch):
    monkeypatch.setattr(rows, "cost", lambda recipe: 0)  # it orders rows, and needs torch
    jobs = jobs_for(["lenet5"], 2, tmp_path)
    (tmp_path / "logs" / "lenet5-seed-42.log").mkdir(parents=True)  # such a file can nobody write, root neither
    ledger = Ledger(jobs)
    LadderExecution(ledger, says(jobs[0], "raise SystemExit('went on')"), tmp_path, view).execute()
    (row,) = ledger.table()
    blocked, other = (seed["message"] for seed in row.seeds)
    assert blocked.startswith(f"{tmp_path}/logs/lenet5-seed-42.log: cannot be written: Is a directory")
    assert other == "went on"


def at_work(folder, process="1"):
    """Hold a run's lock as another process does, until the stack that is returned is closed."""
    stack = ExitStack()
    stack.enter_context(locked(folder / ".lock"))
    (folder / OWNER).write_text(process)
    return stack


@pytest.mark.parametrize("finished", [False, True])
def test_a_process_of_an_earlier_start_is_waited_for(job, finished, capsys):
    RunDirectory.create(job.folder, job.recipe, {"hardware": "none", "git": "0000000000"})
    other, texts = at_work(job.folder), []

    def end(text):
        texts.append(text)
        other.close()
        if finished:
            FakeRows()(job, None, lambda text: None)

    scripted = says(job, "raise SystemExit(3)")
    if finished:
        scripted(job, Deadline(), end)
    else:
        with pytest.raises(RowFailed, match="status 3"):
            scripted(job, Deadline(), end)
    assert texts[0] == "seed 42, epoch 0/20"
    assert "process 1, of an earlier start, is at work on this run; waiting for its end" in capsys.readouterr().err


def test_a_wait_for_another_process_ends_at_the_deadline(job):
    RunDirectory.create(job.folder, job.recipe, {})
    with at_work(job.folder), pytest.raises(OutOfTime):
        says(job, "raise SystemExit(3)")(job, Deadline.after(0.0), lambda text: None)


def test_a_lock_that_another_process_takes_first_is_no_failed_row(job, monkeypatch):
    """A process left behind takes the lock, and makes the run, only when it has imported torch."""
    job.folder.mkdir(parents=True)
    others = []

    class Late(Runner):
        def _command(self, job):
            if not others:
                others.append(at_work(job.folder))
                return [sys.executable, "-c", "raise SystemExit(1)"]
            return [sys.executable, "-c", "raise SystemExit(3)"]

    monkeypatch.setattr(runner, "wait_for_worker", lambda *ignored: [other.close() for other in others])
    with pytest.raises(RowFailed, match="status 3"):
        Late(job.folder.parents[1])(job, Deadline(), lambda text: None)


def test_the_deadline_stops_the_row_and_what_it_started(job, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    mark = tmp_path / "grandchild"
    script = f"""import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
sleep = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", sleep])
open({str(mark)!r}, "w").write(f"{{child.pid}}.")
time.sleep(600)"""
    deadline = Deadline()

    def end_it() -> None:
        wait_for(lambda: mark.exists() and mark.read_text().endswith("."))
        deadline.end_now()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(end_it)
        with pytest.raises(OutOfTime):
            says(job, script)(job, deadline, lambda text: None)
    # SIGKILL is sent by then; the kernel takes a moment to execute it.
    wait_for(lambda: not alive(int(mark.read_text().rstrip("."))), 60.0)


def alive(pid):
    """Return whether a process runs; a zombie that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone before the file was opened, or before it was read
        return False
    return state not in "ZX"


def test_progress_names_the_epochs_and_the_accuracy(job):
    run = RunDirectory.create(job.folder, job.recipe, {})
    assert epochs_in_words(job) == "seed 42, epoch 0/20"
    run.append_epoch(epoch_row(1, {kind: {"accuracy": a, "loss": 1.0} for kind, a in (("raw", 41.0), ("ema", 42.5))}))
    assert epochs_in_words(job) == "seed 42, epoch 1/20, 42.50%"


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_row_without_data_fails_with_status_1_and_the_reason(tmp_path, no_data):
    (tmp_path / "empty").mkdir()
    done = fastcifar("ladder", "--only", "smoke/lenet5", "--out", "out", "--data", "empty", cwd=tmp_path)
    assert done.returncode == 1
    assert "failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert {row["state"] for row in table(tmp_path / "out")["rows"]} == {"failed"}


@pytest.mark.parametrize("until", ["soon", "2x", "-3h", "0s", "h"])
def test_a_bad_duration_is_a_user_error(tmp_path, until):
    done = fastcifar("ladder", "--only", "smoke/lenet5*", "--out", "out", f"--until={until}", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not a duration" in done.stderr


def test_durations():
    from fastcifar.cli.ladder import seconds

    texts = ["90s", "30m", "30min", "2h", "1h30m", "1.5h", "1d"]
    assert [seconds(text) for text in texts] == [90, 1800, 1800, 7200, 5400, 5400, 86400]


@pytest.mark.timeout(1200)
def test_a_row_cut_in_its_process_ends_as_the_undisturbed_one_and_is_then_skipped(
    tmp_path, no_data, view, monkeypatch, seed
):
    """Interrupt the ladder while its row's process trains; the second execution finishes to the same accuracies.

    Once, because each start imports torch; five interrupts of rows without training are in test_execute.py.
    """
    name = "smoke/lenet5"
    recipe = catalogue()[name]
    train, model = recipe.train.model_copy(update={"epochs": EPOCHS}), UserModelConfig(name="tests.ladder.held:Held")
    longer = recipe.model_copy(update={"train": train, "model": model})
    monkeypatch.setitem(catalogue(), name, longer)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    ledger = Ledger(jobs_for([name], 1, straight))
    LadderExecution(ledger, Runner(straight, same_process=True), straight, view).execute()
    command = [sys.executable, "-c", LONGER, name, str(cut)]
    metrics, hold = cut / name / "seed-42" / "metrics.jsonl", tmp_path / "hold"
    hold.write_text(f"{random.Random(seed).randrange(2 * STEPS + 1, 3 * STEPS + 1)}")  # warming up counts as well
    environment = os.environ | {HOLD: str(hold), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    wait_for(lambda: lines(metrics) >= 1 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    words = ["ladder", "--only", name, "--out", str(cut), "--json"]
    first = fastcifar(*words, cwd=tmp_path)  # in this process, where the catalogue has the longer recipe too
    assert first.returncode == 0, first.stderr
    assert f"{name}, seed 42: done" in first.stderr
    assert accuracies(table(cut)) == accuracies(table(straight))
    assert epochs_of(cut / name / "seed-42") == list(range(1, EPOCHS + 1))
    assert "1 of 1 rows are done" in (cut / "ladder.html").read_text()
    again = fastcifar(*words, cwd=tmp_path)
    assert again.stdout == first.stdout
    assert "seed 42: done" not in again.stderr


LONGER = f"""
import sys
from pathlib import Path
from fastcifar.ladder import rows
from fastcifar.ladder.rows import catalogue
from fastcifar.config.schema import UserModelConfig
rows.cost = lambda recipe: 0  # it orders rows, and needs torch
name, out = sys.argv[1:]
recipe = catalogue()[name]
train, model = recipe.train.model_copy(update={{"epochs": {EPOCHS}}}), UserModelConfig(name="tests.ladder.held:Held")
catalogue()[name] = recipe.model_copy(update={{"train": train, "model": model}})
sys.argv = ["fastcifar", "ladder", "--only", name, "--out", out]
from fastcifar.cli.main import main
main()
"""


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def epochs_of(folder):
    return [row["epoch"] for row in RunDirectory.open(folder).metrics()]


def wait_for(happened, limit_s=300.0):
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


FEWER = {"data": {"subset": 10, "test_subset": 10}, "train": {"batch_size": 5}}


@pytest.mark.timeout(900)
def test_all_smoke_configs_run_from_end_to_end(tmp_path, view, monkeypatch):
    """With the real data where FASTCIFAR_DATA names it, else with synthetic images; two steps of each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "_check_hash", cache(store._check_hash))  # all rows read the same files
    for name in choose(["smoke/*"]):
        if isinstance(recipe := catalogue()[name], Recipe):
            smaller = {part: getattr(recipe, part).model_copy(update=change) for part, change in FEWER.items()}
            monkeypatch.setitem(catalogue(), name, recipe.model_copy(update=smaller))
    jobs = jobs_for(choose(["smoke/*"]), 1, tmp_path)
    assert len(jobs) == 36
    ledger = Ledger(jobs)
    LadderExecution(ledger, Runner(tmp_path, same_process=True), tmp_path, view).execute()
    assert {row.name: row.message for row in ledger.table() if row.state != "done"} == {}
    for job in jobs:
        assert stored_state(job) == "done"
        assert RunDirectory.open(job.folder).logits_keys()
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    assert os.path.getsize(tmp_path / "ladder.html") > 1000
