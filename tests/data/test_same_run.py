"""The same recipe on every loader ends with the same weights, to the bit."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from fastcifar.config.load import load_recipe
from fastcifar.data import loaders
from fastcifar.environment import describe
from fastcifar.run_directory import RunDirectory
from fastcifar.train.run import train

MODULES = {"ffcv": "ffcv", "dali": "nvidia.dali"}
REAL = os.environ.get("FASTCIFAR_DATA")


def weights(folder: Path, name: str) -> tuple[dict[str, bytes], dict]:
    """Train lenet5-kaiming for two epochs on a few images; return its last weights and what it said."""
    source = "cifar10" if REAL else "synthetic"
    recipe = load_recipe(
        "lenet5-kaiming",
        [
            f"data.source={source}",
            f"data.loader.name={name}",
            "data.subset=400",
            "data.test_subset=200",
            "train.epochs=2",
            'augment=["crop(4)", "flip", "cutout(8)"]',
            "engine.device=cpu",
        ],
    )
    torch.rand(len(name))  # the state of torch's own generator must not matter
    summary = train(recipe, RunDirectory.create(folder, recipe, describe()), quiet=True)
    return {k: v.tobytes() for k, v in load_file(folder / "weights" / "last.safetensors").items()}, summary


@pytest.fixture(scope="module")
def reference(cache, tmp_path_factory):
    return weights(tmp_path_factory.mktemp("runs") / "resident", "resident")


@pytest.mark.parametrize("name", ["ffcv", "dali", "torchvision"])
def test_every_loader_gives_the_same_run(reference, tmp_path, name):
    if name in MODULES and not loaders._installed(MODULES[name]):
        pytest.skip(f"{name} is not installed")
    ours, summary = weights(tmp_path / name, name)
    true, true_summary = reference
    assert (true_summary["loader"], summary["loader"]) == ("resident", name)
    assert ours == true
    assert summary["last"]["accuracy"] == true_summary["last"]["accuracy"]
