"""``fastcifar stack``: a meta-model on the saved logits of trained runs."""

from enum import StrEnum
from typing import Annotated

import typer

from fastcifar.cli.options import Json, Result, RunFolders


class Meta(StrEnum):
    """The meta-model."""

    MLP = "mlp"
    LOGISTIC = "logistic"


class Protocol(StrEnum):
    """What the meta-model is fitted and chosen on."""

    HONEST = "honest"
    PUBLISHED = "published"


def stack(
    runs: RunFolders,
    meta: Annotated[Meta, typer.Option(help="The meta-model.")] = Meta.MLP,
    protocol: Annotated[
        Protocol,
        typer.Option(help="honest: fitted on the holdout, test scored once. published: see above."),
    ] = Protocol.HONEST,
    seed: Annotated[int, typer.Option(min=0, help="The meta-model's seed.")] = 250,
    tta: Annotated[
        bool, typer.Option("--tta", help="Use the last epoch's test logits under test-time augmentation.")
    ] = False,
    out: Result = None,
    json_: Json = False,
) -> None:
    """Fit a meta-model on the logits of trained runs: `fastcifar stack runs/a runs/b runs/c`.

    The default needs runs with a holdout (data.holdout = 5000). `--protocol published` needs runs with
    eval.train_logits = true: it fits on logits of the very images that the members were trained on and chooses the
    epoch on the test set. That accuracy is for comparison with published ones; it is no estimate for new images.
    A member that was stopped before its end is combined as far as it has come, and marked so.
    """
    from fastcifar.analysis.members import open_members
    from fastcifar.cli.ensemble import execute

    options = {"how": "stacking", "meta": meta.value, "protocol": protocol.value, "meta_seed": seed}
    execute(open_members(runs), options, out, tta, json_)
