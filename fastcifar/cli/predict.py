"""``fastcifar predict``: what a trained run says about image files."""

from pathlib import Path
from typing import Annotated

import typer


def predict(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    files: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files of any size.")],
    weights: Annotated[
        str | None, typer.Option(help="last, best or selected. Default: selected where there is one, else last.")
    ] = None,
    tta: Annotated[str, typer.Option(help="Test-time augmentation: none, flip or multicrop.")] = "none",
    top: Annotated[int, typer.Option(min=1, help="How many classes to tell.")] = 3,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict image files: `fastcifar predict runs/a cat.jpg`. Each is cut to its central square and scaled."""
    from fastcifar.analysis.predict import load_trained, predict_files
    from fastcifar.console import err, out
    from fastcifar.run_directory import RunDirectory

    results = predict_files(load_trained(RunDirectory.open(run), weights), files, tta, top)
    if json_:
        out({"run": str(run), "predictions": results})
        return
    for result in results:
        said = ", ".join(f"{entry['class']} {100 * entry['probability']:.1f}%" for entry in result["classes"])
        err.print(f"{result['file']}: {said}", soft_wrap=True)
