"""``fastcifar evaluate``: a trained run on other images."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastcifar.cli.options import Json, RunFolder, Tta, Weights


def evaluate(
    run: RunFolder,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A store, a CIFAR release, or an image folder: train/CLASS/* with test/CLASS/*, or CLASS/* alone. "
            "Default: what the run's recipe names, in FASTCIFAR_DATA or ./data."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="test or train, where the data has both.")] = "test",
    weights: Weights = None,
    tta: Tta = "none",
    corruptions: Annotated[
        str | None, typer.Option(help="Corrupt the images too: `all`, or names as gaussian_noise,zoom_blur.")
    ] = None,
    levels: Annotated[
        str | None, typer.Option(help="With --corruptions: their levels, of 1 to 5, such as 1,3. Default: all.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Take so many images, each class in proportion. 0: all.")] = 0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="With --corruptions: the seed of their noise. Default: 0.")
    ] = None,
    json_: Json = False,
) -> None:
    """Evaluate a run on another test set, an image folder or corrupted images: `fastcifar evaluate RUN --data OTHER`.

    Classes are matched by their names. Corruptions are made on the fly, after CIFAR-10-C, in five levels.
    """
    from fastcifar.console import err
    from fastcifar.console import out as print_json
    from fastcifar.errors import UserError
    from fastcifar.run_directory import RunDirectory

    opened = RunDirectory.open(run)
    if data is not None and not data.exists():
        raise UserError(f"{data} (--data): no such file or folder")
    if not corruptions and (levels is not None or seed is not None):
        raise UserError("--levels and --seed are of corrupted images: add --corruptions all, or names of some")
    # After the arguments are known to be good: these import torch, and a mistyped path is answered without it.
    from fastcifar.analysis import corruptions as known
    from fastcifar.analysis.evaluate import evaluate as measure
    from fastcifar.analysis.evaluate import read_labelled
    from fastcifar.analysis.predict import load_trained

    names, wanted = wanted_corruptions(corruptions, list(known.CORRUPTIONS)), wanted_levels(levels or "1,2,3,4,5")
    trained = load_trained(opened, weights)
    found = read_labelled(opened, trained, data, split, limit)
    with err.status("evaluate") as status:
        result = measure(trained, found, names, wanted, tta=tta, seed=seed or 0, progress=status.update)
    result = {"run": str(run), **result, "tta": tta, "seed": seed or 0}
    print_json(result) if json_ else show(result)


def wanted_corruptions(text: str | None, known: list[str]) -> list[str]:
    """Return the names in ``--corruptions``.

    Raises:
        UserError: one is unknown.
    """
    from fastcifar.errors import UserError, nearest

    if not text:
        return []
    names = known if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f'--corruptions: "{name}" is unknown{nearest(name, known)}; known: all, {", ".join(known)}')
    return names


def wanted_levels(text: str) -> list[int]:
    """Return the numbers in ``--levels``.

    Raises:
        UserError: one is no level.
    """
    from fastcifar.errors import UserError

    found = [part.strip() for part in text.split(",")]
    if not all(part in ("1", "2", "3", "4", "5") for part in found):
        raise UserError(f'--levels {text}: give levels of 1 to 5, such as "1,3,5"')
    return [int(part) for part in found]


def show(result: dict[str, Any]) -> None:
    """Print the table for people: the images as they are, then a row per corruption with a column per level."""
    from rich.table import Table

    from fastcifar.console import answer, answers

    clean = result["clean"]
    low, high = clean["interval"]
    answer(
        f"{result['data']}: {clean['accuracy']:.2f}% of {clean['images']:,} images (95% interval {low:.2f} to "
        f"{high:.2f}), loss {clean['loss']:.4f}, calibration error {clean['calibration_error']:.2f} points"
    )
    if not result["corrupted"]:
        return
    accuracies: dict[str, dict[int, float]] = {}
    for row in result["corrupted"]:
        accuracies.setdefault(row["corruption"], {})[row["level"]] = row["accuracy"]
    levels = list(next(iter(accuracies.values())))
    table = Table(box=None, header_style="dim")
    table.add_column("accuracy, %")
    for heading in (*(f"level {level}" for level in levels), "mean"):
        table.add_column(heading, justify="right")
    for name, found in accuracies.items():
        mean = sum(found.values()) / len(found)
        table.add_row(name, *(f"{found[level]:.2f}" for level in levels), f"{mean:.2f}")
    answers().print(table)
    answer(f"mean over corruptions and levels {result['mean_corrupted']:.2f}%")
