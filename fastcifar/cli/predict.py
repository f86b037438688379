"""``fastcifar predict``: what a trained run says about image files."""

from pathlib import Path
from typing import Annotated

import typer

from fastcifar.cli.options import Json, RunFolder, Tta, Weights


def predict(
    run: RunFolder,
    files: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files of any size.")],
    weights: Weights = None,
    tta: Tta = "none",
    top: Annotated[int, typer.Option(min=1, help="How many classes to tell.")] = 3,
    json_: Json = False,
) -> None:
    """Predict image files: `fastcifar predict runs/a cat.jpg`. Each is cut to its central square and scaled."""
    from fastcifar.analysis.predict import load_trained, predict_files
    from fastcifar.console import answer, out
    from fastcifar.run_directory import RunDirectory

    results = predict_files(load_trained(RunDirectory.open(run), weights), files, tta, top)
    if json_:
        out({"run": str(run), "predictions": results})
        return
    for result in results:
        said = ", ".join(f"{entry['class']} {100 * entry['probability']:.1f}%" for entry in result["classes"])
        answer(f"{result['file']}: {said}")
