"""docs/keys.md: every key of a recipe and every argument of an augmentation, from the models that check recipes."""

import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fastcifar.config.json_schema import meaning
from fastcifar.config.operations import OPS, Op
from fastcifar.config.schema import CombineRecipe, Recipe


def keys_page() -> str:
    """Return the page of every key that a recipe may hold."""
    intro = (
        "# Every key of a recipe\n\nGenerated from `fastcifar/config/schema.py` by `make tables`. A key that is not "
        "here is an error, answered with the nearest right one. `fastcifar show RECIPE` prints a recipe with every "
        "default written out. The entries of `augment` have [a section of their own](#operations-of-augment)."
    )
    parts = [intro, "## A training", *_table_of(Recipe, ""), "## A combination", *_table_of(CombineRecipe, "")]
    return "\n\n".join([*parts, *_operations()]) + "\n"


def _operations() -> Iterator[str]:
    """Yield the section of what may stand in ``augment``."""
    yield "## Operations of `augment`"
    yield (
        "An entry of `augment` is the name of an operation; arguments follow in parentheses, by position or by name, "
        "as in a call in Python, and the others have their defaults. Text values take single quotes: "
        "`augment = [\"crop(4, pad='reflect')\", \"flip\", \"cutout(8, holes=2, inside=true)\"]`. "
        "`fastcifar augment preview RECIPE --out sheet.png` shows the result on images. "
        "Operations of your own are named by [import path](own-augmentation.md)."
    )
    for name, kind in OPS.items():
        yield from _operation(name, kind)


def _operation(name: str, kind: type[Op]) -> Iterator[str]:
    """Yield an operation's docstring and its arguments."""
    fields = {key: field for key, field in kind.model_fields.items() if key != "name"}
    yield f"### `{name}({', '.join(fields)})`"
    yield _doc(kind).strip()
    rows = ["| argument | values | default | what |", "| --- | --- | --- | --- |"]
    for key, field in fields.items():
        values, default = (cell(text).replace('"', "'") for text in (_kind(field), _default(field)))
        rows.append(f"| `{key}` | {values} | {default} | {cell(field.description or '')} |")
    yield "\n".join(rows) if fields else "It takes no arguments."


def _table_of(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield the docstring and the keys of a table, then its own tables."""
    yield _doc(model)
    rows = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    tables: list[tuple[str, type[BaseModel], bool]] = []
    for key, field in model.model_fields.items():
        found = list(_models(field.annotation))
        tables += [(f"{prefix}{key}", part, len(found) > 1) for part in found]
        if not found:
            what = _code(meaning(model, key))
            texts = _kind(field), _default(field), what[:1].upper() + what[1:]
            rows.append(f"| `{prefix}{key}` | {' | '.join(map(cell, texts))} |")
    if len(rows) > 2:
        yield "\n".join(rows)
    for name, part, one_of_many in tables:
        yield f"### `[{name}]`" + (f" of `name = {_named(part)}`" if one_of_many else "")
        yield from _table_of(part, f"{name}.")


def _doc(model: type[BaseModel]) -> str:
    """Return a table's docstring without its ``Attributes``, which the rows of the table have."""
    text, _, _ = (model.__doc__ or "").partition("\n    Attributes:\n")
    return _code(re.sub(r"\n +", "\n", text)).rstrip()


def _code(text: str) -> str:
    """Return a docstring's text as Markdown writes code."""
    return re.sub(r"``([^`]+)``", r"`\1`", text)


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
