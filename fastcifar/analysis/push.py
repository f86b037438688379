"""A trained run on the Hugging Face hub: its model card, weights and records, without logits and checkpoints."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastcifar.analysis.export import export_onnx, export_safetensors, export_torch
from fastcifar.analysis.predict import load_trained
from fastcifar.errors import UserError, plain
from fastcifar.locations import install_command
from fastcifar.run_directory import RunDirectory

RECORDS = ("recipe.toml", "environment.json", "metrics.jsonl", "summary.json")
WEIGHTS = "model.safetensors"


def stage(run: RunDirectory, folder: Path, which: str | None = None, onnx: bool = False) -> list[str]:
    """Put what is to be pushed into a folder; return the names of the files.

    Args:
        run: a training run that has ended.
        folder: empty.
        which: ``last``, ``best`` or ``selected`` weights; None takes ``selected`` where there is one, else ``last``.
        onnx: also write ``model.onnx`` and ``model.pt2``.

    Raises:
        UserError: there are no such weights, a file is damaged, the model cannot be exported, or the disk is full.
    """
    which = which or run.default_weights()
    trained = load_trained(run, which)
    contents = {"README.md": run.model_card(weights=which).encode(), **{name: run.read(name) for name in RECORDS}}
    with _disk_errors(folder):
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    export_safetensors(trained, folder / WEIGHTS)
    if onnx:
        export_onnx(trained, folder / "model.onnx")
        export_torch(trained, folder / "model.pt2")
    return sorted(path.name for path in folder.iterdir())


def push(
    run: RunDirectory, repo: str, *, which: str | None = None, onnx: bool = False, private: bool = False
) -> dict[str, Any]:
    """Create a model repository where there is none, and put the run into it as one commit.

    The token is what ``huggingface_hub`` finds: ``HF_TOKEN``, or that of ``hf auth login``. ``HF_ENDPOINT`` names
    another hub.

    Args:
        run: a training run that has ended.
        repo: ``NAME`` or ``OWNER/NAME``.
        which: see `stage`.
        onnx: see `stage`.
        private: make a new repository private.

    Returns:
        ``repo``, ``files``, and the ``url`` of the commit.

    Raises:
        UserError: the package is missing, the name is none, there is no token, the hub refuses, or see `stage`.
    """
    api = _api()
    with _temporary_folder() as folder:
        files = stage(run, folder, which, onnx)
        with _hub_errors(repo):
            made = api.create_repo(repo, private=private, exist_ok=True)
            message = f"Push {run.recipe.name} from fastcifar"
            commit = api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
    return {"repo": made.repo_id, "files": files, "url": commit.commit_url}


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Give an empty folder for the block.

    Raises:
        UserError: none can be made.
    """
    with ExitStack() as stack:
        with _disk_errors("the folder of temporary files"):
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastcifar-push-"))
        yield Path(name)


@contextmanager
def _disk_errors(where: Path | str) -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written, into one message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{where}: cannot be written: {error.strerror or error}; free some space there, or name another folder "
            "in TMPDIR"
        ) from None


def _api() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError(f"push needs huggingface_hub; install it: {install_command('hub')}") from None
    # Given here, because the package reads the variable once, when it is first imported.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="fastcifar")


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub or the network refuses into one message."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repo}: is no name of a repository: {plain(str(error), 200)}") from None
    except errors.LocalTokenNotFoundError:
        raise UserError("the hub wants a token: set HF_TOKEN, or log in with `hf auth login`") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        fix = "; set HF_TOKEN to a token that may write, or log in with `hf auth login`" if status in (401, 403) else ""
        raise UserError(f"{repo}: the hub refuses ({status}: {plain(str(error), 300)}){fix}") from None
    # Newer versions of the package speak through httpx, whose errors are its own, older ones through requests.
    except (OSError, RuntimeError, getattr(errors, "HTTPError", OSError)) as error:
        raise UserError(f"{repo}: the hub cannot be reached: {plain(str(error), 300)}") from None
