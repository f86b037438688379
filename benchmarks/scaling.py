"""Seconds a step on 1 to 64 GPUs, on paper: no number here was measured.

The bytes of the gradient's all-reduces over the bandwidth of the links, and the predicted step of one GPU at its part
of the batch; see `fastcifar.models.scaling` for the sum and for every number that is assumed. It needs no GPU and is no
part of ``fastcifar bench``, which measures. To be checked where several GPUs are.
"""

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from fastcifar.config import load_recipe
from fastcifar.locations import results_folders
from fastcifar.models.gpu_prediction import ASSUMPTIONS, CARDS, read_ledger
from fastcifar.models.scaling import LINKS, PREDICTED, predict_step

RECIPES = ("lenet5", "wrn-asam", "pyramid-asam", "pyramid400")
DEVICES = (1, 2, 4, 8, 16, 32, 64)
Row = dict[str, Any]


def rows(card: str) -> list[Row]:
    """Return one row for each recipe, way of growing and number of GPUs.

    ``strong`` divides the recipe's batch; ``weak`` gives each GPU a batch of the recipe's size, which is another
    training.
    """
    ledger, found = read_ledger(results_folders()), []
    for name in RECIPES:
        recipe, base = load_recipe(name), 0.0
        for way in ("strong", "weak"):
            for devices in DEVICES:
                size = recipe.train.batch_size * (devices if way == "weak" else 1)
                grown = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": size})})
                step, slow = (predict_step(grown, devices, CARDS[card], ledger, net) for net in ("network", "single"))
                base = step.images_per_s if devices == 1 else base
                found.append({
                    "status": PREDICTED, "recipe": name, "way": way, "gpus": devices, "batch_per_gpu": step.batch,
                    "step_ms": 1e3 * step.step_s, "communication_ms": 1e3 * step.communication_s,
                    "times_one_gpu": step.images_per_s / base, "times_one_gpu_one_port": slow.images_per_s / base,
                })  # fmt: skip
    return found


def show(card: str, found: list[Row]) -> None:
    """Print the rows for people, to stderr."""
    table = Table(title=f"{CARDS[card].name}: {PREDICTED}")
    columns = ("recipe", "way", "GPUs", "images each", "ms a step", "of it all-reduce", "times one GPU", "one port")
    for column in columns:
        table.add_column(column)
    for row in found:
        measures = (row[k] for k in ("step_ms", "communication_ms", "times_one_gpu", "times_one_gpu_one_port"))
        words = (row["recipe"], row["way"], str(row["gpus"]), str(row["batch_per_gpu"]))
        table.add_row(*words, *(f"{value:.3g}" for value in measures))
    Console(stderr=True, highlight=False, width=120).print(table)


def main() -> None:
    """Print the prediction; with ``--json`` also as one object to stdout, with all that is assumed."""
    parser = argparse.ArgumentParser(prog="benchmarks/scaling.py")
    parser.add_argument("--card", choices=sorted(CARDS), default="h100")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    arguments = parser.parse_args()
    found = rows(arguments.card)
    show(arguments.card, found)
    if arguments.json:
        assumed = {"links": {k: link._asdict() for k, link in LINKS.items()}, "kernels": ASSUMPTIONS._asdict()}
        json.dump({"status": PREDICTED, "assumptions": assumed, "results": found}, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
