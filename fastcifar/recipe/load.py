"""Read a recipe file: ``extends``, ``--set``, validation, and errors that say what to write instead."""

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fastcifar.errors import UserError, nearest
from fastcifar.recipe.models import PRESETS, CombineRecipe, Recipe


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes (``recipes/`` beside the package)."""
    return Path(__file__).resolve().parents[2] / "recipes"


def shipped_recipes() -> list[Path]:
    """Return the files of the shipped ladder, smoke and beyond recipes, sorted by folder and name."""
    return sorted(recipes_folder().rglob("*.toml"), key=lambda p: (p.parent != recipes_folder(), p))


def find_recipe(name: str | Path) -> Path:
    """Return the file that ``name`` means: a path, or the name of a shipped recipe (``lenet5``, ``smoke/wrn-sgd``).

    Raises:
        UserError: there is no such file; the message lists the closest names.
    """
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a recipe file")
    if path.is_file():
        return path
    shipped = {p.relative_to(recipes_folder()).with_suffix("").as_posix(): p for p in shipped_recipes()}
    wanted = path.with_suffix("").as_posix() if path.suffix == ".toml" else path.as_posix()
    wanted = wanted.removeprefix("recipes/")
    if wanted in shipped:
        return shipped[wanted]
    close = difflib.get_close_matches(wanted, shipped, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"{name}: no such recipe file.{hint} `fastcifar recipes` lists the shipped ones.")


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe | CombineRecipe:
    """Read, extend, override and check a recipe.

    Args:
        name: a path or a shipped recipe's name.
        overrides: texts such as ``train.epochs=2``; values are TOML, a bare word counts as a string.

    Raises:
        UserError: with the file, the key path, what was wrong and what is allowed.
    """
    path = find_recipe(name)
    table = _read_extended(path, ())
    for text in overrides:
        _override(table, text)
    table.setdefault("name", path.stem)
    kind = CombineRecipe if "combine" in table else Recipe
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise UserError("\n".join(_explain(path, kind, e) for e in error.errors())) from None


def _read_extended(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return the file's table laid over those that it extends."""
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in seen)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from None
    if "extends" not in table:
        return table
    base = table.pop("extends")
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise UserError(f"{path}: extends: there is no file {base!r} beside it")
    return _merge(_read_extended(path.parent / base, (*seen, path.resolve())), table)


# What belongs to a file itself and is not handed down to those that extend it.
OWN_KEYS = ("name", "title", "published", "target")


def _merge(base: dict[str, Any], over: dict[str, Any], top: bool = True) -> dict[str, Any]:
    """Lay ``over`` on ``base``. A table that names another ``name`` starts afresh; ``false`` removes a table."""
    result = {k: v for k, v in base.items() if not (top and k in OWN_KEYS)}
    for key, value in over.items():
        old = result.get(key)
        if value is False and isinstance(old, dict):
            del result[key]
        elif isinstance(value, dict) and isinstance(old, dict) and value.get("name", old.get("name")) == old.get("name"):
            result[key] = _merge(old, value, top=False)
        else:
            result[key] = value
    return result


def _override(table: dict[str, Any], text: str) -> None:
    """Apply one ``key.path=value``."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f'--set {text}: expected key=value, for example "train.epochs=2"')
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    over: dict[str, Any] = {}
    *parents, last = key.strip().split(".")
    inner = over
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = parsed
    merged = _merge(table, over, top=False)
    table.clear()
    table.update(merged)


# ------------------------------------------------------------------------------------------------------------- errors


def _explain(path: Path, kind: type[BaseModel], error: Any) -> str:
    """Turn one pydantic error into ``file: key.path: what was wrong; what is allowed``."""
    where = [str(part) for part in error["loc"]]
    message = error["msg"].removeprefix("Value error, ")
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        allowed = _allowed_keys(kind, where[:-1])
        message = f"unknown key{nearest(where[-1], allowed)}; allowed: {', '.join(allowed)}"
    elif error["type"] == "missing":
        message = "is missing"
    elif error["type"] == "union_tag_invalid":
        names = [t.strip(" '") for t in context["expected_tags"].split(",")]
        names += list(PRESETS) if where == ["model"] else []
        where.append("name")
        message = f'unknown name "{context["tag"]}"{nearest(context["tag"], names)}; allowed: {", ".join(names)}'
    elif error["type"] == "union_tag_not_found":
        where.append("name")
        message = "is missing"
    elif error["type"] == "literal_error":
        names = [t.strip(" '") for t in context["expected"].replace(" or ", ", ").split(",")]
        message = f"{error['input']!r} is not allowed{nearest(str(error['input']), names)}; allowed: {', '.join(names)}"
    else:
        message = f"{error['input']!r}: {message}" if where else message
    return f"{path}: {_key_path(where)}{message}"


def _key_path(where: list[str]) -> str:
    """Join a location, leaving out the tags that pydantic adds for discriminated unions."""
    tagged = ("model", "optimizer")
    kept = [part for i, part in enumerate(where) if not (i == 1 and where[0] in tagged and part != "name" and len(where) > 2)]
    return f"{'.'.join(kept)}: " if kept else ""


def _allowed_keys(kind: type[BaseModel], where: list[str]) -> list[str]:
    """Return the keys of the table at ``where``, following nested models and union tags."""
    current: Any = kind
    for part in where:
        current = _step_into(current, part)
    return list(current.model_fields) if hasattr(current, "model_fields") else []


def _step_into(current: Any, part: str) -> Any:
    """Return the model below ``current`` that ``part`` (a key, or a union's tag) leads to."""
    if hasattr(current, "model_fields"):
        return current.model_fields[part].annotation if part in current.model_fields else None
    for option in getattr(current, "__args__", ()):
        if not hasattr(option, "model_fields"):
            continue
        tag = option.model_fields.get("name")
        if tag is not None and part in getattr(tag.annotation, "__args__", ()):
            return option
        if part in option.model_fields:
            return option.model_fields[part].annotation
    return None


# -------------------------------------------------------------------------------------------------------------- write


def to_toml(recipe: Recipe | CombineRecipe) -> str:
    """Return the resolved recipe as TOML text that `load_recipe` reads back to an equal recipe."""
    return "\n".join(_toml_lines(recipe.model_dump(exclude_none=True), "")) + "\n"


def _toml_lines(table: dict[str, Any], prefix: str) -> list[str]:
    """Write plain keys first, then each sub-table under its header."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{key}]", *_toml_lines(value, f"{prefix}{key}.")]
    return lines


def _toml_value(value: Any) -> str:
    """Write one value; JSON's strings, numbers, booleans and lists are TOML's."""
    import json

    return json.dumps(value, ensure_ascii=False)
