"""``fastcifar augment``: look at what training sees."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcifar.cli.options import Data, RecipeName, Settings

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from fastcifar.config.schema import Recipe

app = typer.Typer(help="Look at what training sees.", no_args_is_help=True)

GAP_PX = 2
LEAST_CELL_PX = 96


@app.callback()
def _group() -> None:
    """Look at what training sees."""


@app.command()
def preview(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(help="The picture to write; the ending names its format.")] = Path("sheet.png"),
    set_: Settings = None,
    data: Data = None,
    count: Annotated[int, typer.Option(min=1, max=256, help="How many training images, from the first on.")] = 12,
    epochs: Annotated[int, typer.Option(min=1, max=64, help="How many epochs to show, one column each.")] = 8,
    first_epoch: Annotated[int, typer.Option(min=0, help="The first of them, counted from 0.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print what was drawn as one JSON object.")] = False,
) -> None:
    """Draw a contact sheet: a row per training image, the original at the left, then one column per epoch.

    Images of data.resize's first phases are drawn in their full size.
    """
    from PIL import Image

    from fastcifar.config import CombineRecipe, load_recipe
    from fastcifar.console import answer
    from fastcifar.console import out as print_json
    from fastcifar.errors import UserError
    from fastcifar.run_directory import write_atomic

    loaded = load_recipe(recipe, set_ or [])
    if isinstance(loaded, CombineRecipe):
        raise UserError(f'"{recipe}" combines runs and trains on no images; preview the recipe of a member')
    columns = range(first_epoch, first_epoch + epochs)
    try:
        # In memory first: a full disk then leaves nothing half written.
        drawn, kind = io.BytesIO(), Image.registered_extensions().get(out.suffix.lower())
        if kind not in Image.SAVE:  # among the registered endings are those of formats that Pillow only reads
            raise ValueError(f'no picture can be written with the ending "{out.suffix}"')
        if not out.parent.is_dir():
            raise ValueError(f"there is no folder {out.parent}")
        sheet(seen(loaded, data, count, columns)).save(drawn, format=kind)
        write_atomic(out, drawn.getvalue())
    except (OSError, ValueError) as error:
        raise UserError(f"{out} could not be written ({error}); give --out a writable path such as sheet.png") from None
    ops = [str(op) for op in loaded.augment.ops]
    what = ", ".join(ops) or "no augmentation"
    if not json_:
        answer((str(out), "bold"), f": {count} images in epochs {columns[0]} to {columns[-1]}, {what}")
    else:
        print_json({"path": str(out), "recipe": loaded.name, "images": count, "epochs": list(columns), "augment": ops})


def seen(recipe: "Recipe", data: Path | None, count: int, epochs: range) -> "list[list[np.ndarray]]":
    """Return columns of images: the originals, then each epoch's, mixed as the recipe says.

    The rows are the first training images taken as one batch, so that the partners of CutMix and Mixup are among
    them; everything else is, to the byte, what training sees before normalization, but for ``data.resize``: the images
    have their full size.

    Args:
        recipe: what to preview.
        data: where the images are.
        count: how many images; fewer where the set has fewer.
        epochs: which epochs, from 0.

    Returns:
        One list of uint8 (H, W, 3) per column.
    """
    import numpy as np
    import torch

    from fastcifar.augment.augment import build_augment
    from fastcifar.augment.mix import build_mix
    from fastcifar.config.operations import UserOp
    from fastcifar.data.batch import Batch
    from fastcifar.data.store import resolve_store
    from fastcifar.errors import UserError

    split = resolve_store(recipe.data, data).split("train")
    originals = np.array(split.images[:count])
    rows = torch.arange(len(originals))
    batch = Batch(torch.from_numpy(originals), rows, torch.from_numpy(np.array(split.labels[:count])), rows)
    if recipe.augment.where == "loader" and any(isinstance(op, UserOp) for op in recipe.augment.ops):
        raise UserError("the preview is of operations on the device, not of a loader's transforms by import path")
    # The loader's own transforms follow the same law, with numbers of their own.
    config = recipe.augment.model_copy(update={"where": "device"})
    augment = build_augment(
        config, mean=recipe.data.mean, std=recipe.data.std, image_shape=originals.shape[1:], seed=recipe.seed,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.data.mean, recipe.data.std))
    mix = build_mix(recipe.mix, seed=recipe.seed, epochs=recipe.train.epochs, steps_per_epoch=1)
    columns = [list(originals)]
    for epoch in epochs:
        images: Any = augment(batch, epoch)
        if mix is not None:
            images, _ = mix(images, batch.labels, epoch, 0)
        bytes_ = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        columns.append(list(bytes_.permute(0, 2, 3, 1).numpy()))
    return columns


def sheet(columns: "list[list[np.ndarray]]") -> "Image.Image":
    """Return one picture of equally sized images, enlarged without smoothing; the first column stands apart."""
    from PIL import Image

    height, width = columns[0][0].shape[:2]
    zoom = max(1, LEAST_CELL_PX // max(height, width))
    step_y, step_x = height * zoom + GAP_PX, width * zoom + GAP_PX
    size = (len(columns) * step_x + 5 * GAP_PX, len(columns[0]) * step_y + GAP_PX)
    picture = Image.new("RGB", size, (255, 255, 255))
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            cell = Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            picture.paste(cell, (x * step_x + (GAP_PX if x == 0 else 5 * GAP_PX), y * step_y + GAP_PX))
    return picture
