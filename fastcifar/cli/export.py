"""``fastcifar export``: a trained run for other programs."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Argument(help="The file: .safetensors (torch state dict) or .onnx.")],
    weights: Annotated[
        str | None, typer.Option(help="last, best or selected. Default: selected where there is one, else last.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export a trained run as a torch state dict or as ONNX: `fastcifar export runs/a model.onnx`.

    The ONNX model takes uint8 pixels (batch, 32, 32, 3) and holds the normalization; it is checked with onnxruntime
    against torch before the command ends.
    """
    from fastcifar.console import out as print_json
    from fastcifar.console import say
    from fastcifar.errors import UserError, nearest
    from fastcifar.run_directory import RunDirectory

    kinds = (".safetensors", ".onnx")
    if out.suffix not in kinds:
        raise UserError(f"{out}: unknown kind of file{nearest(out.suffix, kinds)}; allowed: {', '.join(kinds)}")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}")
    opened = RunDirectory.open(run)
    # After the arguments are known to be good: these import torch, and a mistyped path is answered without it.
    from fastcifar.analysis.export import export_onnx, export_safetensors
    from fastcifar.analysis.predict import load_trained

    trained = load_trained(opened, weights)
    difference = None
    if out.suffix == ".onnx":
        difference = export_onnx(trained, out)
    else:
        export_safetensors(trained, out)
    if json_:
        print_json({"run": str(run), "file": str(out), "difference_from_torch": difference})
    else:
        checked = "" if difference is None else f", within {difference:.0e} of torch in onnxruntime"
        say((str(out), "bold"), checked)
