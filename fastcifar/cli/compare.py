"""``fastcifar compare``: runs side by side."""

from typing import Any

from fastcifar.cli.options import Json, RunFolders


def compare(
    runs: RunFolders,
    json_: Json = False,
) -> None:
    """Show runs in one table: mean and standard error over the seeds of a recipe, and McNemar's exact test.

    The test asks whether a run and the first one are equally often right on the same test images (last epoch).
    """
    from fastcifar.console import out
    from fastcifar.errors import UserError
    from fastcifar.run_directory import RunDirectory

    if len(runs) < 2:
        raise UserError("RUN...: a comparison needs at least two run directories")
    opened = [RunDirectory.open(folder) for folder in runs]
    # After the directories are known to be there: it imports numpy, and a mistyped path is answered without it.
    from fastcifar.analysis.compare import group_by_recipe, pairs_against_first

    rows, pairs = group_by_recipe(opened), pairs_against_first(opened)
    if json_:
        out({"recipes": rows, "mcnemar": pairs})
    else:
        show(rows, pairs)


def show(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> None:
    """Print both tables for people."""
    from rich.table import Table

    from fastcifar.console import answers
    from fastcifar.text import duration

    table = Table(box=None, header_style="dim")
    for heading in ("recipe", "seeds", "last", "best on test", "selected", "training"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in rows:
        metrics = [mean_in_words(row[which]) for which in ("last", "best", "selected")]
        table.add_row(row["name"], str(len(row["runs"])), *metrics, duration(row["training_s"]))
    to = answers()
    to.print(table)
    to.print("\nMcNemar's exact test, last epoch: images that only the one run has right", style="dim")
    for pair in pairs:
        to.print(
            f"{pair['first']} {pair['only_first']} : {pair['only_second']} {pair['second']}, p = {pair['p_value']:.3g}"
        )


def mean_in_words(entry: dict[str, Any] | None) -> str:
    """Return ``97.12 +- 0.08``, or without error for one run, or ``not measured yet``."""
    if entry is None:
        return "not measured yet"
    error = entry["standard_error"]
    return f"{entry['mean']:.2f}" + ("" if error is None else f" \u00b1 {error:.2f}")
