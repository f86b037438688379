"""``fastcifar ladder``: execute the ladder of recipes, as far as it has not been measured yet."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastcifar.cli.options import Data

if TYPE_CHECKING:
    from fastcifar.ladder.execute import RunRow
    from fastcifar.ladder.state import Ledger

# Each task that waits for room in a cluster is a thread here.
MOST_TASKS = 256
UNITS_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


class Where(StrEnum):
    """Where runs are executed."""

    local = "local"
    ray = "ray"


EXECUTOR = "On this machine, or as tasks of a Ray cluster: `ray` starts one here, --address names one that runs."
Executor = Annotated[Where, typer.Option("--executor", help=EXECUTOR)]
Address = Annotated[str | None, typer.Option(help="Of a running Ray cluster, such as 10.0.0.1:6379, or `auto`.")]
Cpus = Annotated[float, typer.Option(min=0, help="With Ray: the CPUs that each run asks for.")]
Gpus = Annotated[
    float | None, typer.Option(min=0, help="With Ray: the GPUs that each run asks for, such as 0.5. Default: 1 if any.")
]


@contextmanager
def runner_for(
    where: Where, out: Path, data: Path | None, jobs: int, address: str | None, cpus: float, gpus: float | None
) -> "Iterator[RunRow]":
    """Return what executes runs for a ``with`` block.

    Raises:
        UserError: Ray is not installed or not reached, or an option of Ray's stands without it.
    """
    from fastcifar.errors import UserError
    from fastcifar.ladder.places import Places
    from fastcifar.ladder.runner import Runner

    if where is Where.local:
        if address or gpus is not None or cpus != 1:
            raise UserError("--address, --cpus and --gpus speak of a Ray cluster: add --executor ray")
        yield Runner(out, data, places=Places(jobs))
        return
    from fastcifar.ladder.ray_runner import RayRunner, cluster

    with cluster(address), RayRunner(out, data, cpus, gpus, grows=address is not None) as runner:
        yield runner


def ladder(
    only: Annotated[
        list[str] | None, typer.Option(help='Only rows that match, such as "wrn-*" or "smoke/*". Repeatable.')
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds per row, counted up from the recipe's.")] = 1,
    until: Annotated[
        str | None, typer.Option(help="Stop after so long, such as 90s, 30m, 2h: the running row can be resumed.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of all runs and of the table.")] = Path("runs/ladder"),
    data: Data = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Runs side by side, which share cores and GPUs. Default: 1; with Ray, all."),
    ] = None,
    executor: Executor = Where.local,
    address: Address = None,
    cpus: Cpus = 1,
    gpus: Gpus = None,
    same_process: Annotated[
        bool, typer.Option(help="Train in this process: no start per row, but a crash ends the ladder.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Only show the table, with what would run.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the table of these rows as one JSON object.")] = False,
) -> None:
    """Run every row of the ladder that is missing, resume what was cut, and keep one table of it all.

    Members come before their combinations and the cheapest rows first. A row that fails is reported and the rest
    goes on. Writes ladder.json and ladder.html into the folder; the same command goes on where it was stopped.
    """
    from fastcifar.errors import UserError
    from fastcifar.ladder.rows import choose, jobs_for, ladder_rows
    from fastcifar.ladder.state import Ledger

    if same_process and ((jobs or 1) > 1 or executor is not Where.local):
        raise UserError("--same-process trains one row after the other, here; leave it away")
    limit_s = None if until is None else seconds(until)
    ledger = Ledger(jobs_for(choose(only) if only else ladder_rows(), seeds, out))
    if not dry_run:
        many = jobs or (1 if executor is Where.local else min(len(ledger.jobs), MOST_TASKS))
        with runner_for(executor, out, data, many, address, cpus, gpus) as runner:
            execute(ledger, runner, out, data, limit_s, many, same_process)
    tell(ledger, dry_run, json_)


def execute(
    ledger: "Ledger", runner: "RunRow", out: Path, data: Path | None, limit_s: float | None, many: int, here: bool
) -> None:
    """Execute what is missing, under a live table; ``here`` trains in this process."""
    from fastcifar.console import err, say
    from fastcifar.interrupt import deferred, handled
    from fastcifar.ladder.execute import LadderExecution
    from fastcifar.ladder.runner import Runner
    from fastcifar.ladder.view import LadderView

    used = Runner(out, data, same_process=True) if here else runner
    # Within the cluster's block, because Ray takes the signals for itself.
    with LadderView(err) as view, handled("stopped; the same command goes on from here"), deferred():
        LadderExecution(ledger, used, out, view, limit_s, many).execute()
    say((str(out / "ladder.html"), "bold"))


def tell(ledger: "Ledger", dry_run: bool, json_: bool) -> None:
    """Print the table, unless the live one stands there already; end with status 1 where a row failed."""
    from fastcifar.console import answers, err
    from fastcifar.console import out as print_json
    from fastcifar.ladder.state import content
    from fastcifar.ladder.view import WIDE, render

    rows = ledger.table()
    if json_:
        print_json(content(rows))
    elif dry_run or not (err.is_terminal and answers().is_terminal):
        to = answers()
        to.print(render(rows, to.width if to.is_terminal else WIDE))
    if any(row.state in ("failed", "blocked") for row in rows):
        raise typer.Exit(1)


def seconds(text: str) -> float:
    """Return the seconds of a duration such as ``90s``, ``30m``, ``1.5h`` or ``2h30m``.

    Raises:
        UserError: it is not one.
    """
    from fastcifar.errors import UserError

    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(min|[smhd])", text.strip())
    total = sum(float(number) * UNITS_S[unit] for number, unit in parts)
    if re.sub(r"\d+(?:\.\d+)?\s*(min|[smhd])\s*", "", text.strip()) or total <= 0:
        raise UserError(f'--until {text}: is not a duration such as "90s", "30m", "2h" or "1h30m"')
    return total
