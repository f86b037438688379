"""The walk through the code is true: its files and functions exist, and a run calls them."""

import ast
import re
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastcifar.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
WALK = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
FILE = re.compile(r"`([\w/]+/[\w.]+\.py)`")
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")


def walked() -> list[tuple[str, str]]:
    """Return the functions that the numbered lines name, as (file, qualified name)."""
    found = []
    for item in re.findall(r"^\d+\. (.*(?:\n   .*)*)", WALK, re.MULTILINE):
        file = FILE.match(item)[1]
        names = [name for name in NAME.findall(item) if not name.endswith((".py", ".jsonl"))]
        found += [(file, name) for name in names if name not in ("Batch",)]
    return found


def defined(file: str) -> set[str]:
    """Return the qualified names of a file's functions and methods."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in tree.body if isinstance(node, functions)}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return names | {f"{c.name}.{f.name}" for c in classes for f in c.body if isinstance(f, ast.FunctionDef)}


def test_every_file_named_exists():
    files = FILE.findall(WALK)
    assert len(files) > 12
    assert [file for file in files if not (ROOT / file).is_file()] == []
    for folder in ("kernels/sgd_ema", "kernels/augment"):  # named by their short names
        assert all((ROOT / "fastcifar" / folder / f"{name}.py").is_file() for name in ("triton", "cpu", "reference"))


@pytest.mark.parametrize(("file", "name"), walked(), ids=lambda part: part)
def test_every_function_named_exists(file, name):
    assert name in defined(file)


def test_the_functions_of_the_last_paragraph_exist():
    assert {"Results.add", "Results.finish"} <= defined("fastcifar/train/results.py")
    assert "EvaluationSet.metrics" in defined("fastcifar/train/evaluate.py")
    assert "Step.execute" in defined("fastcifar/train/step.py")


def test_from_the_command_to_the_optimizer_step_it_is_five_files():
    recipe = WALK.split("## One batch")[0]
    assert len(re.findall(r"^\d+\. ", recipe, re.MULTILINE)) == 5


def test_a_run_calls_what_the_walk_names(tmp_path):
    called = set()

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT / "fastcifar")):
            called.add((str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname))

    out = str(tmp_path / "run")
    words = ["run", "smoke/pyramid400", "--out", out, "--quiet", "--set", "engine.device=cpu", "--set",
             "data.source=synthetic", "--set", "data.loader.name=resident"]  # fmt: skip
    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        done = CliRunner().invoke(app, words)
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    assert done.exit_code == 0, done.output
    assert [step for step in walked() if step not in called] == []
