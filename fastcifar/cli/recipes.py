"""``fastcifar recipes`` and ``fastcifar show``: what can be trained, and what a recipe comes to."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastcifar.cli.options import Json, RecipeName, Settings

LEGEND = (
    "published: the best epoch, in percent of the test set; ≥: a target instead. ours: the last epoch, mean over so "
    "many (seeds) ± its standard error; empty where not measured yet. `fastcifar recipes --json` has more."
)


def recipes(
    match: Annotated[str, typer.Argument(help='Only names that match, such as "wrn-*" or "smoke/*".')] = "",
    json_: Json = False,
) -> None:
    """List the shipped recipes: name, stage, model, epochs, published accuracy, ours.

    Published: by the article "CIFAR-10 분류 모델 97.78% 달성하기" and its code, github.com/windopper/cifar (commit
    70ec89d).
    """
    from fastcifar.console import out

    rows = list_recipes(match)
    if json_:
        out({"recipes": rows})
    else:
        show_list(rows)


def show(
    recipe: RecipeName,
    set_: Settings = None,
    json_: Json = False,
) -> None:
    """Print the resolved recipe: every key with its value, what it extends and every default written out."""
    import sys

    from fastcifar.config import load_recipe, to_toml
    from fastcifar.console import out

    loaded = load_recipe(recipe, set_ or [])
    if json_:
        out(loaded.model_dump())
    else:
        sys.stdout.write(to_toml(loaded))


def list_recipes(match: str = "") -> list[dict[str, Any]]:
    """Return one object per shipped recipe, in the ladder's order; smoke configs only where ``match`` asks for them.

    Raises:
        UserError: nothing matches.
    """
    from fastcifar.ladder.records import read_records, result_rows
    from fastcifar.ladder.rows import catalogue, choose

    names = choose([match]) if match else [name for name in catalogue() if not name.startswith("smoke/")]
    results = result_rows(read_records())
    return [_row(name, results) for name in names]


def _row(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    from fastcifar.ladder.metrics import ours_in_short, ours_in_words, recorded
    from fastcifar.ladder.rows import catalogue

    recipe = catalogue()[name]
    found = recorded(recipe.name, results)
    published = recipe.published
    return {
        "name": name,
        "title": recipe.title,
        "stage": recipe.stage,
        **_size(recipe),
        "published": {"best": published.best, "last": published.last} if published else None,
        "target": getattr(recipe, "target", None),
        "ours": ours_in_words(found),
        "last": ours_in_short(found),
        "file": str(Path("recipes") / f"{name}.toml"),
    }


def _size(recipe: Any) -> dict[str, Any]:
    from fastcifar.config import CombineRecipe

    if isinstance(recipe, CombineRecipe):
        return {"model": f"{len(recipe.combine.members)} models", "epochs": None}
    return {"model": recipe.model.name, "epochs": recipe.train.epochs}


def show_list(rows: list[dict[str, Any]]) -> None:
    """Print the list for people."""
    from rich.table import Table

    from fastcifar.console import answers

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in ("name", "model", "epochs", "published", "ours"):
        # A long model's name gives way: 80 columns hold all the rest.
        table.add_column(column, no_wrap=True, max_width=14 if column == "model" else None)
    stage = None
    for row in rows:
        if row["stage"] != stage:
            stage = row["stage"]
            table.add_row(stage, style="bold")
        table.add_row(row["name"], row["model"], str(row["epochs"] or ""), _goal(row), row["last"])
    answers().print(table)
    answers().print(LEGEND, style="dim", soft_wrap=True)


def _goal(row: dict[str, Any]) -> str:
    """Return the published best, or the target of a row that has none."""
    if row["published"]:
        return f"{row['published']['best']:.2f}"
    return f"≥ {row['target']:.2f}" if row["target"] else ""
