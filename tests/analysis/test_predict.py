"""Prediction of image files against torch, torchvision's normalization and the saved logits."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastcifar.analysis.content import CIFAR10
from fastcifar.analysis.predict import load_trained, predict, predict_files, read_image
from fastcifar.errors import UserError
from fastcifar.models import build_model
from fastcifar.run_directory import RunDirectory
from tests.run_directories import add_weights, make_members


@pytest.fixture
def run(tmp_path):
    """A run with the weights of an untrained LeNet-5."""
    run = make_members(tmp_path, test=20)["m0"]
    add_weights(run, "last", build_model(run.recipe.model, seed=7).state_dict())
    return run


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def test_probabilities_are_those_of_the_model_under_torchvisions_normalization(run, images):
    normalize = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    batch = torch.stack([normalize(Image.fromarray(image)) for image in images])
    model = build_model(run.recipe.model, seed=7).eval()
    with torch.no_grad():
        expected = model(batch).softmax(1).numpy()
    np.testing.assert_allclose(predict(load_trained(run), images), expected, atol=1e-6)


def test_files_are_listed_with_their_most_probable_classes(run, images, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    probabilities = predict(load_trained(run), images, tta="flip")
    results = predict_files(load_trained(run), files, tta="flip", top=2)
    for result, file, p in zip(results, files, probabilities, strict=True):
        assert result["file"] == str(file)
        assert len(result["classes"]) == 2
        assert result["classes"][0]["probability"] == pytest.approx(float(p.max()))
    assert results[0]["classes"][0]["class"] in CIFAR10


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_size_and_mode_are_read(tmp_path, mode):
    Image.new(mode, (80, 50)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 32).shape == (32, 32, 3)


def test_what_is_no_image_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_image(tmp_path / "none.png", 32)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(tmp_path / "text.png", 32)


def test_sixteen_bit_grey_is_scaled(tmp_path):
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(tmp_path / "a.png")
    wanted = np.rint(grey / 257).astype(np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 32), np.repeat(wanted[..., None], 3, axis=2))


def test_a_file_that_would_start_another_program_is_refused(tmp_path, monkeypatch):
    """EPS bytes in a file called .jpg: PIL would hand them to Ghostscript."""
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: started.append(a))
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n")
    with pytest.raises(UserError, match="cannot be read as an image; known formats: PNG"):
        read_image(tmp_path / "a.jpg", 32)
    assert not started


@pytest.mark.timeout(60)
def test_bombs_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    import os
    from pathlib import Path

    os.mkfifo(tmp_path / "pipe.png")
    for side, name in ((10_000, "large.png"), (16_000, "larger.png")):
        Image.new("1", (side, side)).save(tmp_path / name)
    for path, wanted in (
        (tmp_path / "pipe.png", "is not a regular file"), (Path("/dev/zero"), "is not a regular file"),
        (tmp_path, "is not a regular file"), (tmp_path / "large.png", "64,000,000"),
        (tmp_path / "larger.png", "64,000,000"), (tmp_path / ("x" * 5000), "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=wanted):
            read_image(path, 32)


def test_damaged_images_are_refused_wherever_the_damage_is(tmp_path, rng):
    for suffix in ("png", "jpg", "webp", "bmp", "gif"):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(tmp_path / f"a.{suffix}")
        content = (tmp_path / f"a.{suffix}").read_bytes()
        for _ in range(30):
            bad = bytearray(content[: rng.integers(1, len(content) + 1)])
            bad[rng.integers(len(bad))] ^= int(rng.integers(1, 256))
            (tmp_path / "bad").write_bytes(bad)
            try:
                assert read_image(tmp_path / "bad", 32).shape == (32, 32, 3)
            except UserError as error:
                assert "bad: " in str(error)  # noqa: PT017


def test_missing_and_foreign_weights_are_refused(run):
    with pytest.raises(UserError, match="this run has: last"):
        load_trained(run, "best")
    add_weights(run, "last", {"other": torch.zeros(2)})
    with pytest.raises(UserError, match="cannot be loaded"):
        load_trained(RunDirectory.open(run.folder))
