"""Progressive resizing: the images against Pillow's, the phases, whole runs, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastcifar.config.schema import LoaderConfig
from fastcifar.data.loaders import build_loader
from fastcifar.data.loaders.resized import ResizedLoader, first_epochs, phase_of, resize
from fastcifar.environment import describe
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from fastcifar.train.run import train
from tests.train.tiny import assert_same_run, recipe

PHASES = [(0.0, 24), (0.4, 28), (0.7, 32)]


@pytest.mark.parametrize("side_px", [12, 24, 28, 40])
def test_images_are_pillows_and_near_the_exact_average(rng: np.random.Generator, side_px: int) -> None:
    images = rng.integers(0, 256, (20, 32, 32, 3), np.uint8)
    images[0] = 255
    found = resize(torch.from_numpy(images), side_px)
    side, filters = (side_px, side_px), Image.Resampling.BILINEAR
    assert np.array_equal(found, [np.array(Image.fromarray(image).resize(side, filters)) for image in images])
    exact = F.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2).double(), side, mode="bilinear", antialias=True)
    # Pillow rounds after each of its two passes: half a level each.
    assert float((found - exact.permute(0, 2, 3, 1)).abs().max()) <= 1.1
    assert (found[0] == 255).all()


def test_a_phase_begins_with_the_epoch_in_which_its_share_has_passed() -> None:
    assert [phase_of(epoch, 10, PHASES) for epoch in range(10)] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [phase_of(epoch, 8, PHASES) for epoch in range(8)] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert first_epochs(range(10), 10, PHASES) == [0, 4, 7]
    assert first_epochs(range(5, 10), 10, PHASES) == [5, 7]


def test_batches_are_those_of_the_plain_loader_at_the_phases_size(synthetic_store) -> None:
    options = {"seed": 3, "batch_size": 32, "drop_last": False, "device": torch.device("cpu")}
    plain, inner = (build_loader(LoaderConfig(name="resident"), synthetic_store, None, **options) for _ in range(2))
    loader = ResizedLoader(inner, inner.images, PHASES, 3)
    for epoch, side_px in enumerate((24, 24, 28)):
        for ours, theirs in zip(loader.epoch(epoch), plain.epoch(epoch), strict=True):
            assert ours.images.shape[1:] == (side_px, side_px, 3)
            assert torch.equal(ours.rows, theirs.rows)
            assert torch.equal(ours.gathered(), resize(theirs.gathered(), side_px))
    loader.close()
    assert list(loader.epoch(0)) == []


def run_in(folder: Path, wanted, **options) -> None:
    there = (folder / "recipe.toml").exists()
    run = RunDirectory.open(folder) if there else RunDirectory.create(folder, wanted, describe())
    train(wanted, run, quiet=True, **options)


def test_a_run_resumes_across_sizes_to_the_same_bits(tmp_path: Path) -> None:
    data = {"source": "synthetic", "subset": 100, "test_subset": 50, "resize": [[0.0, 16], [0.5, 24]]}
    speed = {"name": "speednet", "widths": [8, 8, 8]}
    wanted = recipe(model=speed, data=data, train={"epochs": 2, "batch_size": 50})
    run_in(tmp_path / "whole", wanted)
    run_in(tmp_path / "parts", wanted, stop_after=1)
    run_in(tmp_path / "parts", wanted)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    other = recipe(model=speed, data=data | {"resize": []}, train={"epochs": 2, "batch_size": 50})
    run_in(tmp_path / "plain", other)
    weights = [(tmp_path / name / "weights/last.safetensors").read_bytes() for name in ("whole", "plain")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"resize": [[0.5, 24]]}}, "first must begin at 0"),
        ({"data": {"resize": [[0.0, 24], [0.0, 28]]}}, "each one after the last"),
        ({"data": {"resize": [[0.0, 24]]}, "model": {"name": "lenet5"}}, "made for one size"),
        ({"data": {"resize": [[0.0, 24]], "loader": {"name": "dali"}}}, "resident"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**({"model": {"name": "wide_resnet", "widen": 1}} | changes))


def test_images_too_small_for_the_model_are_refused(tmp_path: Path) -> None:
    data = {"source": "synthetic", "subset": 100, "resize": [[0.0, 6]]}
    wanted = recipe(model={"name": "speednet", "widths": [8, 8, 8]}, data=data, augment=[])
    with pytest.raises(UserError, match="9 px or more"):
        run_in(tmp_path / "run", wanted)
