"""A run of a second with everything that keeps state, for processes that do not come to its end undisturbed."""

from pathlib import Path

from tests.storm.fork_server import Ended, Server
from tests.train.tiny import assert_same_run

WHOLE = "whole"
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
epochs = 2
batch_size = 10
[engine]
device = "cpu"
"""
WARM_UP = ("run", "storm.toml", "--quiet", "--out")
"""What a server executes once, before the name of the run."""


def prepare(folder: Path) -> None:
    """Write the recipe into a folder."""
    (folder / "storm.toml").write_text(RECIPE)


def words(folder: Path, name: str, *more: str) -> list[str]:
    """Return the command line that starts or resumes a run, as its user would: resume what has begun."""
    begun = (folder / name / "recipe.toml").is_file()
    return ["run", *(["--resume", name] if begun else ["storm.toml", "--out", name, *more]), "--quiet"]


def undisturbed(server: Server, folder: Path, *more: str, name: str = WHOLE) -> Ended:
    """Run to the end."""
    ended = server.run(*words(folder, name, *more), cwd=folder)
    ended.must_be(0)
    return ended


def finish(server: Server, folder: Path, name: str, *more: str, whole: str = WHOLE) -> None:
    """Start or resume a run that was stopped, and compare its end with the undisturbed one's, bit for bit."""
    undisturbed(server, folder, *more, name=name)
    assert_same_run(folder / whole, folder / name)
    left = [str(path) for path in (folder / name).rglob("*.tmp")]
    assert not left, left
