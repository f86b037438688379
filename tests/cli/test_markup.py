"""Names are printed as they are: what looks like rich's markup or an emoji code is neither an error nor left out."""

import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

CLASSES = ("[bold]", "[red]", ":x:")
RECIPE = """
title = "[/y] [red]"
[data]
source = "folder"
[model]
name = "lenet5"
[optimizer]
name = "adam"
lr = 1e-3
[train]
epochs = 1
batch_size = 4
[engine]
device = "cpu"
"""


@pytest.fixture
def fastcifar(tmp_path, monkeypatch):
    from fastcifar.cli.main import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> str:
        answer = CliRunner().invoke(app, list(words), catch_exceptions=False)
        assert answer.exit_code == 0, answer.output
        return answer.output

    return call


def test_every_command_prints_names_as_they_are(fastcifar, tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            folder = tmp_path / "[red]images" / split / f"x{name}"
            folder.mkdir(parents=True)
            for k in range(3):
                Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{k}.png")
    store, run = "[/y]/[red]store", "[/y]/[red]:x:run"
    (tmp_path / "tiny.toml").write_text(RECIPE)
    said = fastcifar("data", "convert", "folder", "--to", "raw", "--data", "[red]images", "--out", store)
    assert store in said
    assert store in fastcifar("data", "verify", store)
    assert store in fastcifar("data", "info", "folder", "--data", store)
    assert run in fastcifar("run", "tiny.toml", "--data", store, "--out", run)
    shutil.copytree(run, "[/y]/other")
    assert f"{run}/report.html" in fastcifar("report", run, "--data", store)
    assert "tiny" in fastcifar("compare", run, "[/y]/other")
    combined = "[/y]/[red]both"
    assert combined in fastcifar("ensemble", run, "[/y]/other", "--out", combined)
    picture = f"[red]images/test/x{CLASSES[1]}/0.png"
    said = fastcifar("predict", run, picture)
    assert picture in said
    assert all(f"x{name}" in said for name in CLASSES)
