"""Disks that fill at every size, or cannot be written: one clear message, nothing half written, no bit lost.

Three kinds of full disk: one that refuses from a certain file operation on (each in turn), a limit on the size of
files, and a real small file system, where this process may mount one.
"""

import errno
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastcifar.errors import UserError
from tests.storm import training
from tests.storm.fork_server import FAR_LIMIT_S, Ended, Server, server
from tests.storm.stores import original
from tests.storm.tally import Tally

COUNT = 8
"""How many sizes of a limit on files, and of a file system, each command is given."""
IMAGES = ("--set", "data.source=folder", "--set", "data.subset=0", "--set", "data.test_subset=0",
          "--set", "train.batch_size=30")  # fmt: skip
FIRST = "whole-images"
ROOM = 64 << 20


@dataclass(frozen=True)
class Command:
    """A command that writes, and what must be so after it has failed.

    Attributes:
        words: the command line; ``{out}`` stands for what it makes.
        out: the name of that.
        whole: the undisturbed run, where it is a run, which goes on where it stopped; all else leaves nothing behind.
        environment: variables that differ.
    """

    words: tuple[str, ...]
    out: str
    whole: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def storm(tally: Tally, seed: int, count: int) -> None:
    """Fill the disk under every command that writes files."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fastcifar-storm-") as scratch:
        folder = Path(scratch)
        training.prepare(folder)
        make_images(folder / "images", seed)
        with server(*training.WARM_UP, "warm", cwd=folder) as forks:
            training.undisturbed(forks, folder)
            training.undisturbed(forks, folder, *IMAGES, "--data", str(folder / "images"), name=FIRST)
            for command in commands(folder):
                every_operation(tally, forks, folder, command)
                sizes(tally, forks, folder, command, chance, count)
            if can_mount(folder):
                for command in commands(folder):
                    small_disks(tally, forks, folder, command, chance, count)
            else:
                tally.note("small file systems left out: this process may not mount one")


def commands(folder: Path) -> list[Command]:
    """Return the commands that write."""
    source = str(original("raw"))
    convert = [
        Command(("data", "convert", "folder", "--data", source, "--to", to, "--out", "{out}"), f"set-{to}")
        for to in ("raw", "ffcv", "dali")
    ]
    run = Command((), "cut", training.WHOLE)
    # With an empty cache, which is on the small disk too.
    first = Command(IMAGES, "cut", FIRST, {"FASTCIFAR_DATA": str(folder / "images"), "FASTCIFAR_CACHE": "cache"})
    export = [Command(("export", training.WHOLE, "{out}"), f"model.{kind}") for kind in ("safetensors", "onnx")]
    report = Command(("report", training.WHOLE, "--out", "{out}"), "page.html")
    preview = Command(("augment", "preview", "storm.toml", "--out", "{out}"), "sheet.png")
    return [*convert, run, first, *export, report, preview]


def make_images(folder: Path, seed: int) -> None:
    """Draw an image folder of sixty images and three classes in each split."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    for split in ("train", "test"):
        for number in range(60):
            path = folder / split / f"class-{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(path)


class Trial:
    """A command in a folder, tried on a full disk, and then with room."""

    def __init__(self, forks: Server, folder: Path, command: Command, place: Path) -> None:
        self.forks, self.folder, self.command, self.place = forks, folder, command, place
        self.environment = dict(command.environment)
        if "FASTCIFAR_CACHE" in self.environment:
            self.environment["FASTCIFAR_CACHE"] = str(place / "cache")

    def run(self, plans: str = "0:kill:0", limits: dict[str, int] | None = None) -> Ended:
        """Run the command, or resume the run that it has begun."""
        out, words = self.place / self.command.out, list(self.command.words)
        if self.command.whole:
            begun = (out / "recipe.toml").is_file()
            words = ["run", *(["--resume", str(out)] if begun else ["storm.toml", "--out", str(out), *words])]
        words = [word.format(out=out) for word in words]
        quiet = ["--quiet"] if self.command.whole else []
        return self.forks.run(*words, *quiet, cwd=self.folder, plans=plans, limits=limits, environment=self.environment)

    def judge(self, ended: Ended) -> None:
        """Check how it ended on the full disk.

        Raises:
            AssertionError: another end than success or a clear message, or something half written.
        """
        ended.must_be(0, 2)
        assert ended.status == 0 or "fastcifar: " in ended.said, ended.said
        left = [p for p in self.place.rglob("*") if p.name.endswith((".tmp", ".part"))]
        assert not left, f"left behind: {left}"
        if ended.status and not self.command.whole:
            assert not (self.place / self.command.out).exists(), "half of it stays"

    def finish(self) -> None:
        """Check that the command comes to its end once there is room."""
        self.run().must_be(0)
        if self.command.whole:
            training.assert_same_run(self.folder / self.command.whole, self.place / self.command.out)

    def clean(self) -> None:
        """Remove what it made."""
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def tried(self, ended: Ended) -> None:
        """Judge, finish and clean up; a refusal is handed on.

        Raises:
            UserError: the command said that it could not write.
        """
        self.judge(ended)
        self.finish()
        self.clean()
        if ended.status:
            raise UserError(ended.said)


def every_operation(tally: Tally, forks: Server, folder: Path, command: Command) -> None:
    """From each changing operation on nothing can be written any more; then the same for a read-only disk."""
    place = folder / "place"
    place.mkdir(exist_ok=True)
    trial = Trial(forks, folder, command, place)
    operations = trial.run().operations
    trial.clean()
    changing = [op for op in operations if op.changes and (not op.reads_perhaps or str(place) in op.what)]
    plans = [(f"no space from {op} on", f"{op.number}:fail:{errno.ENOSPC}") for op in changing]
    plans += [("read-only", f"1:fail:{errno.EROFS}")]
    for what, plan in plans:
        tally.check(f"{name(command)}: {what}", lambda p=plan: trial.tried(trial.run(plans=p)), FAR_LIMIT_S)
        trial.clean()


def sizes(
    tally: Tally, forks: Server, folder: Path, command: Command, chance: random.Random, count: int
) -> None:
    """No file may become larger than a random size."""
    trial = Trial(forks, folder, command, folder / "place")
    for _ in range(count):
        size = int(10 ** chance.uniform(0, 6))
        limits = {"RLIMIT_FSIZE": size}
        what = f"{name(command)}: files of {size:,} bytes at most"
        tally.check(what, lambda x=limits: trial.tried(trial.run(limits=x)), FAR_LIMIT_S)
        trial.clean()


def small_disks(
    tally: Tally, forks: Server, folder: Path, command: Command, chance: random.Random, count: int
) -> None:
    """A file system of a random size, enlarged after the command has failed."""
    place = folder / "small"
    place.mkdir(exist_ok=True)
    trial = Trial(forks, folder, command, place)
    for _ in range(count):
        size = int(10 ** chance.uniform(3.7, 6.6)) // 4096 * 4096 + 4096

        def check(size: int = size) -> None:
            with mounted(place, size):
                ended = trial.run()
                trial.judge(ended)
                subprocess.run(["mount", "-o", f"remount,size={ROOM}", str(place)], check=True)
                trial.tried(ended)

        tally.check(f"{name(command)}: a disk of {size:,} bytes", check, FAR_LIMIT_S)


def name(command: Command) -> str:
    """Return a command in a few words."""
    if not command.whole:
        return f"{command.words[0]} {command.out}"
    return "first run, with its cache" if command.environment else "run"


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a small file system."""
    (folder / "small").mkdir(exist_ok=True)
    try:
        with mounted(folder / "small", 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def mounted(place: Path, size: int) -> Iterator[None]:
    """Mount a file system of so many bytes for a ``with`` block."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
