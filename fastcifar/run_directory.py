"""A run is its directory. Writing is atomic; reading needs neither torch nor the code that trained.

- ``recipe.toml``: the resolved recipe.
- ``environment.json``: hardware, versions, git revision.
- ``metrics.jsonl``: one object an epoch.
- ``logits.npz``: float32 (N, classes) by ``test/last/raw`` and the like, with the labels.
- ``weights/``: last, best and selected weights as safetensors.
- ``checkpoints/``: what a resume needs.
- ``summary.json``: the result.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastcifar.errors import UserError

# What is imported within functions is what takes long: a mistyped path is answered without it.
if TYPE_CHECKING:
    import numpy as np

    from fastcifar.config import CombineRecipe, Recipe

FORMAT = 1
OWNER = ".lock-owner"
"""The file that names the process at work on a run."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        refuse_disk(path, error)


def refuse_disk(path: Path, error: OSError) -> NoReturn:
    """Turn a failed write into the message that a user needs."""
    raise UserError(
        f"{path}: cannot be written: {error.strerror}. Free some space or choose another folder with --out; "
        "everything up to the last checkpoint is safe."
    ) from None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


class RunDirectory:
    """A run directory, for reading.

    Attributes:
        folder: the directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path) -> "RunDirectory":
        """Open a run directory.

        Raises:
            UserError: there is none there, or a later version of fastcifar wrote it.
        """
        run = cls(Path(folder))
        if not (run.folder / "recipe.toml").is_file():
            raise UserError(f"{folder}: is not a run directory (no recipe.toml in it); `fastcifar run` makes one")
        if run.has_summary and run.summary.get("format", 0) > FORMAT:
            raise UserError(f"{folder}: was written by a later version of fastcifar; update fastcifar to read it")
        return run

    @property
    def has_summary(self) -> bool:
        """Whether the run has come to an end, finished or stopped."""
        return (self.folder / "summary.json").is_file()

    @cached_property
    def recipe(self) -> "Recipe | CombineRecipe":
        """The resolved recipe of the run."""
        from fastcifar.config import load_recipe

        return load_recipe(self.folder / "recipe.toml")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``; accuracies in percent.

        Raises:
            UserError: the run has not ended, or the file is damaged.
        """
        path = self.folder / "summary.json"
        if not path.is_file():
            raise UserError(f"{self.folder}: has no summary yet; finish it with `fastcifar run --resume {self.folder}`")
        return _read_json(path)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Hardware, versions and git revision of the run."""
        return _read_json(self.folder / "environment.json")

    def metrics(self) -> list[dict[str, Any]]:
        """Return one object per finished epoch. A last line cut by a crash is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: is damaged ({error}); train the run again") from None

    @contextmanager
    def _logits(self) -> "Iterator[np.lib.npyio.NpzFile]":
        """Open ``logits.npz`` for as long as it is read: a file kept open would be one more thing to close."""
        import numpy as np

        path = self.folder / "logits.npz"
        if not path.is_file():
            raise UserError(f"{path}: is missing; finish the run with `fastcifar run --resume {self.folder}`")
        try:
            with np.load(path) as file:
                yield file
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: is damaged ({error}); train the run again") from None

    def logits_keys(self) -> list[str]:
        """Return the names that `logits` takes."""
        with self._logits() as file:
            return list(file.files)

    def logits(self, key: str) -> "np.ndarray":
        """Return one saved array: float32 (N, classes), or int64 (N,) for labels and indices.

        Args:
            key: such as ``test/last/ema``, ``holdout/selected/raw``, ``test/labels``.

        Raises:
            UserError: the run has not saved it; the message lists what it has.
        """
        with self._logits() as file:
            if key not in file.files:
                raise UserError(f"{self.folder}: has no logits {key}; it has {', '.join(file.files)}")
            return file[key]

    # -------------------------------------------------------------------------------------------------------- writing

    @classmethod
    def create(cls, folder: Path, recipe: "Recipe | CombineRecipe", environment: dict[str, Any]) -> "RunDirectory":
        """Make a run directory, or the same again where only an unfinished start of this recipe lies."""
        from fastcifar.config import to_toml

        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse_disk(folder, error)
        write_json(folder / "environment.json", environment)
        # Last, because this file is what makes the folder a run.
        write_atomic(folder / "recipe.toml", to_toml(recipe))
        return cls(folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from writing to this run; the lock goes with the process, however it ends.

        Raises:
            UserError: another process has it.
        """
        from fastcifar.locks import LockedError, locked

        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / ".lock"))
            except LockedError:
                raise UserError(
                    f"{self.folder}: process {self._owner()} is at work on this run; wait until it ends, or stop it "
                    "with Ctrl-C or `kill`: nothing is lost"
                ) from None
            except OSError as error:
                refuse_disk(self.folder / ".lock", error)
            # Beside the lock, not in it: on Windows nobody else can read a file that is locked.
            owner = self.folder / OWNER
            write_atomic(owner, str(os.getpid()))
            stack.callback(owner.unlink, missing_ok=True)
            yield

    def _owner(self) -> str:
        """Return the number of the process that holds the lock, as far as it has said so."""
        try:
            return (self.folder / OWNER).read_text() or "unknown"
        except OSError:
            return "unknown"

    def keep_epochs(self, epochs: int) -> None:
        """Drop the metrics of later epochs than the checkpoint that a resume starts from."""
        kept = [row for row in self.metrics() if row["epoch"] <= epochs]
        write_atomic(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def append_epoch(self, row: dict[str, Any]) -> None:
        """Add one epoch to ``metrics.jsonl``."""
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            refuse_disk(path, error)

    def write_logits(self, arrays: dict[str, "np.ndarray"]) -> None:
        """Write ``logits.npz`` atomically."""
        import io

        import numpy as np

        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(self.folder / "logits.npz", buffer.getvalue())

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``; its presence says that the run has ended."""
        write_json(self.folder / "summary.json", {"format": FORMAT, **summary})
        self.__dict__.pop("summary", None)

    def clear(self) -> None:
        """Delete the run directory."""
        shutil.rmtree(self.folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
