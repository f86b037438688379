"""A run is its directory: the one place that opens its files, to check them before use and to write them safely.

- ``recipe.toml``: the resolved recipe.
- ``environment.json``: hardware, versions, git revision.
- ``metrics.jsonl``: one object an epoch.
- ``logits.npz``: float32 (N, classes) by ``test/last/raw`` and the like, with the labels.
- ``weights/``: last, best and selected weights as safetensors.
- ``checkpoints/``: what a resume needs, one folder each.
- ``summary.json``: the result.
- ``README.md``: the model card: what this is, for whoever finds it.
- ``manifest.json``: the SHA-256 of every other file; see `fastcifar.manifest`.

Reading the results needs neither torch nor the code that trained.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastcifar import manifest as manifests
from fastcifar.errors import UserError
from fastcifar.manifest import Manifest, sha256

# What is imported within functions is what takes long: a mistyped path is answered without it.
if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fastcifar.config import CombineRecipe, Recipe

FORMAT = manifests.FORMAT
OWNER = ".lock-owner"
"""The file that names the process at work on a run."""
END = ("summary.json", "README.md", "logits.npz", "weights/last.safetensors")
"""What a run writes where it ends or stops, with the file that says so first; a run that goes on has not ended."""
BEFORE_RECIPE = ("environment.json", manifests.NAME)
"""What `RunDirectory.begin` writes before ``recipe.toml``, the file that makes the folder a run."""
# Far above what a run writes (a line of metrics has under 1 kB), far below what fills a memory.
LARGEST_JSON = 64 << 20
# What `refuse_disk` and a folder that was moved say.
CANNOT_WRITE = "cannot be written"
GONE = "its folder is gone, moved or removed while this was running"
# A reader beside a training process may meet a file between two manifests; it looks again this often.
LOOKS, LOOK_AGAIN_S = 10, 0.05


class AtWorkError(UserError):
    """Another process has the lock of a run directory."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = _temporary(path)
    try:
        _write_synced(temporary, data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except OSError as error:
        _remove(temporary)
        refuse_disk(path, error)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Remove a file if that is possible; on a disk that cannot be written there is none."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def refuse_disk(path: Path, error: OSError) -> NoReturn:
    """Turn a failed write into the message that a user needs."""
    if isinstance(error, FileNotFoundError):
        raise UserError(f"{path}: {CANNOT_WRITE}: {GONE}") from None
    raise UserError(
        f"{path}: {CANNOT_WRITE}: {error.strerror or error}. Free some space or choose another folder with --out; "
        "everything up to the last checkpoint is safe."
    ) from None


def as_json(value: Any) -> str:
    """Return ``value`` as indented JSON; NaN and infinities, which JSON does not have, are a `ValueError`."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomic(path, as_json(value))


@dataclass
class _Held:
    """A lock that this process has: how often it was taken, and the manifest, which nobody else changes meanwhile."""

    depth: int
    manifest: Manifest | None
    dirty: bool = False


_HELD: dict[Path, _Held] = {}


class RunDirectory:
    """A run directory.

    Attributes:
        folder: the directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: tuple[tuple[int, ...], dict[str, np.ndarray]] | None = None

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a run lies there.

        Raises:
            UserError: the folder may not be read, or cannot be there, as its name is too long.
        """
        try:
            return (folder / "recipe.toml").is_file()
        except OSError as error:  # `is_file` answers the common ones itself
            raise UserError(
                f"{folder}: cannot be read: {error.strerror}; name a run directory that you may read"
            ) from None

    @classmethod
    def open(cls, folder: str | Path) -> "RunDirectory":
        """Open a run directory.

        Raises:
            UserError: there is none there, or another version of fastcifar wrote it.
        """
        run = cls(Path(folder))
        if not cls.exists(run.folder):
            raise UserError(f"{folder}: is not a run directory (no recipe.toml in it); `fastcifar run` makes one")
        if run.has_summary and run.summary["format"] > FORMAT:
            raise UserError(f"{folder}: was written by a later version of fastcifar; update fastcifar to read it")
        return run

    # -------------------------------------------------------------------------------------------------------- reading

    def manifest(self) -> Manifest | None:
        """Return the manifest; None where an earlier version of fastcifar, which wrote none, made the run.

        Raises:
            UserError: it is damaged.
        """
        held = _HELD.get(self._key())
        if held is not None and held.manifest is not None:
            return held.manifest
        path = self.folder / manifests.NAME
        return manifests.parse(self._bytes(path, LARGEST_JSON), path) if path.is_file() else None

    def read(self, name: str, largest: int | None = None) -> bytes:
        """Return a file's content, checked against the manifest.

        Args:
            name: within the directory.
            largest: refuse more bytes than this.

        Raises:
            UserError: it is missing, cannot be read, or is not what the run wrote.
        """
        path, data = self.folder / name, b""
        for look in range(LOOKS):
            if look:
                time.sleep(LOOK_AGAIN_S)
            manifest = self.manifest()
            if not path.is_file():
                self._require_folder(path)
                raise UserError(f"{path}: is missing; {self._cure(name, manifest)}")
            data = self._bytes(path, largest)
            if manifest is None or sha256(data) in manifest.files.get(name, []):
                return data
            if self._key() in _HELD:
                break
        raise UserError(
            f"{path}: is damaged: it is not what the run wrote (its SHA-256 is another than in {manifests.NAME}); "
            "restore it from a copy, or train the run again"
        )

    def _require_folder(self, path: Path) -> None:
        """Make sure that the run is still where it was when it was opened.

        Raises:
            UserError: it is not; the message names the file that was wanted and says how to go on.
        """
        if not self.folder.is_dir():
            raise UserError(
                f"{path}: {GONE}; if you have moved it, go on from its last checkpoint with "
                "`fastcifar run --resume NEW_PLACE`"
            ) from None

    def _cure(self, name: str, manifest: Manifest | None) -> str:
        """Return what helps where a file is missing: what a run had written does not come back by resuming it."""
        if manifest is not None and name in manifest.files:
            return "restore it from a copy, or train the run again"
        return f"finish the run with `fastcifar run --resume {self.folder}`"

    @staticmethod
    def _bytes(path: Path, largest: int | None) -> bytes:
        try:
            if largest is not None and path.stat().st_size > largest:
                raise UserError(f"{path}: is damaged: it has {path.stat().st_size:,} bytes; train the run again")
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    @property
    def has_summary(self) -> bool:
        """Whether the run has come to an end, finished or stopped."""
        return (self.folder / "summary.json").is_file()

    @property
    def finished(self) -> bool:
        """Whether the run has come to its planned end."""
        return self.has_summary and self.summary["status"] == "finished"

    @property
    def ended_at(self) -> float:
        """When the summary was written, in seconds since 1970; 0 where there is none."""
        return (self.folder / "summary.json").stat().st_mtime if self.has_summary else 0.0

    @cached_property
    def recipe(self) -> "Recipe | CombineRecipe":
        """The resolved recipe of the run.

        Raises:
            UserError: it was edited since; the message names the changed keys.
        """
        from fastcifar.config import load_recipe

        path, manifest = self.folder / "recipe.toml", self.manifest()
        found = load_recipe(path, user_code=False)  # results can be read where the code that made them is gone
        if manifest is None or sha256(self._bytes(path, None)) in manifest.files.get("recipe.toml", []):
            return found
        changed = differences(manifest.recipe, found.model_dump(mode="json"))
        if changed:
            raise UserError(
                f"{path}: was edited after the run began: {'; '.join(changed[:5])}. A run keeps its recipe: put the "
                f"old value back, or branch off on purpose into a new run: `fastcifar run {path}`"
            )
        return found

    @cached_property
    def recipe_hash(self) -> str:
        """The SHA-256 of the recipe that the run began with, which its checkpoints carry."""
        manifest = self.manifest()
        return str(manifest.files["recipe.toml"][-1]) if manifest and manifest.files.get("recipe.toml") else ""

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``; accuracies in percent.

        Raises:
            UserError: the run has not ended, or the file is damaged.
        """
        from fastcifar.run_records import Summary

        if not self.has_summary:
            raise UserError(f"{self.folder}: has no summary yet; finish it with `fastcifar run --resume {self.folder}`")
        summary = self._json("summary.json", Summary)
        if summary["format"] == FORMAT and self.manifest() is None:
            path = self.folder / manifests.NAME
            raise UserError(f"{path}: is missing, so that no file of this run can be checked; restore it from a copy")
        return summary

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Hardware, versions and git revision of the run."""
        from fastcifar.run_records import Environment

        return self._json("environment.json", Environment)

    def _json(self, name: str, kind: Any) -> dict[str, Any]:
        from fastcifar.run_records import checked, parse_json

        path = self.folder / name
        return checked(kind, parse_json(self.read(name, LARGEST_JSON), path), path)

    def metrics(self) -> list[dict[str, Any]]:
        """Return one object per finished epoch.

        Raises:
            UserError: the file is damaged; the message names the line.
        """
        from fastcifar.run_records import EpochRow, checked, parse_json

        path = self.folder / "metrics.jsonl"
        if not path.is_file() and not self._expects("metrics.jsonl"):
            return []
        # What follows the last line's end is a line that an earlier version was writing when it was killed.
        lines = self.read("metrics.jsonl", LARGEST_JSON).split(b"\n")[:-1]
        rows = [checked(EpochRow, parse_json(line, path), path, f"line {i}: ") for i, line in enumerate(lines, 1)]
        if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
            raise UserError(f"{path}: is damaged: its epochs are not 1, 2, 3, ...; train the run again")
        return rows

    def metrics_arrays(self) -> "dict[str, np.ndarray]":
        """Return the metrics of all finished epochs as arrays: ``epoch``, int64 (E,), and float64 (E,) by key.

        Keys are those of ``metrics.jsonl``, nested ones joined by slashes: ``train_loss``, ``test/ema/accuracy``. NaN
        stands where an epoch was not evaluated.

        Raises:
            UserError: the file is damaged.
        """
        import numpy as np

        from fastcifar.run_records import flat_metrics

        rows = self.metrics()
        values = [flat_metrics(row) for row in rows]
        keys = dict.fromkeys(key for row in values for key in row)
        arrays = {key: np.array([row.get(key, np.nan) for row in values]) for key in keys}
        return {"epoch": np.array([row["epoch"] for row in rows], np.int64), **arrays}

    def _expects(self, name: str) -> bool:
        """Whether the manifest says that there is such a file."""
        manifest = self.manifest()
        return manifest is not None and None not in manifest.files.get(name, [None])

    def _all_logits(self) -> "dict[str, np.ndarray]":
        """Return the arrays of ``logits.npz``, read once as long as the file does not change."""
        from fastcifar.logits_file import read_arrays

        path = self.folder / "logits.npz"
        stat = path.stat() if path.is_file() else None
        identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat else ()
        if self._arrays is None or self._arrays[0] != identity:
            self._arrays = identity, read_arrays(self.read("logits.npz"), path)
        return self._arrays[1]

    def logits_keys(self) -> list[str]:
        """Return the names that `logits` takes."""
        return list(self._all_logits())

    def logits(self, key: str) -> "np.ndarray":
        """Return one saved array: float32 (N, classes), finite, or int64 (N,) for labels and indices.

        Args:
            key: such as ``test/last/ema``, ``holdout/selected/raw``, ``test/labels``.

        Raises:
            UserError: the run has not saved it; the message lists what it has.
        """
        import numpy as np

        arrays = self._all_logits()
        if key not in arrays:
            raise UserError(f"{self.folder}: has no logits {key}; it has {', '.join(arrays)}")
        if not np.isfinite(arrays[key]).all():
            raise UserError(f"{self.folder}: its logits {key} are not all finite; leave this run out")
        return arrays[key].copy()

    def default_weights(self) -> str:
        """Return which weights stand for the run: those selected on a holdout where there is one, else the last."""
        return "selected" if self.summary.get("selected") else "last"

    def weights(self, which: str) -> "dict[str, Tensor]":
        """Return saved weights by name, on the CPU.

        Args:
            which: ``last``, ``best`` or ``selected``.

        Raises:
            UserError: there are none, or they are damaged.
        """
        name = f"weights/{which}.safetensors"
        if not (self.folder / name).is_file():
            there = ", ".join(sorted(p.stem for p in (self.folder / "weights").glob("*.safetensors"))) or "none"
            raise UserError(f"{self.folder / name}: there are no such weights; this run has: {there}")
        return self._tensors(name)

    def _tensors(self, name: str) -> "dict[str, Tensor]":
        from safetensors import SafetensorError
        from safetensors.torch import load

        data = self.read(name)
        try:
            return load(data)
        except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"{self.folder / name}: is damaged ({error}); train the run again") from None

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def checkpoints(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first, those that have gone missing among them."""
        there = {p.parent.name for p in (self.folder / "checkpoints").glob("epoch-*/state.json") if p.is_file()}
        manifest = self.manifest()
        # A checkpoint that the run has written and not removed is missed as a damaged one is.
        paths = [Path(name) for name in (manifest.files if manifest else {}) if self._expects(name)]
        return sorted(there | {path.parent.name for path in paths if path.match("checkpoints/epoch-*/state.json")})

    def checkpoint(self, name: str) -> "tuple[dict[str, Tensor], dict[str, Any]]":
        """Return the tensors and plain values of a checkpoint.

        Raises:
            UserError: it is damaged, or belongs to another recipe.
        """
        from fastcifar.run_records import State

        state = self._json(f"checkpoints/{name}/state.json", State)
        if state["recipe"] != self.recipe_hash:
            raise UserError(f"{self.folder / 'checkpoints' / name}: belongs to another recipe than recipe.toml")
        return self._tensors(f"checkpoints/{name}/state.safetensors"), state

    def checkpoint_files(
        self, name: str, tensors: "dict[str, Tensor]", state: dict[str, Any]
    ) -> dict[str, bytes | str]:
        """Return the names and contents of a checkpoint's files for `commit`.

        Args:
            name: ``epoch-00012``, or ``epoch-00012-step-00034`` within an epoch; names sort by age.
            tensors: by name; moved to the CPU here.
            state: plain values, `State` without the recipe's hash.
        """
        from safetensors.torch import save

        data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
        # The plain values last: a checkpoint is complete when they are there.
        return {
            f"checkpoints/{name}/state.safetensors": data,
            f"checkpoints/{name}/state.json": as_json({**state, "recipe": self.recipe_hash}),
        }

    def outdated(self, name: str, keep: int) -> list[str]:
        """Return the files of the checkpoints that are too many beside the new one ``name``, for `commit` to remove."""
        old = [c for c in self.checkpoints() if c != name]
        return self.files_of(old[: max(0, len(old) + 1 - keep)])

    @staticmethod
    def files_of(checkpoints: Iterable[str]) -> list[str]:
        """Return the names of the files of checkpoints."""
        return [f"checkpoints/{c}/{file}" for c in checkpoints for file in ("state.json", "state.safetensors")]

    # -------------------------------------------------------------------------------------------------------- writing

    @classmethod
    def create(cls, folder: Path, recipe: "Recipe | CombineRecipe", environment: dict[str, Any]) -> "RunDirectory":
        """Make a run directory, in a new folder or in one without a run; `begin` with the lock taken for its time."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse_disk(folder, error)
        run = cls(folder)
        with run.alone():
            run.begin(recipe, environment)
        return run

    def begin(self, recipe: "Recipe | CombineRecipe", environment: dict[str, Any]) -> None:
        """Write the files that make the folder a run; only with the lock, see `alone`.

        Raises:
            UserError: there is a run already, or the disk cannot be written.
        """
        from fastcifar.config import to_toml

        if self.exists(self.folder):
            raise UserError(
                f"{self.folder}: holds a run already; go on with it by --resume {self.folder}, or choose another --out"
            )
        held = _HELD[self._key()]
        held.manifest = Manifest(recipe.model_dump(mode="json"))
        # The recipe last, because this file is what makes the folder a run.
        self.commit({"environment.json": as_json(environment), "recipe.toml": to_toml(recipe)})

    def _key(self) -> Path:
        return self.folder.absolute()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from writing to this run, and remove what a killed one has left behind.

        The lock goes with the process, however it ends. Within a process it may be taken again.

        Raises:
            UserError: another process has it, or the manifest is damaged.
        """
        key = self._key()
        if key in _HELD:
            _HELD[key].depth += 1
            try:
                yield
            finally:
                _HELD[key].depth -= 1
            return
        with _lock(self.folder):
            held = _Held(1, self.manifest())
            try:
                self._remove_temporaries()
                if held.manifest is not None:
                    self._tidy(held)
                _HELD[key] = held
                yield
            finally:
                _HELD.pop(key, None)
                # Where the disk is full this changes nothing: both hashes of what was written last are allowed then.
                if held.dirty and held.manifest is not None:
                    with suppress(UserError):
                        write_atomic(self.folder / manifests.NAME, held.manifest.dump())

    def process_at_work(self) -> str | None:
        """Return the number of the process that is at work on the run, or ``unknown``; None where none is."""
        from fastcifar.locks import LockedError, locked

        if not self.folder.is_dir():
            return None
        try:
            with locked(self.folder / ".lock"):
                return None
        except LockedError:
            return _owner(self.folder / OWNER)
        except OSError as error:
            refuse_disk(self.folder / ".lock", error)

    def _remove_temporaries(self) -> None:
        """Remove what a killed process was writing; also from a folder in which its run had not begun."""
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("*/.*.tmp"), *self.folder.glob("*/*/.*.tmp")]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else _remove(path)

    def _tidy(self, held: _Held) -> None:
        """Remove half checkpoints; find out which of two allowed contents each file has."""
        manifest = held.manifest
        assert manifest is not None
        for name, allowed in list(manifest.files.items()):
            if len(allowed) > 1:
                path = self.folder / name
                digest = sha256(self._bytes(path, None)) if path.is_file() else None
                if digest in allowed:
                    manifest.settle(name, digest)
                    held.dirty = True
        for folder in (self.folder / "checkpoints").glob("epoch-*"):
            if not any(f"checkpoints/{folder.name}/state.json" == name for name in manifest.files):
                shutil.rmtree(folder, ignore_errors=True)

    def commit(self, files: Mapping[str, bytes | str], remove: Iterable[str] = ()) -> None:
        """Write files, each whole or not at all, with their hashes in the manifest.

        Args:
            files: contents by name, written in this order.
            remove: names of files to remove, those of an end before anything is written, the others after it; a file
                that the run does not have may be among them.

        Raises:
            UserError: the disk is full or cannot be written; nothing half written stays.
        """
        with self.alone():
            held = _HELD[self._key()]
            if held.manifest is None:
                raise UserError(f"{self.folder}: has no {manifests.NAME}; an earlier version made it: start a new run")
            contents = {n: c.encode() if isinstance(c, str) else c for n, c in files.items()}
            temporaries = {name: _temporary(self.folder / name) for name in contents}
            try:
                self._commit(held, contents, temporaries, [n for n in remove if n in held.manifest.files])
                self.__dict__.pop("summary", None)
            except OSError as error:
                for temporary in temporaries.values():
                    _remove(temporary)
                path = self.folder / next(iter(files), manifests.NAME)
                self._require_folder(path)
                refuse_disk(path, error)

    def _commit(
        self, held: _Held, contents: dict[str, bytes], temporaries: dict[str, Path], remove: list[str]
    ) -> None:
        manifest = held.manifest
        assert manifest is not None
        for name, data in contents.items():
            # Never the run's own folder: one that was moved away would be begun anew, without what the run has so far.
            for parent in list(Path(name).parents)[-2::-1]:
                (self.folder / parent).mkdir(exist_ok=True)
            _write_synced(temporaries[name], data)
        hashes: dict[str, str | None] = {name: sha256(data) for name, data in contents.items()}
        for name, digest in [*hashes.items(), *((name, None) for name in remove)]:
            manifest.expect(name, digest)
        self._write_manifest(manifest)
        held.dirty = True
        # The files of an end first: a process killed in between leaves no summary beside later epochs.
        self._remove_files(manifest, [name for name in END if name in remove])
        for name in contents:
            temporaries[name].replace(self.folder / name)
            manifest.settle(name, hashes[name])
        self._remove_files(manifest, [name for name in remove if name not in END])

    def _remove_files(self, manifest: Manifest, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
            manifest.settle(name, None)
            if name.startswith("checkpoints/"):
                with suppress(OSError):  # not empty yet
                    (self.folder / name).parent.rmdir()

    def _write_manifest(self, manifest: Manifest) -> None:
        path = self.folder / manifests.NAME
        temporary = _temporary(path)
        try:
            _write_synced(temporary, manifest.dump())
            temporary.replace(path)
        except OSError:
            _remove(temporary)
            raise

    def check_weights(self) -> None:
        """Make sure before hours of training that the weights saved so far are there and intact.

        Those of the best epoch are written again only if a later epoch is better.

        Raises:
            UserError: a file is damaged or missing.
        """
        names = {f"weights/{path.name}" for path in (self.folder / "weights").glob("*.safetensors")}
        manifest = self.manifest()
        if manifest is not None:
            names |= {name for name in manifest.files if name.startswith("weights/") and self._expects(name)}
        for name in sorted(names):
            if not (self.folder / name).is_file():
                raise UserError(
                    f"{self.folder / name}: is missing, so that the run is damaged; restore it from a copy, "
                    "or train the run again"
                )
            self.read(name)

    @staticmethod
    def metrics_file(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
        """Return the name and content of ``metrics.jsonl`` for `commit`."""
        return {"metrics.jsonl": "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)}

    def write_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write ``metrics.jsonl``."""
        self.commit(self.metrics_file(rows))

    def append_epoch(self, row: dict[str, Any]) -> None:
        """Add one epoch to ``metrics.jsonl``."""
        self.write_metrics([*self.metrics(), row])

    def write_logits(self, arrays: dict[str, "np.ndarray"]) -> None:
        """Write ``logits.npz``."""
        from fastcifar.logits_file import write_arrays

        self.commit({"logits.npz": write_arrays(arrays)})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``, whose presence says that the run has ended, and the model card that tells it."""
        content = {"format": FORMAT, **summary}
        # The card first: a run whose summary is there is complete.
        self.commit({"README.md": self.model_card(content), "summary.json": as_json(content)})

    def model_card(self, summary: dict[str, Any] | None = None, weights: str | None = None) -> str:
        """Return the model card of a run; without ``summary`` that of the run as it ended.

        Args:
            summary: of a run that is ending.
            weights: which (``last``, ``best`` or ``selected``) are in the ``model.safetensors`` beside the card.
        """
        from fastcifar.model_card import model_card

        images = None
        with suppress(UserError):  # a run without logits is told without an interval
            images = len(self.logits("test/labels"))
        return model_card(self.recipe, summary or self.summary, self.environment, images, weights)

    def clear(self) -> None:
        """Delete the run directory."""
        shutil.rmtree(self.folder)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Take the lock of a run directory.

    Raises:
        AtWorkError: another process has it.
    """
    from fastcifar.locks import LockedError, locked

    owner = folder / OWNER
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock"))
        except LockedError:
            raise AtWorkError(
                f"{folder}: process {_owner(owner)} is at work on this run; wait until it ends, or stop it "
                "with Ctrl-C or `kill`: nothing is lost"
            ) from None
        except OSError as error:
            refuse_disk(folder / ".lock", error)
        # Beside the lock, not in it: on Windows nobody else can read a file that is locked. On a full disk the lock
        # holds without it.
        with suppress(OSError):
            owner.write_text(str(os.getpid()))
        stack.callback(_remove, owner)
        yield


def _owner(path: Path) -> str:
    """Return the number of the process that holds the lock, as far as it has said so."""
    try:
        return path.read_text() or "unknown"
    except OSError:
        return "unknown"


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return in words in which keys ``new`` differs from ``old``; keys that ``old`` does not know are left out."""
    found = []
    for key, value in old.items():
        other = new.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found += differences(value, other, f"{prefix}{key}.")
        elif value != other:
            found.append(f"{prefix}{key} is {json.dumps(other)[:100]}, was {json.dumps(value)[:100]}")
    return found
