"""Rows on the machines of a Ray cluster: each row and seed is a task, which Ray places by its request of CPUs and GPUs.

A run lives in the ladder's folder where the worker's machine has that folder too (a shared file system). Where it has
not, the run lives in a temporary folder there, begins with what is in the ladder's folder, and hands every change on
through Ray's object store. Either way the ladder's folder holds a whole run directory after every epoch, so that a task
whose worker or machine is lost goes on elsewhere from its last checkpoint.
"""

import os
import platform
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastcifar import manifest as manifests
from fastcifar.config import CombineRecipe, Recipe
from fastcifar.errors import UserError
from fastcifar.interrupt import Interrupted, deferred, handled, stop_if_requested
from fastcifar.ladder.execute import Deadline, OutOfTime, RowFailed
from fastcifar.ladder.places import THREAD_VARIABLES, usable_cores
from fastcifar.ladder.rows import Job
from fastcifar.ladder.runner import GRACE_S, combine, epochs_in_words, row_failures, train_here
from fastcifar.locations import install_command
from fastcifar.locks import LockedError, locked
from fastcifar.run_directory import AtWorkError, RunDirectory, refuse_disk, write_atomic
from fastcifar.track import Callback

POLL_S = 1.0
CONNECT_S = 30.0
# A row that has lost so many workers is taken for the reason: it fills a machine's memory, or crashes the process.
MOST_LOSSES = 5
# A shared file system may notice only after a while that the machine which held a run's lock is gone.
LOCK_S = 180.0
DONE, STOPPED, FAILED, LOCKED = "done", "stopped", "failed", "locked"
Worker = tuple[str, int]
"""The name of a worker's machine, and its process there."""


def import_ray() -> Any:
    """Return the package.

    Raises:
        UserError: it is not installed; the message says how to.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import: Ray reports home otherwise
    try:
        import ray
    except ImportError:
        raise UserError(f"--executor ray needs the extra `ray`: {install_command('ray')}") from None
    return ray


@contextmanager
def cluster(address: str | None, cpus: int | None = None) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine, for a ``with`` block.

    Args:
        address: of a running cluster, as ``ray start`` prints it, or ``auto``; None starts one for the block alone.
        cpus: of the one that is started; None for those that this process may use.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    ray = import_ray()
    if address:
        check_address(address)
    mine = {} if address else {"include_dashboard": False, "num_cpus": cpus or usable_cores()}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="critical", **mine)
    except Exception as error:  # Ray's errors here have no class of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--address {address or 'local'}: cannot be connected to: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Make sure that somebody answers at an address: Ray would try for minutes, and then end the process.

    Raises:
        UserError: nobody does, or it is that of Ray's client, through which the ladder's folder cannot be reached.
    """
    if "://" in address:
        raise UserError(f"--address {address}: give it as HOST:PORT or `auto`, on a machine of the cluster")
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # `auto`, which Ray looks up itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--address {address}: cannot be connected to: {error}") from None


@dataclass(frozen=True)
class Order:
    """What a task is told.

    Attributes:
        job: the row; its folder is the one in the ladder's folder.
        name: of the run within the ladder's folder, such as ``lenet5/seed-42``.
        token: a file in the ladder's folder; a machine that sees it shares the folder.
        data: where the images are, as for ``fastcifar run``.
        directory: to work in, where the worker's machine has it.
        environment: variables for the worker, where its machine does not set them itself.
    """

    job: Job
    name: str
    token: Path
    data: Path | None
    directory: Path
    environment: dict[str, str]


class RayRunner:
    """Executes jobs as Ray tasks; callable as the ladder wants it, from many threads. Use it as a context manager.

    Args:
        out: the ladder's folder.
        data: where the images are, as for ``fastcifar run``.
        cpus: that each task asks for; also its number of threads.
        gpus: that each task asks for; None for one where the cluster has any and the recipe may use it.
        shared: whether workers that have the folder ``out`` train in it; False has them all send their files.
        grows: whether the cluster may get more machines, so that a request which none can meet is worth waiting for.
    """

    def __init__(
        self, out: Path, data: Path | None = None, cpus: float = 1, gpus: float | None = None,
        shared: bool = True, grows: bool = False,
    ) -> None:
        self.out, self.data = out.absolute(), data.absolute() if data else None
        self.cpus, self.gpus = cpus, gpus
        self.shared, self.grows = shared, grows
        self.token = self.out / f".shared-{uuid.uuid4().hex}"
        self.mailbox: Any = None

    def __enter__(self) -> "RayRunner":
        if self.gpus and self.gpus > 1 and self.gpus % 1:
            raise UserError(f"--gpus {self.gpus:g}: Ray gives a part of one GPU, such as 0.5, or whole ones, such as 2")
        if not self.grows and not fits(self.cpus, self.gpus or 0):
            wanted = request(self.cpus, self.gpus or 0)
            raise UserError(f"{wanted}: no machine has so many; give smaller --cpus or --gpus")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.shared:
                self.token.touch()
        except OSError as error:
            refuse_disk(self.out, error)
        self.mailbox = mailbox_here(self.out)  # a process: none is started for a request that is refused
        return self

    def __exit__(self, *error: object) -> None:
        self.token.unlink(missing_ok=True)

    def __call__(self, job: Job, deadline: Deadline, progress: Callable[[str], None]) -> None:
        """Run, resume or combine; returns when the job is finished.

        Raises:
            RowFailed: the task ended with an error, or lost too many workers.
            AtWorkError: another process has the run's lock and keeps it.
            OutOfTime: the deadline came first.
            Interrupted: a signal came first.
            UserError: members that do not match, a full disk.
        """
        import ray

        stop_if_requested()
        if isinstance(job.recipe, CombineRecipe):
            return combine(job)
        task = self._submit(job)
        try:
            self._watch(task, job, deadline, progress)
            state, message = ray.get(task)
        except BaseException as error:
            cancel(task)
            if isinstance(error, ray.exceptions.RayError):  # the task's own, or that the mailbox's machine is gone
                raise RowFailed(in_words(error)) from None
            raise
        if state == LOCKED:
            raise AtWorkError(message)
        if state != DONE:
            raise RowFailed(message or "was stopped on its machine")

    def _submit(self, job: Job) -> Any:
        folder = job.folder.absolute()
        name = folder.relative_to(self.out).as_posix()
        environment = {k: v for k, v in os.environ.items() if k.startswith("FASTCIFAR_")}
        environment |= dict.fromkeys(THREAD_VARIABLES, str(max(1, int(self.cpus))))
        order = Order(replace(job, folder=folder, members={}), name, self.token, self.data, Path.cwd(), environment)
        # One call a process: memory on a GPU is given back, and a crash takes nothing else along.
        options = {"num_cpus": self.cpus, "num_gpus": self._gpus(job), "max_calls": 1, "max_retries": MOST_LOSSES}
        return import_ray().remote(**options)(train_row).remote(order, self.mailbox)

    def _gpus(self, job: Job) -> float:
        import ray

        if self.gpus is not None:
            return self.gpus
        assert isinstance(job.recipe, Recipe)
        return 1 if job.recipe.engine.device != "cpu" and ray.cluster_resources().get("GPU", 0) else 0

    def _watch(self, task: Any, job: Job, deadline: Deadline, progress: Callable[[str], None]) -> None:
        """Wait for a task and report its epochs.

        Raises:
            OutOfTime: the deadline came first.
            Interrupted: a signal came first.
        """
        import ray

        said = ""
        waits = f"seed {job.seed}, waits for {request(self.cpus, self._gpus(job))}"
        name = job.folder.absolute().relative_to(self.out).as_posix()
        while not ray.wait([task], timeout=POLL_S)[0]:
            stop_if_requested()
            if deadline.over:
                raise OutOfTime
            workers = ray.get(self.mailbox.workers.remote(name))
            lost = f", lost {len(workers) - 1} of its workers" if len(workers) > 1 else ""
            text = f"{epochs_in_words(job)}{lost}" if workers else waits
            if text != said:
                said = text
                progress(text)


def mailbox_here(out: Path) -> Any:
    """Start the actor of a ladder's folder, on this machine."""
    ray = import_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote(out)


def fits(cpus: float, gpus: float) -> bool:
    """Return whether a machine of the cluster has so many, busy or not."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(cpus <= machine.get("CPU", 0) and gpus <= machine.get("GPU", 0) for machine in machines)


def request(cpus: float, gpus: float) -> str:
    """Return what a task asks for in words, such as ``1 CPU and 0.5 GPUs``."""
    counts = [(cpus, "CPU"), (gpus, "GPU")]
    return " and ".join(f"{count:g} {what}{'' if count == 1 else 's'}" for count, what in counts)


def cancel(task: Any) -> None:
    """End a task: ask, which lets a training write its checkpoint, wait, then end its process."""
    import ray

    with suppress(ray.exceptions.RayError):
        ray.cancel(task)
        if not ray.wait([task], timeout=GRACE_S)[0]:
            ray.cancel(task, force=True)


def in_words(error: Exception) -> str:
    """Return the reason of a task that Ray could not bring to its end, in one line."""
    cause = getattr(error, "cause", None) or error  # of an error in the task's own code, what Ray wraps
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    kind = "" if isinstance(cause, UserError | RowFailed) else f"{type(cause).__name__}: "
    return f"{kind}{lines[0] if lines else 'no message'}"[:300]


# ----------------------------------------------------------------------------------------------- in the ladder's folder


class Mailbox:
    """An actor on the machine of the ladder's folder: knows the workers, keeps runs of machines without the folder.

    Args:
        out: the ladder's folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._workers: dict[str, list[Worker]] = {}

    def begin(self, name: str, worker: Worker) -> None:
        """Take note that a worker begins with a run, and hear no other one about it from here on."""
        self._workers.setdefault(name, []).append(worker)

    def workers(self, name: str) -> list[Worker]:
        """Return the workers that have begun with a run, in this order; all but the last are lost."""
        return self._workers.get(name, [])

    def files(self, name: str) -> dict[str, bytes]:
        """Return the files of a run by name, its manifest among them; none where there is no run yet."""
        run = RunDirectory(self.out / name)
        if not RunDirectory.exists(run.folder):
            return {}
        with run.alone():
            manifest = run.manifest()
            listed = [*(manifest.files if manifest else []), manifests.NAME, *tracked(run.folder)]
            return {file: (run.folder / file).read_bytes() for file in listed if (run.folder / file).is_file()}

    def make(self, name: str, worker: Worker, recipe: Recipe, environment: dict[str, Any]) -> None:
        """Make a run directory, as `RunDirectory.begin` does."""
        self._check(name, worker)
        RunDirectory.create(self.out / name, recipe, environment)

    def commit(
        self, name: str, worker: Worker, files: Mapping[str, bytes | str], remove: list[str], beside: dict[str, bytes]
    ) -> None:
        """Write to a run directory, as `RunDirectory.commit` does, and what its trackers keep beside the manifest."""
        self.keep(name, worker, beside)
        RunDirectory(self.out / name).commit(files, remove)

    def keep(self, name: str, worker: Worker, beside: dict[str, bytes]) -> None:
        """Write what a run's trackers keep in its directory."""
        self._check(name, worker)
        for file, data in beside.items():
            (self.out / name / file).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.out / name / file, data)

    def _check(self, name: str, worker: Worker) -> None:
        """Refuse a worker that was taken for lost, because it could not be reached, and is at work all the same."""
        if self.workers(name)[-1] != worker:
            raise RowFailed("another worker goes on with this run")


def tracked(folder: Path) -> list[str]:
    """Return the files that trackers have written into a run directory, by name; no manifest lists them."""
    found = [path for name in ("track", "tensorboard") for path in (folder / name).rglob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in found)


# ------------------------------------------------------------------------------------------------- on the worker's side


class MirroredRun(RunDirectory):
    """A run in a temporary folder that hands every change on to the ladder's folder, in order and each as a whole.

    One change may be under way while training goes on; the next waits for it.

    Args:
        folder: the temporary folder.
        mailbox: the actor of the ladder's folder.
        name: of the run there.
        worker: this one.
    """

    def __init__(self, folder: Path, mailbox: Any, name: str, worker: Worker) -> None:
        super().__init__(folder)
        self.mailbox, self.name, self.worker = mailbox, name, worker
        self._under_way: Any = None
        self._there: dict[str, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Begin with what the ladder's folder has of the run."""
        import ray

        for file, data in ray.get(self.mailbox.files.remote(self.name)).items():
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_bytes(data)

    def begin(self, recipe: Any, environment: dict[str, Any]) -> None:
        """Make the run here and there."""
        super().begin(recipe, environment)
        self._send(self.mailbox.make.remote(self.name, self.worker, recipe, environment))

    def commit(self, files: Mapping[str, bytes | str], remove: Iterable[str] = ()) -> None:
        """Write here, then there; the first files of all are `begin`'s."""
        gone = list(remove)
        super().commit(files, gone)
        if "recipe.toml" not in files:
            self._send(self.mailbox.commit.remote(self.name, self.worker, dict(files), gone, self._tracked()))

    def finish(self) -> None:
        """Hand on what trackers wrote last, and wait until the ladder's folder has everything."""
        self.flush()
        if RunDirectory.exists(self.folder):
            self.hand_on_tracked()
        self.flush()

    def hand_on_tracked(self) -> None:
        """Hand on what trackers have written since the last time, such as which epoch a program has got."""
        if changed := self._tracked():
            self._send(self.mailbox.keep.remote(self.name, self.worker, changed))

    def _tracked(self) -> dict[str, bytes]:
        """Return the trackers' files that have changed since the last call."""
        stamps = {file: (self.folder / file).stat() for file in tracked(self.folder)}
        now = {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stamps.items()}
        changed = [file for file, stamp in now.items() if self._there.get(file) != stamp]
        self._there = now
        return {file: (self.folder / file).read_bytes() for file in changed}

    def _send(self, change: Any) -> None:
        self.flush()
        self._under_way = change

    def flush(self) -> None:
        """Wait until the ladder's folder has everything.

        Raises:
            ray.exceptions.RayError: it could not be written.
        """
        import ray

        if self._under_way is not None:
            ray.get(self._under_way)
            self._under_way = None


def train_row(order: Order, mailbox: Any) -> tuple[str, str]:
    """Train or resume a row in this worker; Ray calls it again, elsewhere, when the worker is lost.

    Returns:
        How it ended, ``done``, ``stopped``, ``failed`` or ``locked`` (by another process), and why.
    """
    import ray

    os.environ.update(order.environment | os.environ)  # a machine may have its data elsewhere
    if order.directory.is_dir():
        os.chdir(order.directory)
    worker = platform.node(), os.getpid()
    ray.get(mailbox.begin.remote(order.name, worker))
    try:
        with handled("stopped"), deferred():
            if order.token.exists():
                wait_for_lock(order.job.folder)
                train_here(order.job, order.data)
            else:
                train_mirrored(order, mailbox, worker)
    except AtWorkError as error:
        return LOCKED, in_words(error)
    except (RowFailed, UserError, ray.exceptions.RayError) as error:
        return FAILED, in_words(error)
    except Interrupted:
        return STOPPED, ""
    return DONE, ""


def wait_for_lock(folder: Path) -> None:
    """Wait until the process that trained the run before this one, on a machine that is lost, has lost its lock too."""
    end = time.monotonic() + LOCK_S
    while RunDirectory.exists(folder) and time.monotonic() < end:
        try:
            with locked(folder / ".lock"):
                return
        except LockedError:
            time.sleep(POLL_S)


class HandsOn(Callback):
    """Comes after a run's trackers: a worker that takes over is not to tell a program of an epoch that it has got."""

    def on_epoch_end(self, run: RunDirectory, row: dict[str, Any]) -> None:
        """Hand on what the trackers have written about this epoch, which `MirroredRun.commit` came too early for."""
        if isinstance(run, MirroredRun):
            run.hand_on_tracked()


def train_mirrored(order: Order, mailbox: Any, worker: Worker) -> None:
    """Train in a temporary folder.

    Raises:
        RowFailed, UserError, Interrupted: as `train_here` does.
    """
    from fastcifar.open_run import environment_of
    from fastcifar.train.run import train

    assert isinstance(order.job.recipe, Recipe)
    with tempfile.TemporaryDirectory(prefix="fastcifar-") as folder:
        # Its own name, for trackers show it.
        run = MirroredRun(Path(folder) / order.name.replace("/", "-"), mailbox, order.name, worker)
        run.folder.mkdir()
        run.fetch()
        begun, environment = RunDirectory.exists(run.folder), environment_of(order.job.recipe)
        with run.alone(), row_failures():
            try:
                if not begun:
                    run.begin(order.job.recipe, environment)
                train(order.job.recipe, run, data=order.data, quiet=True, callbacks=[HandsOn()])
            finally:
                run.finish()
