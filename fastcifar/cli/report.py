"""``fastcifar report``: one page that explains runs."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One or more run directories.")],
    out: Annotated[Path | None, typer.Option(help="The page. Default: report.html in the (first) run.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data of the pictures, as `fastcifar run` takes it.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print what the page shows as one JSON object.")] = False,
) -> None:
    """Explain runs on one self-contained page: metrics, curves, confusion, calibration, hardest images, label errors.

    Several runs become one comparison: recipes over their finished seeds, differences with errors, and each run in a
    tab.

    Reads run directories alone; the pictures come from --data or wherever `fastcifar run` finds the data, and are left
    out where there is none.
    """
    from fastcifar.console import answer, say
    from fastcifar.console import out as print_json
    from fastcifar.errors import UserError
    from fastcifar.run_directory import RunDirectory, write_atomic

    if out is not None and not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}")
    opened = [RunDirectory.open(folder) for folder in runs]
    # After the directories are known to be there: it imports torch, and a mistyped path is answered without it.
    from fastcifar.analysis.compare import refuse_twice
    from fastcifar.analysis.html import build_report

    refuse_twice(opened)
    page, contents, compared = build_report(opened, data)
    target = out or runs[0] / "report.html"
    write_atomic(target, page)
    if json_:
        print_json({"report": str(target), "runs": contents, "comparison": compared})
    else:
        answer((str(target), "bold"))
    if compared and compared["note"]:
        say(compared["note"])
