"""Read a recipe file: ``extends``, ``--set``, validation, and errors that say what to write instead."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastcifar.config.explain import explain_all
from fastcifar.config.schema import MAX_NAME, CombineRecipe, Recipe
from fastcifar.config.toml import MAX_DEPTH, parse_toml, read_toml, write_toml
from fastcifar.config.user_code import check_user_code
from fastcifar.errors import UserError, nearest, plain, shown
from fastcifar.locations import recipes_folder


def shipped_recipes() -> list[Path]:
    """Return the files of the shipped ladder, smoke and beyond recipes, sorted by folder and name.

    A file whose name starts with ``_`` is a part that recipes extend, not a recipe.
    """
    files = [p for p in recipes_folder().rglob("*.toml") if not p.name.startswith("_")]
    return sorted(files, key=lambda p: (p.parent != recipes_folder(), p))


def find_recipe(name: str | Path) -> Path:
    """Return the file that ``name`` means: a path, or a shipped recipe's name (``lenet5``, ``smoke/wrn-sgd``).

    The folder may be left out where only one recipe has that name: ``speed94`` is ``beyond/speed94``.

    Raises:
        UserError: there is no such file, or several recipes have the name; the message lists the closest ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    found = _find_shipped(name)
    if found:
        return found
    if path.is_dir():  # only now: a folder called smoke, such as a run's, does not hide the recipe
        raise UserError(f"{path}: is a folder, not a recipe file")
    close = difflib.get_close_matches(_without_suffix(path), shipped_by_name(), n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"{name}: no such recipe file.{hint} `fastcifar recipes` lists the shipped ones.")


def shipped_by_name() -> dict[str, Path]:
    """Return the files of the shipped recipes by the names that commands take (``lenet5``, ``beyond/speed94``)."""
    return {p.relative_to(recipes_folder()).with_suffix("").as_posix(): p for p in shipped_recipes()}


def _find_shipped(name: str | Path) -> Path | None:
    """Return the shipped recipe of that name, in full or without its folder; None where there is none.

    Raises:
        UserError: several recipes in different folders have the name.
    """
    wanted, shipped = _without_suffix(Path(name)), shipped_by_name()
    if wanted in shipped:
        return shipped[wanted]
    found = [full for full in shipped if full.endswith(f"/{wanted}")]
    if len(found) > 1:
        raise UserError(f"{name}: could be {' or '.join(found)}; write the folder too, for example {found[0]}")
    return shipped[found[0]] if found else None


def _without_suffix(path: Path) -> str:
    """Return a recipe's name from what may be typed for it: ``recipes/lenet5.toml`` is ``lenet5``."""
    name = path.with_suffix("") if path.suffix == ".toml" else path
    return name.as_posix().removeprefix("recipes/")


def load_recipe(
    name: str | Path, overrides: Iterable[str] = (), *, user_code: bool = True
) -> Recipe | CombineRecipe:
    """Read, extend, override and check a recipe.

    Args:
        name: a path or a shipped recipe's name.
        overrides: texts such as ``train.epochs=2``; values are TOML, a bare word counts as a string.
        user_code: import what the recipe names by import path, and check its options.

    Raises:
        UserError: with the file, the key path, what was wrong and what is allowed.
    """
    _check_name(name)
    path = find_recipe(name)
    table = _read_extended(path, (), {})
    for text in overrides:
        _override(table, text)
    table.setdefault("name", plain_name(path.stem))
    kind = CombineRecipe if "combine" in table else Recipe
    table = {k: v for k, v in table.items() if not (v is False and k in OPTIONAL_TABLES)}
    try:
        recipe: Recipe | CombineRecipe = kind.model_validate(table)
        if user_code:
            check_user_code(recipe)
        return recipe
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=True)
        raise UserError(explain_all(path, kind, problems)) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


MAX_EXTENDS = 16


def _check_name(name: str | Path) -> None:
    """Refuse what is no file name at all, and files that may never end (pipes, devices)."""
    try:
        path = Path(name)
        special = path.exists() and not (path.is_file() or path.is_dir())
    except (OSError, ValueError):
        raise UserError(f"{plain(str(name))}: no such recipe file") from None
    if special:
        raise UserError(f"{path}: is not a regular file")
    if "\0" in str(name):
        raise UserError(f"{shown(str(name))}: no such recipe file")


def plain_name(stem: str) -> str:
    """Return the name of a recipe that has none of its own: its file's, with what a name may not hold replaced."""
    return re.sub(r"[^\w.+-]+", "-", stem).strip("-.+")[:MAX_NAME] or "recipe"


def _read_extended(path: Path, seen: tuple[Path, ...], known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """Return the file's table laid over those that it extends, the first of them lowest.

    Args:
        path: the file.
        seen: the files that led here.
        known: the tables of files that were read already: each is read once, however many extend it.
    """
    if path.resolve() in known:
        return known[path.resolve()]
    if len(seen) > MAX_EXTENDS:
        raise UserError(f"{seen[0]}: extends goes on for more than {MAX_EXTENDS} files")
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in (*seen, path))}")
    table = _read_file(path)
    result: dict[str, Any] = {}
    for base in find_bases(path, table.pop("extends", [])):
        result = _merge(result, _read_extended(base, (*seen, path.resolve()), known))
    known[path.resolve()] = _merge(result, table)
    return known[path.resolve()]


def _read_file(path: Path) -> dict[str, Any]:
    """Return one file's table, with ``augment = [...]`` written out as the table that it stands for."""
    table = read_toml(path)
    if isinstance(table.get("augment"), list):
        table["augment"] = {"ops": table["augment"]}
    return table


def find_bases(path: Path, extends: Any) -> list[Path]:
    """Return the files that a recipe extends.

    Args:
        path: the recipe's own file.
        extends: the value of its key ``extends``, or a list of them: a file beside the recipe (``base.toml``,
            ``../base.toml``), or else the name of a shipped recipe (``wrn-asam``).

    Raises:
        UserError: it names neither.
    """
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path}: extends: {shown(extends)} is neither a file name nor a list of them')
    _check_bases(path, names)
    return [_find_base(path, name) for name in names]


def _find_base(path: Path, name: str) -> Path:
    beside = path.parent / name
    if beside.is_file():
        return beside
    try:
        shipped = _find_shipped(name)
    except UserError as error:
        raise UserError(f"{path}: extends: {error}") from None
    if shipped:
        return shipped
    there = [*(p.name for p in beside.parent.glob("*.toml")), *shipped_by_name()]
    guess = nearest(name if name in there else Path(name).name, there)
    what = f'there is no file "{plain(name)}" beside it, and no shipped recipe of that name'
    raise UserError(f"{path}: extends: {what}{guess}")


def _check_bases(path: Path, names: list[str]) -> None:
    """Refuse names that cannot be files, and too many of them."""
    if len(names) > MAX_EXTENDS:
        raise UserError(f"{path}: extends: {len(names):,} files; at most {MAX_EXTENDS}")
    for name in names:
        try:
            _check_name(path.parent / name)
        except UserError as error:
            raise UserError(f"{path}: extends: {error}") from None


# What belongs to a file itself and is not handed down to those that extend it.
OWN_KEYS = ("name", "title", "published", "target")
# Where ``false`` means that there is none.
OPTIONAL_TABLES = ("mix", "asam", "ema", "lookahead", "distill", "select", "published")


def _merge(base: dict[str, Any], over: dict[str, Any], top: bool = True) -> dict[str, Any]:
    """Lay ``over`` on ``base``. A table that names another ``name`` starts afresh; ``false`` removes a table."""
    result = {k: v for k, v in base.items() if not (top and k in OWN_KEYS)}
    for key, value in over.items():
        old = result.get(key)
        if value is False and isinstance(old, dict):
            del result[key]
        elif isinstance(value, dict) and isinstance(old, dict) and value.get("name") in (None, old.get("name")):
            result[key] = _merge(old, value, top=False)
        else:
            result[key] = value
    return result


def _override(table: dict[str, Any], text: str) -> None:
    """Apply one ``key.path=value``."""
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise UserError(f'--set {plain(text)}: expected key=value, for example "train.epochs=2"')
    if len(path) > MAX_DEPTH:
        raise UserError(f"--set {plain(text)}: is nested more than {MAX_DEPTH} levels deep")
    over = _parse_value(text, value.strip())
    for i, part in reversed(list(enumerate(path))):
        over = {"ops": over} if i == 0 and part == "augment" and isinstance(over, list) else over
        over = {part: over}
    for i in range(1, len(path)):
        _need_table(table, path[:i], text)
    merged = _merge(table, over, top=False)
    table.clear()
    table.update(merged)


def _parse_value(text: str, value: str) -> Any:
    """Read a TOML value; a bare word is a string."""
    if not value:
        raise UserError(f"--set {plain(text)}: there is no value after the equals sign")
    try:
        parsed = parse_toml(f"value = {value}")
    except ValueError:
        if value[0] in "[{'\"":
            quoted = "; a shell takes quotes away: --set 'augment=[\"crop(4)\"]'" if value[0] in "[{" else ""
            raise UserError(f"--set {plain(text)}: {plain(value)} is not a valid TOML value{quoted}") from None
        return value
    except UserError as error:
        raise UserError(f"--set {plain(text)}: {error}") from None
    return parsed["value"]


def _need_table(table: dict[str, Any], path: list[str], text: str) -> None:
    """Refuse to write below a plain value, as ``seed.x=1`` would."""
    current: Any = table
    for part in path:
        current = current.get(part, {})
        if not isinstance(current, dict):
            if current is False:
                return
            below = ".".join(path)
            raise UserError(f"--set {plain(text)}: {below} is a value ({shown(current)}), not a table with keys")


# -------------------------------------------------------------------------------------------------------------- write


def to_toml(recipe: Recipe | CombineRecipe) -> str:
    """Return the resolved recipe as TOML text that `load_recipe` reads back to an equal recipe."""
    return write_toml(recipe.model_dump(exclude_none=True))
