"""Exports against torch: the state dict by value, ONNX through onnxruntime on real numbers of images."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastcifar.analysis import export
from fastcifar.analysis.export import FromPixels, _whole_or_absent, export_onnx, export_safetensors, export_torch
from fastcifar.analysis.predict import Trained
from fastcifar.errors import UserError
from fastcifar.models import build_model
from tests.run_directories import recipe

CLASSES = [f"class {i}" for i in range(10)]


def trained(model):
    built = build_model(recipe("r", model=model).model, seed=3).eval()
    return Trained(built, CLASSES, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], 32)


def test_safetensors_hold_the_state_dict_and_what_the_input_must_be(tmp_path):
    model = trained({"name": "deep_baseline_bn"})
    assert export_safetensors(model, tmp_path / "m.safetensors") == 0
    loaded = load_file(tmp_path / "m.safetensors")
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
    assert facts == {"classes": CLASSES, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "image_px": 32}


@pytest.mark.parametrize("model", [{"name": "lenet5"}, {"name": "wide_resnet", "widen": 1}])
def test_onnx_gives_torchs_logits_for_any_batch(tmp_path, model):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = trained(model)
    assert export_onnx(made, tmp_path / "m.onnx") < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        (logits,) = session.run(None, {"pixels": pixels})
        with torch.no_grad():
            expected = FromPixels(made)(torch.from_numpy(pixels)).numpy()
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_a_torch_program_gives_the_models_logits_for_any_batch(tmp_path):
    made = trained({"name": "lenet5"})
    assert export_torch(made, tmp_path / "m.pt2") < 1e-5
    program = torch.export.load(tmp_path / "m.pt2").module()
    for count in (1, 5):
        pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(program(pixels), FromPixels(made)(pixels), rtol=1e-4, atol=1e-5)


def test_weights_that_the_file_has_not_kept_are_refused(tmp_path, monkeypatch):
    model = trained({"name": "lenet5"})
    real = load_file

    def damaged(path):
        return {name: tensor + 1e-3 for name, tensor in real(path).items()}

    monkeypatch.setattr("safetensors.torch.load_file", damaged)
    with pytest.raises(UserError, match="differs from the model"):
        export_safetensors(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_model_that_torch_cannot_turn_into_onnx_is_one_message(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise torch.onnx.OnnxExporterError("Step 1 failed\n\n## Summary") from ValueError("data-dependent\nlonger")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    monkeypatch.setattr(export, "_onnxruntime", lambda: None)
    with pytest.raises(UserError, match=r"m\.onnx: torch could not turn this model into ONNX: data-dependent$"):
        export_onnx(trained({"name": "lenet5"}), tmp_path / "m.onnx")


class Branches(torch.nn.Module):
    """A model whose path depends on the values of its input."""

    def forward(self, images):
        return images.flatten(1)[:, :10] if float(images.sum()) > 0 else images.flatten(1)[:, 10:20]


def test_a_model_that_torch_cannot_trace_is_one_message(tmp_path):
    model = Trained(Branches(), CLASSES, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], 32)
    with pytest.raises(UserError, match=r"m\.pt2: torch\.export cannot trace this model: Could not guard on .*$"):
        export_torch(model, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_no_file(tmp_path):
    def fail() -> None:
        with _whole_or_absent(tmp_path / "a.onnx") as temporary:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        fail()
    assert not list(tmp_path.iterdir())


def test_onnxruntime_leaves_nothing_in_the_home_directory(tmp_path):
    pytest.importorskip("onnxruntime")
    others = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    # A stand-in for onnxscript, which takes seconds to import and is not what is asked about.
    code = "import sys; sys.modules['onnxscript'] = sys; from fastcifar.analysis import export; export._onnxruntime()"
    subprocess.run([sys.executable, "-c", code], env=others | {"HOME": str(tmp_path)}, check=True, timeout=300)
    assert not list(tmp_path.rglob("*onnxruntime*"))
