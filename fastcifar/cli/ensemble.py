"""``fastcifar ensemble``: trained runs vote, from their saved logits."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcifar.cli.options import Json, Result, RunFolders

if TYPE_CHECKING:
    from fastcifar.run_directory import RunDirectory


class Vote(StrEnum):
    """How members vote."""

    SOFT = "soft"
    HARD = "hard"


def ensemble(
    runs: RunFolders,
    vote: Annotated[Vote, typer.Option(help="Mean of softmax, or majority (ties: the lowest class).")] = Vote.SOFT,
    weights: Annotated[str | None, typer.Option(help="One weight per run, such as 0.5,0.25,0.25.")] = None,
    fit_weights: Annotated[
        bool, typer.Option("--fit-weights", help="Fit the weights on the members' holdout, by cross-validation.")
    ] = False,
    tta: Annotated[bool, typer.Option("--tta", help="Use the logits under test-time augmentation.")] = False,
    out: Result = None,
    json_: Json = False,
) -> None:
    """Combine trained runs by voting. No model is run again: `fastcifar ensemble runs/a runs/b runs/c`.

    Tells the accuracy with the members at their last epochs, at their best epochs on the test set (as published), and,
    where all hold out images, at the epochs selected there. A member that was stopped before its end is combined as far
    as it has come, and marked so.
    """
    from fastcifar.analysis.members import open_members
    from fastcifar.errors import UserError

    given = parse_weights(weights)
    if fit_weights and (given or vote == Vote.HARD):
        raise UserError("--fit-weights fits the weights of a soft vote; leave out --weights and --vote hard")
    members = open_members(runs)
    how = "weighted" if fit_weights or (given and vote == Vote.SOFT) else vote.value
    execute(members, {"how": how, "weights": given}, out, tta, json_)


def parse_weights(text: str | None) -> list[float] | None:
    """Return the numbers of ``0.5,0.25,0.25``.

    Raises:
        UserError: something there is no number.
    """
    from fastcifar.errors import UserError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights {text}: expected numbers with commas between, such as 0.5,0.25,0.25") from None


def execute(
    members: "dict[str, RunDirectory]", options: dict[str, Any], out: Path | None, tta: bool, json_: bool
) -> None:
    """Combine members, write the run directory where one is wanted, and print the result.

    Args:
        members: runs by name.
        options: the keys of a recipe's [combine] table beside ``members``.
        out: the run directory to write; None writes none.
        tta: use the logits under test-time augmentation.
        json_: print JSON to stdout instead of a table.
    """
    from fastcifar.analysis.combine import record, results_of
    from fastcifar.config.load import plain_name
    from fastcifar.config.schema import CombineRecipe
    from fastcifar.console import out as print_json

    name = out.name if out else f"{options['how']}-of-{len(members)}"
    recipe = _validated(CombineRecipe, {"name": plain_name(name), "combine": {"members": list(members), **options}})
    refuse_run(out)
    done = results_of(recipe, members, tta=tta)
    tell_unfinished(members)
    summary = record(done, out).summary if out else done.summary()
    if json_:
        print_json(summary | ({"run": str(out)} if out else {}))
    else:
        show(summary, out)


def tell_unfinished(members: "dict[str, RunDirectory]") -> None:
    """Say on stderr which members are half trained, and how to finish them."""
    from fastcifar.console import say
    from fastcifar.text import resume_command, stopped_at

    for run in members.values():
        if stopped := stopped_at(run.summary):
            say(f"unfinished member: {run.folder} ({stopped}); finish it with `{resume_command(run.folder)}`")


def _validated(kind: Any, table: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from fastcifar.errors import UserError

    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise UserError("; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())) from None


def refuse_run(out: Path | None) -> None:
    """Refuse to write over a run directory.

    Raises:
        UserError: ``out`` holds one.
    """
    from fastcifar.errors import UserError
    from fastcifar.run_directory import RunDirectory

    if out is not None and RunDirectory.exists(out):
        raise UserError(f"{out}: holds a run already; choose another --out")


def show(summary: dict[str, Any], out: Path | None) -> None:
    """Print members and combination as one table for people."""
    from rich.table import Table

    from fastcifar.analysis.members import marked
    from fastcifar.console import answer, answers
    from fastcifar.text import stopped_at

    table = Table(box=None, header_style="dim")
    tta = summary["combined"]["last"]["tta"]
    for heading in ("", "last", "best on test", "selected"):
        table.add_column(heading + ", TTA" * bool(heading and tta), justify="left" if not heading else "right")
    for member in summary["members"]:
        # Beside a combination of logits under test-time augmentation, the members' accuracies under it.
        own = (member["tta"], None, None) if tta else [member[which] for which in ("last", "best", "selected")]
        table.add_row(marked(member["name"], stopped_at(member)), *map(percent, own))
    metrics = [summary[which] for which in ("last", "best", "selected")]
    table.add_row(summary["how"], *(percent(entry and entry["accuracy"]) for entry in metrics), style="bold")
    answers().print(table)
    for which in ("last", "best", "selected"):
        if summary[which]:
            answer((f"{which}: ", "dim"), f"{summary[which]['protocol']}{_details(summary['combined'][which])}")
    if out:
        answer((str(out), "bold"))


def _details(details: dict[str, Any]) -> str:
    """Say what was fitted or chosen, in a few words."""
    parts = []
    if details.get("weights"):
        parts.append(f"weights {', '.join(f'{w:.3f}' for w in details['weights'])}")
    if "shrinkage" in details:
        parts.append(f"fitted on the holdout, pulled to equal weights by {details['shrinkage']:g}")
    if "meta_epoch" in details:
        parts.append(f"meta-epoch {details['meta_epoch']}")
    if "weight_decay" in details:
        parts.append(f"weight decay {details['weight_decay']:g}")
    if "penalty" in details:
        parts.append(f"C {details['penalty']:g}")
    return f"; {', '.join(parts)}" if parts else ""


def percent(value: float | None) -> str:
    """Return ``97.12`` or ``not measured yet``."""
    return "not measured yet" if value is None else f"{value:.2f}"
