"""``fastcifar models``: what each architecture costs, and how fast it could be at best."""

import hashlib
import json
from importlib import metadata, resources
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcifar.errors import UserError, nearest

if TYPE_CHECKING:
    from fastcifar.models.cost import Cost

CATALOGUE: dict[str, dict[str, Any]] = {
    "lenet5": {"name": "lenet5"},
    "deep_baseline": {"name": "deep_baseline"},
    "deep_baseline_bn": {"name": "deep_baseline_bn"},
    "residual5": {"name": "residual5"},
    "residual15": {"name": "residual15"},
    "wrn16_8": {"name": "wrn16_8"},
    "wrn16_8_last_bn": {"name": "wrn16_8", "first_relu": False, "last_bn": True},
    "wrn28_10": {"name": "wrn28_10"},
    "pyramidnet110_a150": {"name": "pyramidnet110_a150"},
    "pyramidnet110_a150_align8": {"name": "pyramidnet110_a150", "align": 8},
    "pyramidnet110_a270": {"name": "pyramidnet110_a270"},
    "pyramidnet272_a200": {"name": "pyramidnet272_a200"},
    "speednet": {"name": "speednet"},
    "vit": {"name": "vit"},
    "cct7_3x1": {"name": "cct7_3x1"},
    "convnextv2_atto": {"name": "convnextv2_atto"},
    "convnextv2_femto": {"name": "convnextv2_femto"},
    "shake_shake26_2x32d": {"name": "shake_shake26_2x32d"},
    "shake_shake26_2x64d": {"name": "shake_shake26_2x64d"},
    "residual_attention92": {"name": "residual_attention92"},
    "residual_attention236": {"name": "residual_attention236"},
}
"""The table's rows: a name and the ``model`` table of a recipe that builds it."""


def models(
    name: Annotated[str | None, typer.Argument(help="One model, in detail. Default: all, as a table.")] = None,
    tflops: Annotated[float, typer.Option(min=1e-3, help="The device's arithmetic peak in TFLOP/s.")] = 780.0,
    gbs: Annotated[float, typer.Option(min=1e-3, help="The device's memory peak in GB/s.")] = 4300.0,
    json_: Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON object.")] = False,
) -> None:
    """Show parameters, GMACs, activation traffic and the least time of an epoch of 50,000 images.

    The defaults are one H200 in bf16. Computed, not measured: no device is this fast.
    """
    from fastcifar.console import answers, out

    rows = [kept_metrics(each, tflops, gbs) for each in chosen(name)]
    if json_:
        out({"tflops": tflops, "gbs": gbs, "images": 50_000, "models": rows})
    elif name is None:
        answers().print(table(rows))
    else:
        answers().print(detail(rows[0]))


def chosen(name: str | None) -> list[str]:
    """Return the rows to show.

    Raises:
        UserError: there is no such model.
    """
    if name is not None and name not in CATALOGUE:
        raise UserError(f"there is no model {name!r}{nearest(name, CATALOGUE)}; there are {', '.join(CATALOGUE)}")
    return list(CATALOGUE) if name is None else [name]


def kept_metrics(name: str, tflops: float, gbs: float) -> dict[str, Any]:
    """Return `metrics`, computed once: building 19 models takes seconds, and the answer depends on the code alone."""
    from fastcifar.cache import cache_folder

    path = cache_folder() / "models" / f"{_key(name, tflops, gbs)}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # absent, or damaged: it is written again
        found = metrics(name, tflops, gbs)
    from fastcifar.run_directory import write_atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(found))
    except (OSError, UserError):
        pass  # a cache that cannot be written costs time only
    return found


def _key(name: str, tflops: float, gbs: float) -> str:
    """Return a hash of all that decides a model's metrics: its config, the peaks, the models' code and torch."""
    digest = hashlib.sha256(json.dumps([CATALOGUE[name], name, tflops, gbs, metadata.version("torch")]).encode())
    package = resources.files("fastcifar")
    files = [*(package / "models").iterdir(), package / "config" / "schema.py", package / "cli" / "models.py"]
    for file in sorted(files, key=lambda file: file.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def metrics(name: str, tflops: float, gbs: float) -> dict[str, Any]:
    """Return one model's metrics; bytes, intensity and times are those of bf16 activations."""
    from pydantic import TypeAdapter

    from fastcifar.config.schema import ModelConfig
    from fastcifar.models.cost import cost_of_config

    cost = cost_of_config(TypeAdapter(ModelConfig).validate_python(CATALOGUE[name]))
    return {
        "model": name,
        "parameters": cost.parameters,
        "gmacs": cost.macs / 1e9,
        "activation_bytes_per_image": cost.bytes_moved(),
        "flop_per_byte": cost.intensity(),
        "epoch": cost.epoch_s(tflops, gbs)._asdict(),
        "epoch_with_asam": cost.epoch_s(tflops, gbs, passes=2)._asdict(),
        "by_kind": by_kind(cost),
    }


def by_kind(cost: "Cost") -> dict[str, dict[str, float]]:
    """Return, per kind of operation: how many, GFLOP and bytes moved per image forward and backward (bf16)."""
    found: dict[str, dict[str, float]] = {}
    for operation in cost.operations:
        row = found.setdefault(operation.kind, {"count": 0, "gflop": 0.0, "bytes": 0})
        row["count"] += 1
        row["gflop"] += operation.flops / 1e9
        row["bytes"] += 2 * operation.values
    return found


def table(rows: list[dict[str, Any]]) -> Any:
    """Return the metrics as a table for people."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="MB moved and FLOP/byte: per image, forward + backward, bf16. Floor: s per 50,000 images, computed.",
    )
    shown.add_column("model", no_wrap=True)
    for head in ("parameters", "GMACs", "MB", "FLOP/B", "floor", "ASAM"):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row["model"],
            f"{row['parameters']:,}",
            f"{row['gmacs']:.4f}",
            f"{row['activation_bytes_per_image'] / 1e6:.2f}",
            f"{row['flop_per_byte']:.0f}",
            f"{row['epoch']['floor_s']:.2g}",
            f"{row['epoch_with_asam']['floor_s']:.2g}",
        )
    return shown


def detail(row: dict[str, Any]) -> Any:
    """Return one model's metrics for people: the operations by kind, then the floors."""
    from rich.console import Group
    from rich.table import Table

    kinds = Table(title=f"{row['model']}: {row['parameters']:,} parameters, {row['gmacs']:.4f} GMACs")
    for head in ("operation", "count", "GFLOP", "traffic MB"):
        kinds.add_column(head, justify="left" if head == "operation" else "right")
    for kind, values in row["by_kind"].items():
        kinds.add_row(kind, f"{values['count']}", f"{values['gflop']:.4f}", f"{values['bytes'] / 1e6:.3f}")
    floors = [
        f"{what}: arithmetic {row[key]['arithmetic_s']:.3g} s, memory {row[key]['memory_s']:.3g} s, "
        f"floor {row[key]['floor_s']:.3g} s per epoch"
        for what, key in (("plain", "epoch"), ("with ASAM", "epoch_with_asam"))
    ]
    return Group(kinds, *floors)
