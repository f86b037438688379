"""What a recipe and its data must agree on: one message at the start, before a run directory is made."""

import numpy as np
import pytest

from fastcifar.cli.run_command import run
from fastcifar.config import Recipe
from fastcifar.config.schema import DataConfig
from fastcifar.data import store as stores
from fastcifar.data.formats import Split
from fastcifar.errors import UserError
from fastcifar.train.checks import check_before
from tests.train.tiny import TABLE


def message(place=None, /, **changes) -> str:
    with pytest.raises(UserError) as caught:
        check_before(Recipe.model_validate(TABLE | changes), place)
    return str(caught.value)


@pytest.mark.parametrize("per", ["epoch", "step"])
def test_fewer_images_than_a_batch(synthetic_store, per):
    said = message(train={"epochs": 4, "batch_size": 201, "drop_last": True}, schedule={"name": "cosine", "per": per})
    assert "200 training images make no whole batch of train.batch_size = 201" in said
    check_before(Recipe.model_validate(TABLE | {"train": {"epochs": 4, "batch_size": 200, "drop_last": True}}), None)


def test_a_batch_larger_than_the_images(synthetic_store):
    data = {"source": "synthetic", "subset": 100, "holdout": 20}
    said = message(data=data, train={"epochs": 4, "batch_size": 81})
    assert "train.batch_size = 81 is larger than the 80 training images" in said
    assert "80 or less" in said
    check_before(Recipe.model_validate(TABLE | {"data": data, "train": {"epochs": 4, "batch_size": 80}}), None)


def test_weights_for_other_classes(synthetic_store, folder):
    loss = {"class_weights": [1.0, 2.0]}
    source = {"source": "folder"}
    assert "2 weights for the 3 classes" in message(folder(16, 16), data=source, loss=loss)


@pytest.fixture
def folder(tmp_path):
    """Make a store of images of any shape, as an image folder would give it."""

    def make(height: int, width: int):
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (12, height, width, 3), np.uint8)
        splits = {name: Split(images, np.arange(12) % 3) for name in ("train", "test")}
        data = stores.DataSet(splits, ["a", "b", "c"], {"kind": "folder", "path": "x", "fingerprint": "0" * 64}, [])
        stores._write(data, "raw", tmp_path / "set", stores.no_progress)
        return tmp_path / "set"

    return make


@pytest.mark.parametrize("name", ["lenet5", "deep_baseline", "deep_baseline_bn", "residual5"])
def test_images_that_are_not_square(folder, name):
    said = message(folder(20, 24), data={"source": "folder"}, model={"name": name})
    assert "24x20 pixels" in said
    assert "square" in said


@pytest.mark.parametrize(("name", "smallest"), [("lenet5", 16), ("speednet", 9)])
def test_images_that_are_too_small(folder, name, smallest):
    assert f"needs {smallest} px or more" in message(folder(8, 8), data={"source": "folder"}, model={"name": name})


@pytest.mark.parametrize(
    ("name", "shape", "said"), [("speednet", (8, 8), "needs 9 px or more"), ("lenet5", (20, 24), "needs square ones")]
)
def test_images_that_the_net_that_selects_cannot_take(folder, name, shape, said):
    select = {"model": {"name": name}, "share": 0.5, "every": 1}
    found = message(folder(*shape), data={"source": "folder"}, model={"name": "wide_resnet"}, select=select)
    assert f"select.model.name = {name!r} {said}" in found


@pytest.mark.parametrize("name", ["residual15", "wide_resnet", "pyramidnet", "speednet"])
def test_models_that_take_any_shape(folder, name):
    import torch

    from fastcifar.models import build_model

    train = {"epochs": 4, "batch_size": 12}
    recipe = Recipe.model_validate(TABLE | {"data": {"source": "folder"}, "model": {"name": name}, "train": train})
    check_before(recipe, folder(20, 24))
    with torch.device("meta"):
        model = build_model(recipe.model, num_classes=3, image_px=20, seed=0)
    assert model.eval()(torch.zeros(1, 3, 20, 24, device="meta")).shape == (1, 3)


def test_an_operation_larger_than_the_images(folder):
    said = message(folder(20, 20), data={"source": "folder"}, augment=["crop(20)"])
    assert "20 px" in said


def test_no_run_directory_is_made(tmp_path, monkeypatch, synthetic_store):
    monkeypatch.chdir(tmp_path)
    overrides = ["data.source=synthetic", "data.subset=10", "train.drop_last=true", "engine.device=cpu"]
    with pytest.raises(UserError, match="make no whole batch"):
        run("lenet5", overrides)
    assert list(tmp_path.iterdir()) == []


def test_data_beside_synthetic_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'--data .*nope: .*data\.source = "synthetic"'):
        stores.resolve_store(DataConfig(source="synthetic"), tmp_path / "nope")
