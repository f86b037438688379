"""``fastcifar push``: a trained run to the Hugging Face hub."""

from typing import Annotated

import typer

from fastcifar.cli.options import Json, RunFolder, Weights


def push(
    run: RunFolder,
    repo: Annotated[str, typer.Argument(help="The model repository: NAME or OWNER/NAME. Made where there is none.")],
    weights: Weights = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also push model.onnx and model.pt2.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    json_: Json = False,
) -> None:
    """Push a run's card, weights, recipe and metrics to the Hugging Face hub: `fastcifar push runs/a me/my-model`.

    Logits and checkpoints stay here. The token comes from HF_TOKEN or `hf auth login`.
    """
    from fastcifar.console import answer
    from fastcifar.console import out as print_json
    from fastcifar.run_directory import RunDirectory

    opened = RunDirectory.open(run)
    # After the directory is known to be there: it imports torch, and a mistyped path is answered without it.
    from fastcifar.analysis.push import push as push_run

    done = push_run(opened, repo, which=weights, onnx=onnx, private=private)
    if json_:
        print_json({"run": str(run), **done})
    else:
        answer((done["url"], "bold"), f", {len(done['files'])} files: {', '.join(done['files'])}")
