"""A run that was stopped half-way and then damaged on disk: resumed to the same bits, or refused by name."""

import random
import shutil
import tempfile
from pathlib import Path

from fastcifar.errors import UserError
from tests.storm import training
from tests.storm.fork_server import FAR_LIMIT_S, Server, server
from tests.storm.run_directories import changed
from tests.storm.tally import Tally
from tests.train.tiny import assert_same_run

COUNT = 200


def storm(tally: Tally, seed: int, count: int) -> None:
    """Damage one file of a stopped run so many times, and resume it."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fastcifar-storm-") as scratch:
        folder = Path(scratch)
        training.prepare(folder)
        with server(*training.WARM_UP, "warm", cwd=folder) as forks:
            training.undisturbed(forks, folder, "--set", "train.epochs=4")
            words = training.words(folder, "stopped", "--set", "train.epochs=4")
            stopped = forks.run(*words, cwd=folder, plans=_in_the_second_epoch(forks, folder))
            stopped.must_be(143)
            files = sorted(p for p in (folder / "stopped").rglob("*") if p.is_file() and ".lock" not in p.name)
            assert len({p.parent for p in files if "epoch-" in str(p)}) == 2, files
            for number in range(count):
                path = chance.choice(files)
                data, how = changed(path.read_bytes(), chance)
                name = path.relative_to(folder / "stopped")
                what = f"seed {seed}, {number}: {name}: {how}"
                tally.check(what, lambda p=name, d=data: resume(forks, folder, p, d), FAR_LIMIT_S)
                shutil.rmtree(folder / "damaged", ignore_errors=True)


def _in_the_second_epoch(forks: Server, folder: Path) -> str:
    """Return the plan of a signal while the second epoch's metrics are written, so that there are two checkpoints."""
    operations = training.undisturbed(forks, folder, "--set", "train.epochs=4", name="looked-at").operations
    metrics = [op for op in operations if op.name == "rename" and op.what.endswith("metrics.jsonl")]
    return f"{metrics[1].number}:signal:15"


def resume(forks: Server, folder: Path, name: Path, data: bytes | None) -> None:
    """Damage a copy of the stopped run and resume it.

    Raises:
        UserError: it was refused.
        AssertionError: a traceback, or another result than the undisturbed run's.
    """
    shutil.copytree(folder / "stopped", folder / "damaged")
    path = folder / "damaged" / name
    path.unlink() if data is None else path.write_bytes(data)
    ended = forks.run("run", "--resume", "damaged", "--quiet", cwd=folder)
    ended.must_be(0, 2)
    if ended.status:
        assert "damaged" in ended.said, f"not named: {ended.said[-600:]}"
        raise UserError(ended.said)
    assert_same_run(folder / training.WHOLE, folder / "damaged")
