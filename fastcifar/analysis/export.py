"""A trained run for other programs: a torch state dict, or ONNX checked against torch."""

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
from fastcifar.errors import UserError
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


def export_safetensors(trained: Trained, path: Path) -> None:
    """Write the state dict under torch's names; the metadata holds classes, mean, std and image size as JSON.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors.torch import save_file

    facts = {"classes": trained.classes, "mean": trained.mean, "std": trained.std, "image_px": trained.image_px}
    state = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    with _whole_or_absent(path) as temporary:
        save_file(state, temporary, metadata=metadata)


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
        UserError: a package is missing, or the difference is above 1e-3 (the file is removed).
    """
    runtime = _onnxruntime()
    model = FromPixels(trained).eval()
    example = _random_pixels(trained.image_px, 2)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        # The exporter warns about its own use of deprecated parts of torch.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (example,), dynamo=True, input_names=["pixels"], output_names=["logits"], opset_version=OPSET,
            dynamic_shapes=({0: batch},), verbose=False,
        )  # fmt: skip
    if program is None:
        raise UserError(f"{path}: torch could not turn this model into ONNX")
    with _whole_or_absent(path) as temporary:
        program.save(str(temporary), external_data=False)
        difference = onnx_difference(runtime, model, temporary, _random_pixels(trained.image_px, 7))
        if difference <= TOLERANCE:
            return difference
        raise UserError(f"{path}: onnxruntime differs from torch by {difference:.1e} of the largest logit; not written")


def _onnxruntime() -> Any:
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
    ours = model(pixels).numpy()
    return float(np.abs(theirs - ours).max() / max(np.abs(ours).max(), 1e-6))
