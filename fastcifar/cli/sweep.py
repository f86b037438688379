"""``fastcifar sweep``: search over keys of a recipe, by the holdout."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcifar.cli.ladder import Address, Cpus, Executor, Gpus, Where, runner_for
from fastcifar.cli.options import Data, RecipeName

if TYPE_CHECKING:
    from fastcifar.sweep.search import Sweep

SPACES = (
    "A space to search: 'optimizer.lr=log(0.01, 1)', uniform(a, b), int(a, b) or '[0.5, 1, 2]'; or a fixed value, such "
    "as train.epochs=2. Repeatable."
)


def sweep(
    recipe: RecipeName,
    set_: Annotated[list[str] | None, typer.Option("--set", help=SPACES)] = None,
    trials: Annotated[int, typer.Option(min=1, max=100_000, help="Trials of the whole search, earlier ones too.")] = 20,
    jobs: Annotated[
        int, typer.Option(min=1, max=1024, help="Trials side by side, which share the cores and the GPUs.")
    ] = 1,
    executor: Executor = Where.local,
    address: Address = None,
    cpus: Cpus = 1,
    gpus: Gpus = None,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Stop trials that are worse than the median of the others.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the study and of all runs. Default: runs/sweep-<recipe>.")
    ] = None,
    data: Data = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the trials as one JSON object.")] = False,
) -> None:
    """Search over keys of a recipe: `fastcifar sweep wrn-asam --set data.holdout=5000 --set 'asam.rho=[0.5, 1, 2]'`.

    Optuna chooses what to try next by the accuracy on the holdout (data.holdout), never on the test set. Each trial is
    a run directory in the folder, beside study.db and best.toml. The same command goes on where it was stopped.
    """
    from fastcifar.console import say
    from fastcifar.interrupt import deferred, handled
    from fastcifar.ladder.execute import alone_in
    from fastcifar.sweep.search import STUDY, Problem, Sweep, study_errors
    from fastcifar.sweep.spaces import split_settings

    problem = Problem(recipe, *split_settings(set_ or []))
    first = problem.check()
    folder = out or Path("runs") / f"sweep-{first.name}"
    with (
        alone_in(folder, "sweep"),
        runner_for(executor, folder, data, jobs, address, cpus, gpus) as runner,
        handled("stopped; the same command goes on from here"),
        deferred(),
        study_errors(folder / STUDY),
    ):
        say(f"searching by the accuracy on {first.data.holdout:,} held-out training images, never the test set")
        search = Sweep(problem, runner, folder, jobs, prune, lambda text: say(text))
        search.execute(trials)
        best = search.write_best()
    tell(search, best, json_)


def tell(search: "Sweep", best: Path | None, json_: bool) -> None:
    """Print the trials, for programs or for people, and where the best recipe lies; status 1 where there is none."""
    from fastcifar.console import answers, err
    from fastcifar.console import out as print_json

    if json_:
        print_json(content(search))
    else:
        show(search)
    if best is None:
        err.print("no trial came to its end, so that there is no best one")
        raise typer.Exit(1)
    answers(json_).print("the best recipe: ", end="")
    answers(json_).print(f"fastcifar run {best}", style="bold", soft_wrap=True)


def content(search: "Sweep") -> dict[str, Any]:
    """Return the trials as plain values, the best first; accuracies in percent."""
    best = search.out / "best.toml"
    return {
        "format": 1,
        "searched_by": f"holdout of {search.first.data.holdout} training images",
        "best": str(best) if best.is_file() else None,
        "trials": rows(search),
    }


def rows(search: "Sweep") -> list[dict[str, Any]]:
    """Return one object a trial: complete ones by falling accuracy, then the pruned and the failed."""
    from fastcifar.sweep.search import MESSAGE, RUN, ended

    order = ("complete", "pruned", "fail")
    found = [
        {
            "run": str(search.out / trial.user_attrs[RUN]),
            "state": {"fail": "failed"}.get(trial.state.name.lower(), trial.state.name.lower()),
            "holdout_accuracy": trial.intermediate_values[max(trial.intermediate_values)]
            if trial.intermediate_values else None,
            "epochs_done": max(trial.intermediate_values, default=0),
            "values": dict(trial.params),
            "message": trial.user_attrs.get(MESSAGE, ""),
        }
        for trial in sorted(ended(search.study), key=lambda t: (order.index(t.state.name.lower()), -(t.value or 0)))
    ]  # fmt: skip
    return found


def show(search: "Sweep") -> None:
    """Print the table for people: accuracies on the holdout, and of the best trial on the test set."""
    from rich.table import Table

    from fastcifar.console import answers
    from fastcifar.run_directory import RunDirectory
    from fastcifar.sweep.search import short

    keys = [space.key for space in search.problem.spaces]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "state", "holdout", "epochs", *keys):
        table.add_column(heading, justify="left" if heading in ("run", "state") else "right")
    found = rows(search)
    for row in found:
        accuracy = "none" if row["holdout_accuracy"] is None else f"{row['holdout_accuracy']:.2f}"
        values = [short(row["values"].get(key, "")) for key in keys]
        table.add_row(Path(row["run"]).name, row["state"], accuracy, str(row["epochs_done"]), *values)
    answers().print(table)
    if found and found[0]["state"] == "complete":
        last = RunDirectory.open(found[0]["run"]).summary["last"]
        answers().print(f"the best one on the test set, looked at only now: {last['accuracy']:.2f}%")
