"""Checkpoints: one folder each, ``state.safetensors`` and ``state.json``, complete or absent."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastcifar.errors import UserError
from fastcifar.run_directory import refuse_disk


def save(folder: Path, epoch: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> None:
    """Write the checkpoint of ``epoch`` and delete all but the newest ``keep``.

    The folder is written under another name and renamed, so that it is whole whenever it has its name.

    Args:
        folder: the run's ``checkpoints`` folder.
        epoch: number of finished epochs.
        tensors: flat names to tensors; moved to the CPU here.
        state: plain values, stored as JSON.
        keep: 1 or more.

    Raises:
        UserError: the disk is full or not writable; older checkpoints are untouched.
    """
    target, temporary = folder / f"epoch-{epoch:05d}", folder / f".epoch-{epoch:05d}.tmp"
    if target.exists():  # a run stopped at this border before; every run of it is the same to the bit
        return
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(state))
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        temporary.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        refuse_disk(target, error if isinstance(error, OSError) else OSError(0, str(error)))
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a run's ``checkpoints`` folder, oldest first."""
    return sorted(folder.glob("epoch-*")) if folder.is_dir() else []


def load(checkpoint: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Raises:
        UserError: it is damaged; the message names it and says to delete it.
    """
    try:
        return load_file(checkpoint / "state.safetensors", device), json.loads((checkpoint / "state.json").read_text())
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"{checkpoint}: is damaged ({error}); delete this folder to resume from the one before it, or start afresh"
        ) from None


def _sync(path: Path) -> None:
    """Have the system write a file or folder to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
