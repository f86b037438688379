"""``fastcifar compare``: runs side by side."""

from typing import Any

from fastcifar.cli.options import Json, RunFolders


def compare(
    runs: RunFolders,
    json_: Json = False,
) -> None:
    """Show runs in one table: mean and standard error over the seeds of a recipe, and McNemar's exact test.

    The test asks whether a run and the first one are equally often right on the same test images (last epoch).

    Unfinished runs are left out of the means; a recipe that has no other run shows them one by one. Of several runs
    with one recipe and one seed the newest counts.
    """
    from fastcifar.console import out, say
    from fastcifar.errors import UserError
    from fastcifar.run_directory import RunDirectory

    if len(runs) < 2:
        raise UserError("RUN...: a comparison needs at least two run directories")
    opened = [RunDirectory.open(folder) for folder in runs]
    # After the directories are known to be there: it imports numpy, and a mistyped path is answered without it.
    from fastcifar.analysis.compare import group_by_recipe, left_out, note_left_out, pairs_against_first, refuse_twice

    refuse_twice(opened)
    rows, pairs, without = group_by_recipe(opened), pairs_against_first(opened), left_out(opened)
    if json_:
        out({"recipes": rows, "left_out": [str(run.folder) for run in without], "mcnemar": pairs})
    else:
        show(rows, pairs)
    if without:
        say(note_left_out(without))


def show(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> None:
    """Print both tables for people."""
    from rich.table import Table

    from fastcifar.config.shipped import in_words
    from fastcifar.console import answer, answers
    from fastcifar.text import duration

    table = Table(box=None, header_style="dim")
    for heading in ("recipe", "seeds", "last", "best on test", "published", "selected", "training"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in rows:
        last, best, selected = (mean_in_words(row[which]) for which in ("last", "best", "selected"))
        seeds, time = str(len(row["runs"])), duration(row["training_s"])
        table.add_row(row["label"], seeds, last, best, published_in_words(row), selected, time)
    to = answers()
    to.print(table)
    for row in rows:
        if row["published"] is not None and row["recipe_differs"]:
            answer(f"{row['label']}: published {row['published']:.2f}%{in_words(row['recipe_differs'])}")
    to.print("\nMcNemar's exact test, last epoch: images that only the one run has right", style="dim")
    for pair in pairs:
        to.print(
            f"{pair['first']} {pair['only_first']} : {pair['only_second']} {pair['second']}, p = {pair['p_value']:.3g}"
        )


def published_in_words(row: dict[str, Any]) -> str:
    """Return ``97.12``, with a mark where it was published for another recipe than this row's, or ``none``."""
    if row["published"] is None:
        return "none"
    return f"{row['published']:.2f}" + (" (differs)" if row["recipe_differs"] else "")


def mean_in_words(entry: dict[str, Any] | None) -> str:
    """Return ``97.12 +- 0.08``, or without error for one run, or ``not measured yet``."""
    if entry is None:
        return "not measured yet"
    error = entry["standard_error"]
    return f"{entry['mean']:.2f}" + ("" if error is None else f" \u00b1 {error:.2f}")
