"""docs/keys.md: every key that a recipe may hold, from the models that check recipes."""

import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fastcifar.config.schema import CombineRecipe, Recipe


def keys_page() -> str:
    """Return the page of every key that a recipe may hold."""
    intro = (
        "# Every key of a recipe\n\nGenerated from `fastcifar/config/schema.py` by `make tables`. A key that is not "
        "here is an error, answered with the nearest right one. `fastcifar show RECIPE` prints a recipe with every "
        "default written out."
    )
    parts = [intro, "## A training", *_table_of(Recipe, ""), "## A combination", *_table_of(CombineRecipe, "")]
    return "\n\n".join(parts) + "\n"


def _table_of(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield the docstring and the keys of a table, then its own tables."""
    yield _doc(model)
    rows = ["| key | what | default |", "| --- | --- | --- |"]
    tables: list[tuple[str, type[BaseModel], bool]] = []
    for key, field in model.model_fields.items():
        found = list(_models(field.annotation))
        tables += [(f"{prefix}{key}", part, len(found) > 1) for part in found]
        if not found:
            rows.append(f"| `{prefix}{key}` | {cell(_kind(field))} | {cell(_default(field))} |")
    if len(rows) > 2:
        yield "\n".join(rows)
    for name, part, one_of_many in tables:
        yield f"### `[{name}]`" + (f" of `name = {_named(part)}`" if one_of_many else "")
        yield from _table_of(part, f"{name}.")


def _doc(model: type[BaseModel]) -> str:
    return re.sub(r"``([^`]+)``", r"`\1`", re.sub(r"\n +", "\n", model.__doc__ or ""))


def _named(model: type[BaseModel]) -> str:
    """Return the names that choose a table of several."""
    field = model.model_fields.get("name")
    return cell(_kind(field)) if field else model.__name__


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the tables that a key may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from _models(part)


def _kind(field: FieldInfo) -> str:
    """Return the values that a key may have, in a few words."""
    bounds = [words for item in field.metadata if (words := _bound(item))]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(json.dumps(part) for part in parts)
    if origin is typing.Annotated:
        bounds = [words for item in parts[1:] for words in _bounds_of(item)]
        return " ".join([_type(parts[0]), *(f"({', '.join(bounds)})" for _ in bounds[:1])])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in parts if part is not type(None))
    if origin in (list, tuple):
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"table of {_type(parts[1])}"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", typing.Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds_of(item: Any) -> list[str]:
    nested = item.metadata if isinstance(item, FieldInfo) else [item]
    return [words for entry in nested if (words := _bound(entry))]


def _bound(item: Any) -> str:
    """Return a bound in words; empty for what is none."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}
    found = [(word, getattr(item, key, None)) for key, word in words.items()]
    return ", ".join(f"{word} {value:,}" for word, value in found if value is not None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    return "none" if value is None else f"`{json.dumps(value, default=str)}`"


def cell(text: str) -> str:
    """Return text as it may stand in a table's cell."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")
