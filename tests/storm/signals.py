"""SIGINT, SIGTERM and SIGHUP at every file operation, twice, to workers, at compilation, and during the imports.

A process that is asked to stop says so, ends with 128 + the signal's number and without a traceback, and the next
start goes on to the same bits. Only while Python itself starts, before the first line of fastcifar, it may die plainly.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.command import signals_heard
from tests.storm import file_operations, training
from tests.storm.fork_server import FAR_LIMIT_S, Ended, Server, server
from tests.storm.tally import Tally

COUNT = 12
"""How many of each kind that is not at every operation."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WORKERS = ("--set", "data.loader.name=torchvision", "--set", "data.loader.workers=2")
COMPILED = ("--set", "engine.mode=compile", "--set", 'model={name="lenet5"}', "--set", "train.batch_size=20")
MAIN = re.compile(r"fastcifar/(__pycache__/)?__main__\.")
INTERRUPT = re.compile(r"fastcifar/(__pycache__/)?interrupt\.")
COMMANDS = re.compile(r"fastcifar/cli/(__pycache__/)?main\.")


def storm(tally: Tally, seed: int, count: int) -> None:
    """Send every signal at every file operation of a run, and ``count`` of each other kind."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fastcifar-storm-") as scratch:
        folder = Path(scratch)
        training.prepare(folder)
        with server(*training.WARM_UP, "warm", cwd=folder) as forks:
            every_operation(tally, forks, folder)
            twice(tally, forks, folder, chance, 3 * count)
            some_operations(tally, forks, folder, chance, count, "workers", WORKERS)
        compilation(tally, folder, chance, count)
        numba_compilation(tally, folder, chance, count)
        imports(tally, folder, chance, 2 * count)


# ------------------------------------------------------------------------------------------------- in forked processes


def judge(tally: Tally, ended: Ended, numbers: tuple[int, ...]) -> None:
    """Check how a process ended that was sent these signals."""
    ended.must_be(*(128 + number for number in numbers))
    names = [signal.Signals(number).name for number in numbers]
    assert any(name in ended.said for name in names), f"no word: {ended.said[-600:]}"
    tally.note("stopped with a checkpoint" if "finishing this step" in ended.said else "stopped at once")


def every_operation(tally: Tally, forks: Server, folder: Path) -> None:
    """Each signal at each file operation of one run."""
    for op in training.undisturbed(forks, folder).operations:
        for number in SIGNALS:

            def check(plan: str = f"{op.number}:signal:{int(number)}", sent: int = number) -> None:
                ended = forks.run(*training.words(folder, "cut"), cwd=folder, plans=plan)
                judge(tally, ended, (sent,))
                training.finish(forks, folder, "cut")

            checked(tally, folder, f"{number.name} at {op}", check)


def twice(tally: Tally, forks: Server, folder: Path, chance: random.Random, count: int) -> None:
    """A second signal, at once or a few operations after the first."""
    last = len(training.undisturbed(forks, folder, name="whole-2").operations)
    for _ in range(count):
        first, second = chance.choice(SIGNALS), chance.choice(SIGNALS)
        at = chance.randrange(1, last)
        plan = f"{at}:signal:{int(first)},{at + chance.choice((0, 1, 2, 5))}:signal:{int(second)}"

        def check(plan: str = plan, sent: tuple[int, int] = (first, second)) -> None:
            judge(tally, forks.run(*training.words(folder, "cut"), cwd=folder, plans=plan), sent)
            training.finish(forks, folder, "cut")

        checked(tally, folder, f"two signals, {plan}", check)


def some_operations(
    tally: Tally, forks: Server, folder: Path, chance: random.Random, count: int, name: str, more: tuple[str, ...]
) -> None:
    """Signals to the process, or to its group with all workers, at random operations of a run of other settings."""
    operations = training.undisturbed(forks, folder, *more, name=name).operations
    for k in range(count):
        op, number = chance.choice(operations), SIGNALS[k % 3]
        for how in ("signal", "group"):

            def check(plan: str = f"{op.number}:{how}:{int(number)}", sent: int = number) -> None:
                judge(tally, forks.run(*training.words(folder, "cut", *more), cwd=folder, plans=plan), (sent,))
                training.finish(forks, folder, "cut", *more, whole=name)

            checked(tally, folder, f"{name}: {number.name} ({how}) at {op}", check)


def checked(tally: Tally, folder: Path, what: str, check) -> None:  # type: ignore[no-untyped-def]
    """Count what becomes of a check, and remove its run."""
    tally.check(what, check, FAR_LIMIT_S)
    shutil.rmtree(folder / "cut", ignore_errors=True)


def compilation(tally: Tally, folder: Path, chance: random.Random, count: int) -> None:
    """Signals while torch compiles, each with an empty cache, and so far more file operations than a run has."""
    cache = folder / "inductor"
    where = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # The warm-up does not compile: a process that has done so starts autograd's threads, and cannot be forked any more.
    # So each fork compiles for minutes; there are fewer of these, and more time for each.
    warm_up = (*training.WARM_UP, "warm-eager")
    with server(*warm_up, cwd=folder, environment=where, limit_s=FAR_LIMIT_S // 2) as forks:
        operations = training.undisturbed(forks, folder, *COMPILED, name="compiled").operations
        within = [op for op in operations if op.what.startswith(str(cache))]
        tally.note("operations in the cache of torch.compile", len(within))
        for k in range(max(3, count // 4)):
            op, number = chance.choice(within), SIGNALS[k % 3]
            shutil.copytree(cache, folder / "kept", dirs_exist_ok=True)
            shutil.rmtree(cache)

            def check(plan: str = f"{op.number}:signal:{int(number)}", sent: int = number) -> None:
                judge(tally, forks.run(*training.words(folder, "cut", *COMPILED), cwd=folder, plans=plan), (sent,))
                # What was left in the cache stays there beside what is whole, and must not be used.
                shutil.copytree(folder / "kept", cache, dirs_exist_ok=True)
                training.finish(forks, folder, "cut", *COMPILED, whole="compiled")

            checked(tally, folder, f"compilation: {number.name} at {op}", check)
            shutil.copytree(folder / "kept", cache, dirs_exist_ok=True)


def numba_compilation(tally: Tally, folder: Path, chance: random.Random, count: int) -> None:
    """Signals while numba compiles and saves, with an empty cache: exceptions in its callbacks would be lost."""
    cache = folder / "numba"
    # Nearly all of a fork's time goes into compiling.
    with server(cwd=folder, environment={"NUMBA_CACHE_DIR": str(cache)}, limit_s=FAR_LIMIT_S // 4) as forks:
        operations = training.undisturbed(forks, folder, name="numba-whole").operations
        within = [op for op in operations if op.what.startswith(str(cache))]
        tally.note("operations in numba's cache", len(within))
        for k in range(count):
            op, number = chance.choice(within), SIGNALS[k % 3]
            shutil.rmtree(cache)

            def check(plan: str = f"{op.number}:signal:{int(number)}", sent: int = number) -> None:
                judge(tally, forks.run(*training.words(folder, "cut"), cwd=folder, plans=plan), (sent,))
                training.finish(forks, folder, "cut")

            checked(tally, folder, f"numba: {number.name} at {op}", check)


# ----------------------------------------------------------------------------------------------- in started processes


def imports(tally: Tally, folder: Path, chance: random.Random, count: int) -> None:
    """Signals at the file operations of ``python -m fastcifar`` itself, from Python's start to its end."""
    log = folder / "start.log"
    status, said = start(folder, "started", "0:kill:0", log)
    assert status == 0, said
    operations = file_operations.operations(log)
    ours = next(op.number for op in operations if MAIN.search(op.what))
    tally.note("operations of a start", len(operations))
    tally.note("operations before a start's first line", ours)
    for k in range(count):
        # A third around our first lines, where the handlers come; the rest anywhere after them.
        near = k % 3 == 0
        at = chance.randrange(max(ours - 20, 1), ours + 60) if near else chance.randrange(ours, len(operations))
        number = SIGNALS[k // 3 % 3]
        tally.check(
            f"start: {number.name} at operation {at}",
            lambda a=at, n=number: started(tally, folder, a, n), FAR_LIMIT_S,
        )  # fmt: skip
        shutil.rmtree(folder / "cut", ignore_errors=True)


def started(tally: Tally, folder: Path, at: int, number: signal.Signals) -> None:
    """Start a process, signal it, and check its end by how far it had come."""
    log = folder / "cut.log"
    log.unlink(missing_ok=True)
    status, said = start(folder, "cut", f"{at}:signal:{int(number)}", log)
    done = [op.what for op in file_operations.operations(log) if op.number < at]
    if not any(INTERRUPT.search(what) for what in done):
        # Before the first line of ours, SIGINT is Python's business, which calls it a fatal error of its start.
        by_python = number == signal.SIGINT and status == 1 and "Fatal Python error" in said
        assert status == -number or by_python, f"status {status}: {said[-600:]}"
        tally.note("died plainly while Python started")
        return
    assert "Traceback" not in said, said[-600:]
    if not any(COMMANDS.search(what) for what in done):
        assert status in (-number, 128 + number), f"status {status}: {said[-600:]}"
        tally.note("died plainly while the handlers were imported" if status < 0 else "stopped at once")
        return
    assert status == 128 + number, f"status {status}: {said[-600:]}"
    tally.note("stopped at its start" if not (folder / "cut").exists() else "stopped later")


def start(folder: Path, name: str, plans: str, log: Path) -> tuple[int, str]:
    """Start the command as a user does, under the plans; return its exit status and what it said."""
    with signals_heard():
        done = subprocess.run(
            [sys.executable, "-m", "fastcifar", *training.words(folder, name)], cwd=folder, text=True,
            env=file_operations.environment(plans, log) | {"PYTHONPATH": os.getcwd()}, timeout=FAR_LIMIT_S,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return done.returncode, done.stderr
