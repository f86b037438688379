"""The examples run as they are, on synthetic images: the scripts whole, the notebook cell by cell."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("own_loop.py", "epoch 2: loss"),
        ("train_a_recipe.py", "logits of the test set: (500, 10)"),
        ("sam_and_ema.py", "averaged weights:"),
    ],
)
def test_a_script_runs(script, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert said in capsys.readouterr().out


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "the notebook is kept without outputs"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["accuracy"] == pytest.approx(names["run"].summary["last"]["accuracy"])
    assert names["strip"].shape == (32, 256, 3)


def test_nothing_is_missing_here():
    tested = {"own_loop.py", "train_a_recipe.py", "sam_and_ema.py", "tour.ipynb"}
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested
