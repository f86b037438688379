"""The JSON Schema of recipe files is the shipped one, describes every key, and takes every shipped recipe."""

import json
import tomllib

import jsonschema
import pytest

from fastcifar.config import recipes_folder
from fastcifar.config.json_schema import recipe_schema, schema_text
from tests.command import fastcifar

SCHEMA = recipe_schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
FILES = sorted(recipes_folder().rglob("*.toml"))


def errors(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(tomllib.loads(text))]


def test_the_shipped_one_is_the_generated_one():
    shipped = (recipes_folder() / "schema.json").read_text(encoding="utf-8")
    assert shipped == schema_text(), "a key has changed: `fastcifar schema --out recipes/schema.json`"


def test_it_is_a_schema_and_no_reference_leads_nowhere():
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    text = json.dumps(SCHEMA)
    assert "$defs" not in text
    for part in text.split("#/definitions/")[1:]:
        assert part.partition('"')[0] in SCHEMA["definitions"]


def test_every_key_is_described_with_an_example_that_it_takes():
    for name, table in SCHEMA["definitions"].items():
        for key, entry in table["properties"].items():
            assert len(entry.get("description", "")) > 5, (name, key)
            assert entry.get("examples"), (name, key)
            validator = jsonschema.Draft7Validator({**entry, "definitions": SCHEMA["definitions"]})
            for example in entry["examples"]:
                assert validator.is_valid(example), (name, key, example)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(recipes_folder()).as_posix())
def test_a_shipped_recipe_passes(file):
    text = file.read_text(encoding="utf-8")
    if file.name.startswith("_") and "extends" not in text:  # a part that others extend
        text = 'extends = "whole"\n' + text
    assert errors(text) == []


GOOD = """
model = { name = "pyramidnet110_a270", shakedrop = 0.5 }
optimizer = { name = "mypkg.opt:Lion", lr = 1e-3, options = { a = [1, "b"] } }
augment = { ops = ["crop(4, pad='reflect')", "mypkg.ops:Grid(3)"], where = "loader" }
asam = false
track = ["wandb"]
train = { epochs = 3 }
"""


def test_what_a_file_can_say_passes():
    assert errors(GOOD) == []
    assert errors('extends = ["a", "b.toml"]\ntrain = { batch_size = 3 }\nmix = { p = 0.5 }') == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("epochs = 3", "epochs = 0"),
        ("epochs = 3", "epoch = 3"),
        ("epochs = 3", 'epochs = "3"'),
        ('"wandb"', '"wandbb"'),
        ("shakedrop = 0.5", "shakedrop = 2.0"),
        ("pyramidnet110_a270", "pyramidnet110"),
        ("mypkg.opt:Lion", "lion"),
        ("crop(4, ", "crip(4, "),
        ('where = "loader"', 'where = "there"'),
        ("asam = false", "asam = true"),
        ("asam = false", "sam = false"),
        ("optimizer =", "optimiser ="),
    ],
)
def test_a_mistake_is_seen(old, new):
    assert old in GOOD
    assert errors(GOOD.replace(old, new))


def test_the_command_prints_writes_and_finds_it(tmp_path):
    assert json.loads(fastcifar("schema", cwd=tmp_path).stdout) == SCHEMA
    assert fastcifar("schema", "--out", "s.json", cwd=tmp_path).returncode == 0
    assert (tmp_path / "s.json").read_text() == schema_text()
    assert fastcifar("schema", "--path", cwd=tmp_path).stdout.strip() == str(recipes_folder() / "schema.json")


def test_completion_offers_recipes_and_files(tmp_path, monkeypatch):
    from fastcifar.cli.completion import recipe_names

    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrn-mine.toml").touch()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.toml").touch()
    assert {"wrn-asam", "wrn-sgd", "wrn-mine.toml"} <= set(recipe_names("wrn-"))
    assert "smoke/wrn-sgd" in recipe_names("smoke/w")
    assert recipe_names("rec") == ["recipes/"]
    assert recipe_names("recipes/") == ["recipes/a.toml"]
    assert "lenet5" in recipe_names("")
