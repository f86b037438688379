"""Arguments and options that several commands share, so that one word means the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

from fastcifar.cli.completion import recipe_names

_RECIPE = typer.Argument(
    help="A recipe file, or the name of a shipped one (`fastcifar recipes`).", autocompletion=recipe_names
)
RecipeName = Annotated[str, _RECIPE]
OptionalRecipeName = Annotated[str | None, _RECIPE]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key, such as train.epochs=2. Repeatable.")
]
Data = Annotated[Path | None, typer.Option(help="The data: a store, a CIFAR release, or folders named as classes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

Out = Annotated[Path | None, typer.Option(help="The run directory. Default: a new one under runs/.")]
Resume = Annotated[
    str | None, typer.Option(help="A run directory to go on with, or `auto` for this recipe's newest one.")
]
StopAfter = Annotated[
    int | None,
    typer.Option(min=1, help="Stop after this many of the planned epochs, one begun being finished; resume later."),
]
Devices = Annotated[
    int, typer.Option(min=1, help="Train on so many GPUs of this machine (CPU processes where it has none).")
]
Seeds = Annotated[
    int | None, typer.Option(min=1, max=32, help="Train so many seeds, counted up, side by side in this process.")
]
Profile = Annotated[
    str | None, typer.Option(help="Trace these steps, such as 10:20, with torch.profiler into the run's profile/.")
]

RunFolder = Annotated[Path, typer.Argument(help="A run directory.")]
RunFolders = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more run directories.")]
Weights = Annotated[
    str | None, typer.Option(help="last, best or selected. Default: selected where there is one, else last.")
]
Tta = Annotated[str, typer.Option(help="Test-time augmentation: none, flip or multicrop.")]
Result = Annotated[Path | None, typer.Option(help="Write the result as a run directory.")]
