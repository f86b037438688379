"""Rows as tasks of a Ray cluster on this machine: a worker is killed midway, and the table is the local ladder's."""

import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fastcifar.config.schema import UserModelConfig
from fastcifar.errors import UserError
from fastcifar.ladder import ray_runner
from fastcifar.ladder.execute import Deadline, LadderExecution, OutOfTime, RowFailed
from fastcifar.ladder.ray_runner import HandsOn, Mailbox, MirroredRun, Order, RayRunner, cluster, train_row
from fastcifar.ladder.rows import jobs_for
from fastcifar.ladder.runner import Runner
from fastcifar.ladder.state import DONE, Ledger, stored_state
from fastcifar.locks import locked
from fastcifar.run_directory import RunDirectory
from tests.command import fastcifar
from tests.ladder.fakes import Quiet
from tests.ladder.held import HOLD
from tests.ladder.test_execute import accuracies, table

EPOCHS, STEPS = 8, 4  # long before the last epoch, every worker waits until the test lets it go on
# Ray gives its own processes 30 s to start; a busy machine may need several goes.
STARTS = 5


@pytest.fixture(scope="module")
def ray():
    """Ray with two workers."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_runner, "POLL_S", 0.05)
        # Ray starts its workers at nice 15: beside busy programs they would have a thirtieth of a core, and tests hang.
        patch.setenv("RAY_worker_niceness", "0")
        for left in reversed(range(STARTS)):
            block = cluster(None, cpus=2)
            try:
                block.__enter__()
                break
            except UserError:
                ray.shutdown()
                if not left:
                    raise
        yield ray
        block.__exit__(None, None, None)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The run directories and the table of the same ladder in this process."""
    out = tmp_path_factory.mktemp("local")
    execute_ladder(out, Runner(out, same_process=True), 1)
    return out


def small_jobs(out):
    """Two seeds of a training of synthetic images, whose workers `hold` holds; the real ones take a second to read."""
    jobs = jobs_for(["smoke/lenet5"], 2, out)
    changes = {"train": {"epochs": EPOCHS}, "data": {"source": "synthetic"}}
    parts = {part: getattr(jobs[0].recipe, part).model_copy(update=change) for part, change in changes.items()}
    parts["model"] = UserModelConfig(name="tests.ladder.held:Held")
    return [replace(job, recipe=job.recipe.model_copy(update=parts)) for job in jobs]


@pytest.fixture
def hold(tmp_path_factory, monkeypatch, rng):
    """A file that holds every worker at a random step of its third epoch's worth of steps, while it is there.

    Not of its second: the steps that warm a process up are counted, and one epoch at least must be recorded by then.
    """
    file = tmp_path_factory.mktemp("hold") / "step"
    file.write_text(f"{rng.integers(2 * STEPS + 1, 3 * STEPS + 1)}")
    monkeypatch.setenv(HOLD, str(file))
    return file


def execute_ladder(out, runner, side_by_side):
    LadderExecution(Ledger(small_jobs(out)), runner, out, Quiet(), jobs=side_by_side).execute()


def without_clocks(out, seed):
    run = RunDirectory.open(out / "smoke" / "lenet5" / f"seed-{seed}")
    clocks = ("seconds", "training_s", "images_per_s")
    return [{k: v for k, v in row.items() if k not in clocks} for row in run.metrics()]


class Killing:
    """Executes as the runner does, but kills the first worker of the first seed midway, beyond ``begun`` epochs.

    All workers are held until the ladder has said that one is lost.
    """

    def __init__(self, ray, runner, hold, begun=0):
        self.ray, self.runner, self.hold, self.begun, self.killed, self.texts = ray, runner, hold, begun, [], []

    def __call__(self, job, deadline, progress):
        def kill(text):
            self.texts.append(text)
            done = len(RunDirectory(job.folder).metrics())
            if job.seed == 42 and not self.killed and done > self.begun:
                assert done < EPOCHS
                name = job.folder.relative_to(self.runner.out).as_posix()
                ((_, process),) = self.ray.get(self.runner.mailbox.workers.remote(name))
                self.killed.append(process)
                os.kill(process, signal.SIGKILL)
            if "lost 1 of its workers" in text:
                self.hold.unlink(missing_ok=True)  # it says so after every epoch
            progress(text)

        self.runner(job, deadline, kill)


def check_ladder(killing, out, local):
    """Execute the ladder; its worker is killed midway, and what is there then equals the local one."""
    execute_ladder(out, killing, 2)
    assert killing.killed
    assert [text for text in killing.texts if "lost 1 of its workers" in text]
    assert accuracies(table(out)) == accuracies(table(local))
    for job in small_jobs(out):
        assert stored_state(job) == DONE
        assert without_clocks(out, job.seed) == without_clocks(local, job.seed)


def test_a_ladder_whose_worker_is_killed_midway_equals_the_local_one_in_a_shared_folder(tmp_path, ray, local, hold):
    with RayRunner(tmp_path, shared=True) as runner:
        check_ladder(Killing(ray, runner, hold), tmp_path, local)
    assert not list(tmp_path.glob(".shared-*"))


def test_so_it_does_through_the_object_store_after_the_deadline_stopped_a_worker_with_its_checkpoint(
    tmp_path, ray, local, hold
):
    job, deadline = small_jobs(tmp_path)[0], Deadline()

    def end_soon(text):
        if RunDirectory(job.folder).metrics():
            deadline.end_now()

    with RayRunner(tmp_path, shared=False) as runner, pytest.raises(OutOfTime):
        runner(job, deadline, end_soon)
    done = len(RunDirectory(job.folder).metrics())
    assert 1 <= done < EPOCHS
    with RayRunner(tmp_path, shared=False) as runner:
        check_ladder(Killing(ray, runner, hold, done), tmp_path, local)
    assert not list(tmp_path.glob(".shared-*"))


def test_what_fails_in_a_worker_is_the_rows_message(tmp_path, ray):
    job, data = jobs_for(["smoke/lenet5"], 1, tmp_path)[0], tmp_path / "nothing"
    with RayRunner(tmp_path, data) as runner, pytest.raises(RowFailed, match=f"^{data} .*: no such file"):
        runner(job, Deadline(), lambda text: None)


def test_a_row_fails_with_one_message_where_the_ladders_own_actor_is_gone(tmp_path, ray):
    (job,) = small_jobs(tmp_path)[:1]
    with RayRunner(tmp_path) as runner:
        ray.kill(runner.mailbox)
        with pytest.raises(RowFailed, match="actor"):
            runner(job, Deadline(None), lambda text: None)


def test_a_request_that_no_machine_can_meet_is_refused(tmp_path, ray):
    runner = RayRunner(tmp_path, None, 3, 0.5)
    with pytest.raises(UserError, match=r"^3 CPUs and 0\.5 GPUs: no machine has so many"), runner:
        pass


def test_parts_of_more_than_one_gpu_are_refused_for_ray_does_so_later(tmp_path, ray):
    with pytest.raises(ValueError, match="whole number"):  # else ours is not needed any more
        ray.remote(num_gpus=1.5)(small_jobs).remote(tmp_path)
    runner = RayRunner(tmp_path, None, 1, 1.5, grows=True)
    with pytest.raises(UserError, match=r"^--gpus 1\.5: .* such as 0\.5, or whole ones, such as 2$"), runner:
        pass


def test_a_worker_that_was_taken_for_lost_changes_nothing_any_more(tmp_path):
    mailbox, job = Mailbox(tmp_path), small_jobs(tmp_path)[0]
    name = job.folder.relative_to(tmp_path).as_posix()
    mailbox.begin(name, ("first", 1))
    mailbox.make(name, ("first", 1), job.recipe, {"hardware": "none", "git": "0000000000"})
    mailbox.begin(name, ("second", 1))
    with pytest.raises(RowFailed, match="another worker"):
        mailbox.commit(name, ("first", 1), {"metrics.jsonl": "old"}, [], {})
    mailbox.commit(name, ("second", 1), {"metrics.jsonl": "new"}, [], {"track/wandb.json": b"{}"})
    files = mailbox.files(name)
    assert files["metrics.jsonl"] == b"new"
    found = {"recipe.toml", "environment.json", "metrics.jsonl", "manifest.json", "track/wandb.json"}
    assert set(files) == found


class Here:
    """Stands for an actor of Ray: calls in this process."""

    def __init__(self, of):
        self._of = of

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._of, name))


def test_what_trackers_keep_goes_where_the_run_goes(tmp_path, monkeypatch):
    """A worker that does not see the ladder's folder trains in a temporary one."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value))
    mailbox, job, worker = Mailbox(tmp_path), small_jobs(tmp_path)[0], ("a", 1)
    name = job.folder.relative_to(tmp_path).as_posix()
    mailbox.begin(name, worker)
    run = MirroredRun(tmp_path / "elsewhere", Here(mailbox), name, worker)
    run.folder.mkdir()
    with run.alone():
        run.begin(job.recipe, {"hardware": "none", "git": "0000000000"})
        (run.folder / "tensorboard").mkdir()
        (run.folder / "tensorboard" / "events").write_bytes(b"one")
        run.commit({"metrics.jsonl": "{}"})
        assert (job.folder / "tensorboard" / "events").read_bytes() == b"one"
        (run.folder / "tensorboard" / "events").write_bytes(b"one and two")
        HandsOn().on_epoch_end(run, {})  # the trackers have got the epoch; the next one may never end
        assert (job.folder / "tensorboard" / "events").read_bytes() == b"one and two"
        (run.folder / "tensorboard" / "events").write_bytes(b"one and two, closed")
        run.finish()
    assert (job.folder / "tensorboard" / "events").read_bytes() == b"one and two, closed"
    again = MirroredRun(tmp_path / "third", Here(mailbox), name, worker)
    again.folder.mkdir()
    again.fetch()
    assert (again.folder / "tensorboard" / "events").read_bytes() == b"one and two, closed"


def test_a_lock_that_another_process_keeps_is_no_failure_of_the_run(tmp_path, monkeypatch):
    errors = SimpleNamespace(RayError=ZeroDivisionError)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value, exceptions=errors))
    monkeypatch.setattr(ray_runner, "LOCK_S", 0.0)
    job, token = small_jobs(tmp_path)[0], tmp_path / "token"
    RunDirectory.create(job.folder, job.recipe, {"hardware": "none", "git": "0000000000"})
    token.touch()
    order = Order(job, job.folder.relative_to(tmp_path).as_posix(), token, None, tmp_path / "none", {})
    with locked(job.folder / ".lock"):
        state, message = train_row(order, Here(Mailbox(tmp_path)))
    assert state == ray_runner.LOCKED
    assert "is at work on this run" in message


# --------------------------------------------------------------------------------------------------- the command line


def test_without_ray_one_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = fastcifar("ladder", "--only", "smoke/lenet5", "--executor", "ray", cwd=tmp_path)
    assert done.returncode == 2
    assert "--executor ray needs the extra `ray`: " in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "1"), "add --executor ray"),
        (("--address", "10.0.0.1:6379"), "add --executor ray"),
        (("--executor", "ray", "--same-process"), "--same-process"),
        (("--executor", "ray", "--address", "ray://10.0.0.1:6379"), "give it as HOST:PORT"),
        (("--executor", "ray", "--address", "127.0.0.1:1"), "127.0.0.1:1: cannot be connected to"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, words, message):
    if "--address" in words and "ray" in words:
        pytest.importorskip("ray", reason="ray is not installed")
    done = fastcifar("ladder", "--only", "smoke/lenet5", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
