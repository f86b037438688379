"""``fastcifar augment preview``."""

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastcifar.cli.augment import app, seen
from fastcifar.config import load_recipe
from fastcifar.errors import UserError

SYNTHETIC = ["--set", "data.source=synthetic"]


def run(*arguments):
    return CliRunner().invoke(app, ["preview", *arguments], catch_exceptions=False)


def test_a_sheet_and_its_description(synthetic_store, tmp_path):
    path = tmp_path / "sheet.png"
    result = run("aug-cutout-aa", "--out", str(path), "--count", "3", "--epochs", "2", "--json", *SYNTHETIC)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["epochs"] == [0, 1]
    assert json.loads(result.stdout)["augment"][2] == "autoaugment"
    with Image.open(path) as picture:
        assert picture.size == (3 * 98 + 10, 3 * 98 + 2)


def test_the_first_column_is_the_originals(synthetic_store):
    columns = seen(load_recipe("aug-cutmix", ["data.source=synthetic"]), None, 4, range(2))
    np.testing.assert_array_equal(columns[0], np.array(synthetic_store.split("train").images[:4]))
    assert len(columns) == 3
    assert not np.array_equal(columns[1], columns[2])


def test_the_fill_is_the_mean_colour_as_in_training(synthetic_store):
    words = ["data.source=synthetic", "augment=[\"cutout(16, fill='mean', inside=true)\"]"]
    recipe = load_recipe("beyond/speed96", words)
    fill = np.round(255 * np.array(recipe.data.mean)).astype(int)
    _, shown = seen(recipe, None, 4, range(1))
    for image in shown:
        assert (np.abs(image.astype(int) - fill).max(2) <= 1).sum() >= 16 * 16


def test_no_operations_show_the_originals(synthetic_store):
    columns = seen(load_recipe("lenet5", ["data.source=synthetic"]), None, 4, range(1))
    np.testing.assert_array_equal(columns[0], columns[1])


def test_bad_input(synthetic_store, tmp_path):
    with pytest.raises(UserError, match="combines runs"):
        run("ensemble-soft")
    with pytest.raises(UserError, match="could not be written"):
        run("lenet5", "--out", str(tmp_path / "missing" / "x.png"), *SYNTHETIC)
    for name in ("sheet.nonsense", "sheet.psd", "sheet"):  # of these, Pillow knows psd, but only to read
        with pytest.raises(UserError, match="could not be written"):
            run("lenet5", "--out", str(tmp_path / name), *SYNTHETIC)


def test_a_full_disk_leaves_the_picture_before_and_nothing_half_written(synthetic_store, tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"the picture before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        run("lenet5", "--out", str(path), *SYNTHETIC)
    assert path.read_bytes() == b"the picture before"
    assert list(tmp_path.iterdir()) == [path]
