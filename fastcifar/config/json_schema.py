"""The JSON Schema of a recipe file, from the pydantic models: for editors that complete and check as one types.

A file may extend others, so no key of a table is required, and an optional table may be ``false``; what the schema lets
pass, `load_recipe` still checks in full.
"""

import inspect
import json
import re
from typing import Any

from pydantic import BaseModel

from fastcifar.config import schema
from fastcifar.config.descriptions import DESCRIPTIONS
from fastcifar.config.operations import OPS
from fastcifar.config.schema import PRESETS, CombineRecipe, Recipe

DRAFT = "http://json-schema.org/draft-07/schema#"
"""What taplo and the editors that use it understand."""
EXTENDS = {
    "description": "What this recipe is laid over: files beside it, or names of shipped recipes.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 16}],
    "examples": ["wrn-asam", ["base.toml", "ema.toml"]],
}
OPERATION = {
    "type": "string",
    "description": f"An operation with its values: {', '.join(OPS)}; or an import path.",
    "pattern": rf"^\s*(({'|'.join(OPS)})\s*(\(.*\))?|[^()]+:[^()]+(\(.*\))?)\s*$",
    "examples": ["crop(4)", "flip", "cutout(16, p=0.5)", "mypkg.ops:Grid(3)"],
}


def recipe_schema() -> dict[str, Any]:
    """Return the schema as plain values."""
    definitions: dict[str, Any] = {}
    for kind in (Recipe, CombineRecipe):
        table = kind.model_json_schema()
        definitions |= table.pop("$defs") | {kind.__name__: table}
    for name, table in definitions.items():
        _describe(name, table)
    definitions = {name: _as_in_a_file(table) for name, table in definitions.items()}
    _write_short_forms(definitions)
    choice = {
        "if": {"required": ["combine"]},
        "then": {"$ref": "#/definitions/CombineRecipe"},
        "else": {"$ref": "#/definitions/Recipe"},
    }
    return {"$schema": DRAFT, "title": "A recipe of fastcifar", "type": "object", **choice, "definitions": definitions}


def schema_text() -> str:
    """Return the schema as the text that is shipped beside the recipes."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _describe(name: str, table: dict[str, Any]) -> None:
    """Give each key of a table its description and an example."""
    for key, entry in table["properties"].items():
        entry["description"] = meaning(getattr(schema, name), key)
        _, example = _known(name, key)
        default = entry.get("default")
        if example is not None and (default is None or f"{name}.{key}" in DESCRIPTIONS):
            entry["examples"] = [example]
        elif default is not None:
            entry["examples"] = [default]
        else:
            entry.setdefault("examples", [entry["enum"][0] if "enum" in entry else entry.get("const", 1)])


def meaning(kind: type[BaseModel], key: str) -> str:
    """Return what a key of a table means: its own line, or of its docstring's ``Attributes``, or the docstring's first.

    Args:
        kind: the model that checks the table.
        key: one of its fields.
    """
    text, _ = _known(kind.__name__, key)
    return text or _attributes(kind).get(key) or inspect.cleandoc(kind.__doc__ or "").partition("\n")[0]


def _known(name: str, key: str) -> tuple[str, Any]:
    """Return the description and example of a key: its own, else what it is in every table."""
    last = [f"*Config.{key}"] if name.endswith("Config") else []
    for place in (f"{name}.{key}", f"*.{key}", *last):
        if place in DESCRIPTIONS:
            return DESCRIPTIONS[place]
    return "", None


def _attributes(kind: type[BaseModel]) -> dict[str, str]:
    """Return the entries of a docstring's ``Attributes``."""
    _, _, listed = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", listed, re.MULTILINE)
    return {key: " ".join(text.split()) for key, text in found}


def _as_in_a_file(value: Any) -> Any:
    """Return a part of a model's schema as a recipe file may have it."""
    if isinstance(value, list):
        return [_as_in_a_file(item) for item in value]
    if not isinstance(value, dict):
        return value
    dropped = ("required", "discriminator", "title", "properties")
    kept = {k: _as_in_a_file(v) for k, v in value.items() if k not in dropped}
    if "properties" in value:  # whose keys are those of the table
        kept["properties"] = {key: _as_in_a_file(entry) for key, entry in value["properties"].items()}
    if isinstance(value.get("$ref"), str):
        kept["$ref"] = value["$ref"].replace("#/$defs/", "#/definitions/")
    if "oneOf" in kept:  # without its name, a table may be of several kinds
        kept["anyOf"] = kept.pop("oneOf")
    if "default" in kept and (kept["default"] is None or isinstance(kept["default"], dict)):
        del kept["default"]
    if {"type": "null"} in kept.get("anyOf", []):
        others = [item for item in kept["anyOf"] if item != {"type": "null"}]
        kept["anyOf"] = others + ([{"const": False}] if any("$ref" in item for item in others) else [])
    return kept


def _write_short_forms(definitions: dict[str, Any]) -> None:
    """Add what only a file can say: ``extends``, lists of augmentations, presets of models."""
    for name in ("Recipe", "CombineRecipe"):
        definitions[name]["properties"] |= {"extends": EXTENDS}
    definitions["AugmentConfig"]["properties"]["ops"]["items"] = OPERATION
    augment = definitions["Recipe"]["properties"]["augment"]
    short = {"type": "array", "items": OPERATION, "maxItems": 32}
    augment["anyOf"] = [short, {"$ref": augment.pop("$ref")}]
    for preset, options in PRESETS.items():
        _allow_name(definitions, options["name"], preset)
    definitions["UserModelConfig"]["properties"]["name"]["pattern"] = "^[^:]+:[^:]+$"
    definitions["UserOptimizerConfig"]["properties"]["name"]["pattern"] = "^[^:]+:[^:]+$"
    whole = {"if": {"not": {"required": ["extends"]}}, "then": {"required": ["model", "optimizer", "train"]}}
    definitions["Recipe"] |= whole


def _allow_name(definitions: dict[str, Any], name: str, preset: str) -> None:
    """Let the model of that name be called by a preset's name too."""
    for table in definitions.values():
        entry = table["properties"].get("name", {})
        if name == entry.get("const") or name in entry.get("enum", []):
            entry["enum"] = [*entry.get("enum", [entry.pop("const", name)]), preset]
