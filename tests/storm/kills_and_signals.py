"""Training processes that are killed, signalled, or run out of disk, against one that was left alone, bit for bit."""

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fastcifar.errors import UserError
from tests.command import hangups_heard
from tests.storm.tally import Tally
from tests.train.tiny import assert_same_run

COUNT = 100
LIMIT_S = 300
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RECIPE = """
[data]
source = "synthetic"
subset = 20
test_subset = 10
[data.loader]
name = "resident"
[model]
name = "wide_resnet"
depth = 10
widen = 1
shakedrop = 0.3
[optimizer]
name = "sgd"
lr = 0.05
[ema]
decay = 0.9
[train]
epochs = 8
batch_size = 25
[engine]
device = "cpu"
"""


def storm(tally: Tally, seed: int, count: int) -> None:
    """Stop so many processes at random moments: each in turn by SIGKILL, a signal, or a limit on file sizes."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "storm.toml").write_text(RECIPE)
        began = time.monotonic()
        finish(folder, "whole")
        whole_s = time.monotonic() - began
        runs = 0
        for number in range(count):
            name = f"victim-{runs}"
            kind = (signal.SIGKILL, *SIGNALS, None)[number % 5]
            what = f"seed {seed}, {number}: {kind.name if kind else 'disk full'}"
            status = disturb(folder, name, kind, chance, whole_s)
            tally.note(kind.name if kind else "disk full")
            tally.check(what, lambda k=kind, s=status: judge(k, *s), LIMIT_S)
            if status[0] == 0 or number == count - 1:
                tally.check(f"{what}: resumed", lambda n=name: compare(folder, n), LIMIT_S)
                runs += 1


def command(folder: Path, name: str) -> list[str]:
    """Return the command line that starts or resumes a run."""
    begun = (folder / name / "recipe.toml").is_file()
    words = ["--resume", name] if begun else ["storm.toml", "--out", name]
    return [sys.executable, "-m", "fastcifar", "run", *words, "--quiet"]


def finish(folder: Path, name: str) -> None:
    done = subprocess.run(command(folder, name), cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr


def disturb(
    folder: Path, name: str, kind: signal.Signals | None, chance: random.Random, whole_s: float
) -> tuple[int, str]:
    """Run for a random time, or with a random limit of bytes per file; return the status and what was said."""
    limit = None if kind else _limit(int(10 ** chance.uniform(0, 6)))
    with hangups_heard():
        child = subprocess.Popen(
            command(folder, name), cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            preexec_fn=limit, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    if kind:
        try:
            child.wait(chance.uniform(0, whole_s))
        except subprocess.TimeoutExpired:
            child.send_signal(kind)
    _, said = child.communicate(timeout=LIMIT_S)
    return child.returncode, said


def _limit(size: int) -> Callable[[], None]:
    def apply() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return apply


def judge(kind: signal.Signals | None, status: int, said: str) -> None:
    """Count a refusal, accept a stop as it should be, and fail on anything else."""
    # Before the first line of ours runs, Python itself answers; nothing has begun then.
    if status in (-(kind or 0), 1) and "fastcifar" not in said and kind:
        return
    assert "Traceback" not in said, said[-600:]
    if kind is None and status == 2:
        raise UserError(said)
    allowed = (0, -9) if kind == signal.SIGKILL else (0, 128 + kind) if kind else (0,)
    assert status in allowed, f"status {status}: {said[-600:]}"


def compare(folder: Path, name: str) -> None:
    """Finish the run and compare it with the undisturbed one."""
    finish(folder, name)
    assert_same_run(folder / "whole", folder / name)
    assert not list((folder / name).rglob("*.tmp"))
