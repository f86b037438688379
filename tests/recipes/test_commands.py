"""``fastcifar recipes`` and ``fastcifar show``."""

import json
import os
import re
import tomllib
from pathlib import Path
from unittest import mock

import pytest

from fastcifar.config import load_recipe
from tests import command


def fastcifar(*arguments, **environment):
    with mock.patch.dict(os.environ, environment):
        return command.fastcifar(*arguments, cwd=Path.cwd())


def test_recipes_lists_the_ladder_and_what_is_beyond_as_json():
    done = fastcifar("recipes", "--json")
    assert done.returncode == 0
    rows = {row["name"]: row for row in json.loads(done.stdout)["recipes"]}
    assert len([name for name in rows if "/" not in name]) == 37
    assert not [name for name in rows if name.startswith("smoke/")]
    wanted = {"stage": "5 wide residual", "model": "wide_resnet", "epochs": 200, "target": None}
    assert wanted.items() <= rows["wrn-200"].items()
    assert rows["wrn-200"]["published"] == {"best": 97.07, "last": 96.99}
    assert rows["beyond/speed94"]["target"] == 94.01
    assert rows["stacking"]["model"] == "3 models"
    assert all(row["ours"] for row in rows.values())


def test_recipes_prints_a_table_of_which_grep_finds_whole_rows():
    done = fastcifar("recipes", "pyramid4*")
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("pyramid400 ")]
    assert "pyramidnet" in row
    assert "97.70" in row
    assert "not measured yet" in done.stdout


def test_the_table_for_people_fits_a_narrow_terminal():
    lines = fastcifar("recipes", COLUMNS="80").stdout.splitlines()
    assert max(map(len, lines[:-3])) <= 80
    listed = [row["name"] for row in json.loads(fastcifar("recipes", "--json").stdout)["recipes"]]
    assert [name for name in listed if not any(line.startswith(f"{name} ") for line in lines)] == []
    (lenet5,) = [line for line in lines if line.startswith("lenet5 ")]
    assert re.search(r" 59\.48 +\d\d\.\d\d ± \d\.\d\d \(\d+\)$", lenet5.rstrip())


def test_recipes_finds_smoke_configs_when_asked():
    rows = json.loads(fastcifar("recipes", "smoke/*", "--json").stdout)["recipes"]
    assert len(rows) == 36


def test_recipes_without_a_match_is_a_user_error():
    done = fastcifar("recipes", "wrn-sdg")
    assert done.returncode == 2
    assert 'did you mean "wrn-sgd"' in done.stderr


def test_show_prints_a_recipe_that_can_be_run(tmp_path):
    done = fastcifar("show", "wrn-200", "--set", "train.epochs=3")
    assert done.returncode == 0
    assert tomllib.loads(done.stdout)["train"]["epochs"] == 3
    (tmp_path / "shown.toml").write_text(done.stdout)
    assert load_recipe(tmp_path / "shown.toml") == load_recipe("wrn-200", ["train.epochs=3"])


@pytest.mark.parametrize("name", ["lenet5", "stacking"])
def test_show_as_json(name):
    done = fastcifar("show", name, "--json")
    assert json.loads(done.stdout) == json.loads(load_recipe(name).model_dump_json())
