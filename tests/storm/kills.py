"""Processes that are killed at single file operations and between them: the next start goes on to the same bits."""

import random
import shutil
import tempfile
from pathlib import Path

from tests.storm import training
from tests.storm.file_operations import Operation
from tests.storm.fork_server import FAR_LIMIT_S, Server, server
from tests.storm.stores import original
from tests.storm.tally import Tally

COUNT = 60
"""How many are killed between operations, at random times; those at operations are as many as there are operations."""
WRITES = ("write", "writev", "pwrite64", "sendfile64", "copy_file_range")


def storm(tally: Tally, seed: int, count: int) -> None:
    """Kill a run before each of its operations, within each write and ``count`` times in between; then conversions."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fastcifar-storm-") as scratch:
        folder = Path(scratch)
        training.prepare(folder)
        with server(*training.WARM_UP, "warm", cwd=folder) as forks:
            runs(tally, forks, folder, chance, count)
            for to in ("raw", "ffcv", "dali"):
                conversions(tally, forks, folder, to)


def runs(tally: Tally, forks: Server, folder: Path, chance: random.Random, count: int) -> None:
    """Kill training."""
    whole = training.undisturbed(forks, folder)
    plans = [(f"kill at {op}", plan, 0.0) for op in whole.operations for plan in kills_at(op)]
    plans += [(f"kill after {s:.3f} s", "0:kill:0", s) for s in (chance.uniform(0, 1) for _ in range(count))]
    for number, (what, plan, dies_after_s) in enumerate(plans):

        def check(name: str = f"killed-{number}", plan: str = plan, after: float = dies_after_s) -> None:
            ended = forks.run(*training.words(folder, name), cwd=folder, plans=plan, dies_after_s=after)
            ended.must_be(-9, -14, 0)
            tally.note("killed" if ended.status else "ended first")
            if chance.random() < 0.3:  # the recovery is killed too
                again = f"{chance.randrange(1, 80)}:kill:{chance.randrange(2)}"
                ended = forks.run(*training.words(folder, name), cwd=folder, plans=again)
                ended.must_be(-9, 0)
                tally.note("killed again" if ended.status else "recovered first")
            training.finish(forks, folder, name)
            shutil.rmtree(folder / name)

        tally.check(f"run: {what}", check, FAR_LIMIT_S)


def kills_at(op: Operation) -> list[str]:
    """Return the plans of a kill before an operation and, where there is a half of it, within."""
    return [f"{op.number}:kill:{half}" for half in ((0, 1) if op.name in WRITES else (0,))]


def conversions(tally: Tally, forks: Server, folder: Path, to: str) -> None:
    """Kill a conversion; the next one makes the whole store and leaves nothing else behind."""
    source, out = original("raw"), folder / to / "set"
    convert = ("data", "convert", "folder", "--data", str(source), "--to", to, "--out", str(out))
    whole = forks.run(*convert, cwd=folder)
    whole.must_be(0)
    hashes = {path.name: path.read_bytes() for path in out.glob("*") if path.name != "manifest.json"}
    for op in whole.operations:
        for plan in kills_at(op):

            def check(plan: str = plan) -> None:
                shutil.rmtree(out.parent)
                ended = forks.run(*convert, cwd=folder, plans=plan)
                ended.must_be(-9, 0)
                tally.note("conversion killed" if ended.status else "conversion ended first")
                for more in (convert, ("data", "verify", str(out))):
                    forks.run(*more, cwd=folder).must_be(0)
                assert [path.name for path in out.parent.iterdir()] == [out.name], "left behind"
                assert hashes == {p.name: p.read_bytes() for p in out.glob("*") if p.name != "manifest.json"}

            tally.check(f"convert to {to}: kill at {op}", check, FAR_LIMIT_S)
