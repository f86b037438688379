"""A trained run for other programs: safetensors, torch.export or ONNX, each read back and run against the model."""

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcifar.analysis.predict import Trained
from fastcifar.errors import UserError, plain
from fastcifar.locations import install_command

TOLERANCE = 1e-3
OPSET = 18


class FromPixels(nn.Module):
    """Normalization and model in one: maps uint8 (B, S, S, 3) pixels to logits float32 (B, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model = trained.model
        self.register_buffer("mean", torch.tensor(trained.mean))
        self.register_buffer("std", torch.tensor(trained.std))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits for pixels in 0..255."""
        return self.model(((pixels.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2))


def export_safetensors(trained: Trained, path: Path) -> float:
    """Write the state dict under torch's names; the metadata holds classes, mean, std and image size as JSON.

    Returns:
        The largest difference of logits between the model and a copy of it with the weights of the file: 0.

    Raises:
        UserError: the file cannot be written, or the copy answers differently (the file is removed).
    """
    from safetensors.torch import load_file, save_file

    facts = {"classes": trained.classes, "mean": trained.mean, "std": trained.std, "image_px": trained.image_px}
    # Copies: tied weights have one memory under two names, which safetensors refuses.
    plain = torch.contiguous_format
    state = {name: tensor.clone(memory_format=plain) for name, tensor in trained.model.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    with _whole_or_absent(path) as temporary:
        save_file(state, temporary, metadata=metadata)
        copied = copy.deepcopy(trained.model)
        copied.load_state_dict(load_file(temporary))
        pixels = _random_pixels(trained.image_px, 7)
        theirs = FromPixels(dataclasses.replace(trained, model=copied)).eval()
        return _checked(path, "a copy with these weights", FromPixels(trained).eval(), theirs, pixels, 0.0)


def export_torch(trained: Trained, path: Path) -> float:
    """Write a ``torch.export`` program from uint8 pixels (batch, S, S, 3) to logits (batch, K).

    It needs no code of ours: read it with ``torch.export.load(path).module()``.

    Returns:
        The largest difference between the program's and the model's logits on random images, over the largest logit.

    Raises:
        UserError: torch cannot do it, the file cannot be written, or the difference is above 1e-3 (it is removed).
    """
    model = FromPixels(trained).eval()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parts of torch that the exporter itself uses
        try:
            program = torch.export.export(model, (_random_pixels(trained.image_px, 2),), dynamic_shapes=shapes)
        except Exception as error:  # of many kinds, which torch does not promise
            # What follows the first line are torch's own means of looking into it.
            reason = plain(str(error.__cause__ or error).strip().partition("\n")[0], 300)
            raise UserError(f"{path}: torch.export cannot trace this model: {reason}") from None
        with _whole_or_absent(path) as temporary:
            torch.export.save(program, temporary)
            read = torch.export.load(temporary).module()
            return _checked(path, "the program", model, read, _random_pixels(trained.image_px, 7), TOLERANCE)


@torch.inference_mode()
def _checked(path: Path, what: str, model: nn.Module, other: nn.Module, pixels: Tensor, tolerance: float) -> float:
    """Return the largest difference of logits, relative to the largest one.

    Raises:
        UserError: it is above the tolerance.
    """
    difference = relative_difference(other(pixels).numpy(), model(pixels).numpy())
    if difference <= tolerance:
        return difference
    raise UserError(f"{path}: {what} differs from the model by {difference:.1e} of the largest logit; not written")


def relative_difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Return the largest difference over the largest of ``ours``."""
    return float(np.abs(theirs - ours).max() / max(np.abs(ours).max(), 1e-6))


@contextmanager
def _whole_or_absent(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write, which takes its place once it is whole and is removed otherwise.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def export_onnx(trained: Trained, path: Path) -> float:
    """Write an ONNX model from uint8 pixels (batch, S, S, 3) to ``logits`` (batch, K) and check it with onnxruntime.

    Returns:
        The largest difference between onnxruntime's and torch's logits on random images, over the largest logit.

    Raises:
        UserError: a package is missing, torch cannot do it, or the difference is above 1e-3 (the file is removed).
    """
    runtime = _onnxruntime()
    model = FromPixels(trained).eval()
    program = _onnx_program(model, trained.image_px, path)
    with _whole_or_absent(path) as temporary:
        program.save(str(temporary), external_data=False)
        difference = onnx_difference(runtime, model, temporary, _random_pixels(trained.image_px, 7))
        if difference <= TOLERANCE:
            return difference
        raise UserError(f"{path}: onnxruntime differs from torch by {difference:.1e} of the largest logit; not written")


def _onnx_program(model: nn.Module, image_px: int, path: Path) -> torch.onnx.ONNXProgram:
    """Return a model as ONNX, for any batch of uint8 pixels (batch, S, S, 3).

    Raises:
        UserError: torch cannot do it.
    """
    example = _random_pixels(image_px, 2)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        # The exporter warns about its own use of deprecated parts of torch.
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model, (example,), dynamo=True, input_names=["pixels"], output_names=["logits"], opset_version=OPSET,
                dynamic_shapes=({0: batch},), verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            # The exporter's own text is of its stages; what went wrong is the first line of its cause.
            reason = plain(str(error.__cause__ or error).strip().partition("\n")[0], 300)
            raise UserError(f"{path}: torch could not turn this model into ONNX: {reason}") from None
    assert program is not None  # only the exporter without dynamo returns none
    return program


def _onnxruntime() -> Any:
    # When it is imported, onnxruntime writes an identity of this machine into the home directory, for its telemetry.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError:
        raise UserError(
            f"export to ONNX needs onnx, onnxscript and onnxruntime; install them: {install_command('export')}"
        ) from None
    return onnxruntime


def _random_pixels(image_px: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, image_px, image_px, 3), generator=generator, dtype=torch.uint8)


@torch.inference_mode()
def onnx_difference(runtime: Any, model: nn.Module, path: Path, pixels: Tensor) -> float:
    """Return the largest difference of logits between onnxruntime and torch, relative to the largest logit."""
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(["logits"], {"pixels": pixels.numpy()})
    return relative_difference(theirs, model(pixels).numpy())
