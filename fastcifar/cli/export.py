"""``fastcifar export``: a trained run for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from fastcifar.cli.options import Json, RunFolder, Weights


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(help="The file: .safetensors (state dict), .pt2 (torch.export) or .onnx.")],
    weights: Weights = None,
    json_: Json = False,
) -> None:
    """Export a trained run as a torch state dict, a torch.export program or ONNX: `fastcifar export runs/a model.onnx`.

    Program and ONNX take uint8 pixels (batch, 32, 32, 3) and hold the normalization. Each file is read back and run
    against the model before the command ends.
    """
    from fastcifar.console import answer
    from fastcifar.console import out as print_json
    from fastcifar.errors import UserError, nearest
    from fastcifar.run_directory import RunDirectory

    kinds = (".safetensors", ".pt2", ".onnx")
    if out.suffix not in kinds:
        raise UserError(f"{out}: unknown kind of file{nearest(out.suffix, kinds)}; allowed: {', '.join(kinds)}")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}")
    opened = RunDirectory.open(run)
    # After the arguments are known to be good: these import torch, and a mistyped path is answered without it.
    from fastcifar.analysis.export import export_onnx, export_safetensors, export_torch
    from fastcifar.analysis.predict import load_trained

    writers = {".safetensors": export_safetensors, ".pt2": export_torch, ".onnx": export_onnx}
    difference = writers[out.suffix](load_trained(opened, weights), out)
    if json_:
        print_json({"run": str(run), "file": str(out), "difference_from_torch": difference})
    else:
        said = "gives the model's own logits" if difference == 0 else f"within {difference:.0e} of the model's logits"
        answer((str(out), "bold"), f", read back and run: {said}")
