"""Seconds an epoch on a GPU that nobody has measured yet, from the ledger of launches and the model's cost.

The prediction is there to be held against the first measurement. A step is a captured CUDA graph whose kernels run one
after the other, so its time is a sum:

- library calls (convolutions, matrix products): each operation at the slower of arithmetic and memory;
- generated kernels: the bytes that `benchmarks/launches.py` read off them, over the bandwidth;
- our own kernels: bytes counted from the sizes of flat parameters, BatchNorm inputs and the batch;
- every kernel's start and end, which a graph makes cheap and does not hide.

Left out, because the ledger does not know it: the bytes of ATen's kernels other than the gathering of gradients, and
what cuDNN does beside a convolution (transposes, workspaces). `ASSUMPTIONS` and `CARDS` hold every number that is
assumed, and nothing else does.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastcifar.config import load_recipe
from fastcifar.config.schema import Recipe
from fastcifar.errors import UserError
from fastcifar.models.budget import images_to_train, step_key, steps_per_epoch
from fastcifar.models.cost import Cost, Operation, known_cost

NEVER_MEASURED = "predicted, never measured"
CIFAR_TEST = 10_000
IMAGE_VALUES = 3 * 32 * 32
LIBRARY = ("convolution", "linear")
FORWARD_SHARE = 1 / 3
"""Of a step's arithmetic and traffic, what one forward pass takes: the backward pass of a convolution is two of it."""


class Card(NamedTuple):
    """A GPU by its data sheet.

    Attributes:
        name: as the maker calls it.
        tflops: dense peak in 1e12 FLOP/s by ``engine.precision``.
        gbs: peak of the memory's bandwidth in 1e9 bytes/s.
        source: where the numbers are from.
    """

    name: str
    tflops: dict[str, float]
    gbs: float
    source: str


# NVIDIA's data sheets of the H100 and the H200 give the same peaks for the SXM boards: 1,979 TFLOP/s in bf16 and fp16
# and 989 in TF32, "with sparsity", of which dense is half, and 67 in fp32; 3.35 and 4.8 TB/s of bandwidth. Checked
# on 2026-11-25 in copies of the sheets, NVIDIA's own pages being out of reach: the H100's table at
# archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html, its dense peaks (989.4 and 494.7, from the white paper) at
# glennklockwood.com/garden/processors/h100, the H200's peaks and bandwidth at saulelectric.com/nvidia-h200.html.
HOPPER_TFLOPS = {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67.0}
CARDS = {
    "h100": Card("H100 SXM", HOPPER_TFLOPS, 3350.0, "NVIDIA H100 Tensor Core GPU data sheet"),
    "h200": Card("H200 SXM", HOPPER_TFLOPS, 4800.0, "NVIDIA H200 Tensor Core GPU data sheet"),
}


class Assumptions(NamedTuple):
    """What no data sheet says; guesses until a GPU has been measured.

    Attributes:
        arithmetic: share of the arithmetic peak that convolutions and matrix products reach.
        memory: share of the bandwidth's peak that any kernel reaches.
        kernel_s: seconds that each kernel in a CUDA graph takes beyond its work: to start, and to drain.
    """

    arithmetic: float = 0.5
    memory: float = 0.85
    kernel_s: float = 1.7e-6


ASSUMPTIONS = Assumptions()


@dataclass(frozen=True)
class EpochPrediction:
    """The predicted parts of one epoch, in seconds; see the module's text.

    Attributes:
        card: the GPU's name.
        basis: ``ledger``, or ``floor`` where the ledger has no such model: then ``library_s`` is the floor of
            `fastcifar.models.cost`, of all operations, and the other parts are 0.
        source: in words, where the launches are from, or why there are none.
        kernels_per_step: kernels in one step, library calls included; None without a ledger.
        library_s: convolutions and matrix products.
        generated_s: the compiler's kernels.
        own_s: our kernels, and the gathering of gradients.
        launches_s: starting and ending all kernels of all steps.
        evaluation_s: evaluating test and holdout images, raw and averaged weights.
    """

    card: str
    basis: str
    source: str
    kernels_per_step: float | None
    library_s: float
    generated_s: float = 0.0
    own_s: float = 0.0
    launches_s: float = 0.0
    evaluation_s: float = 0.0

    @property
    def epoch_s(self) -> float:
        """The seconds of one epoch, evaluation included."""
        return self.library_s + self.generated_s + self.own_s + self.launches_s + self.evaluation_s

    def told(self) -> dict[str, Any]:
        """Return it as plain values, with all that is assumed."""
        card = next(card for card in CARDS.values() if card.name == self.card)
        assumed = {"card": card._asdict(), **ASSUMPTIONS._asdict()}
        return {"status": NEVER_MEASURED, "epoch_s": self.epoch_s, **asdict(self), "assumptions": assumed}


def card_of(hardware: str) -> Card | None:
    """Return the card that a hardware's name such as ``h200`` or ``nvidia-h100-80gb-hbm3`` means, or None."""
    return next((card for word, card in CARDS.items() if word in hardware.lower()), None)


def predict_epoch(
    recipe: Recipe, card: Card, ledger: dict[str, dict[str, Any]], cost: Cost | None = None
) -> EpochPrediction:
    """Return the predicted time of a recipe's epoch on a card.

    Args:
        recipe: the run.
        card: one of `CARDS`.
        ledger: recipe -> entry, from `read_ledger`.
        cost: of the recipe's model; computed where it is not given.
    """
    cost = cost or known_cost(recipe.model)
    found = nearest_entry(recipe, ledger) if recipe.engine.mode == "auto" else None
    if found is None:
        return _floor(recipe, card, cost)
    entry, scale = found
    steps = steps_per_epoch(recipe, images_to_train(recipe))
    samples = recipe.train.batch_size * _passes(recipe)
    bytes_per_s = card.gbs * 1e9 * ASSUMPTIONS.memory
    kernels = kernels_of(entry["step"]) * scale.launches
    return EpochPrediction(
        card=card.name,
        basis="ledger",
        source=scale.source,
        kernels_per_step=kernels,
        library_s=steps * samples * _seconds(recipe, card, [o for o in cost.operations if o.kind in LIBRARY]),
        generated_s=steps * entry["generated_bytes"] * scale.traffic / bytes_per_s,
        own_s=steps * own_bytes(recipe, cost, entry["names"]) / bytes_per_s,
        launches_s=steps * kernels * ASSUMPTIONS.kernel_s,
        evaluation_s=_evaluation_s(recipe, card, cost, kernels_of(entry["evaluation"])),
    )


# -------------------------------------------------------------------------------------------------------- the ledger


class Scale(NamedTuple):
    """What an entry of a similar recipe is multiplied by, and what to say about it."""

    launches: float
    traffic: float
    source: str


def read_ledger(folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return recipe -> entry of the null device, from the last of the folders that has a ``launches.json``.

    Raises:
        UserError: the file is not a ledger.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in (folder / "launches.json" for folder in folders):
        try:
            found = json.loads(path.read_text())["devices"].get("null device", {}) if path.exists() else found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read as a ledger of launches ({error!r}); remove it") from None
    return found


def nearest_entry(recipe: Recipe, ledger: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], Scale] | None:
    """Return the entry of the recipe that is most like this one, of the same model and precision, or None."""
    model = _model_kind(recipe)
    held = [(name, other) for name in ledger if (other := _shipped(name)) and _model_kind(other) == model]
    if not held:
        return None
    name, other = max(held, key=lambda pair: _likeness(recipe, pair[1]))
    turns = _turns(recipe) / _turns(other)
    samples = recipe.train.batch_size * _passes(recipe) / (other.train.batch_size * _passes(other))
    same = step_key(recipe) == step_key(other) and turns == 1
    return ledger[name], Scale(turns, samples, f"launches of {name}" + ("" if same else ", the same model, scaled"))


@cache
def _shipped(name: str) -> Recipe | None:
    """Return the training recipe that an entry names; None where it is no longer shipped."""
    try:
        recipe = load_recipe(name)
    except UserError:
        return None
    return recipe if isinstance(recipe, Recipe) else None


def _likeness(recipe: Recipe, other: Recipe) -> tuple[bool, ...]:
    """Return what the two have in common, the most important first; larger is more alike."""
    same_step = step_key(recipe) == step_key(other)
    return (
        same_step and recipe.name == other.name,
        (recipe.mix is None) == (other.mix is None),
        same_step,
        _passes(recipe) == _passes(other),
    )


def _model_kind(recipe: Recipe) -> tuple[str, str]:
    return step_key(recipe).split(" | ")[0], recipe.engine.gpu_precision


def _passes(recipe: Recipe) -> float:
    """Return how often a step goes through the model with each sample, forward and backward: the mean over the run."""
    return recipe.passes_per_step


def _turns(recipe: Recipe) -> float:
    """Return how often a step calls the model: micro-batches times passes."""
    return _passes(recipe) * recipe.train.accumulate


def kernels_of(work: dict[str, Any]) -> int:
    """Return the kernels of an entry's ``step`` or ``evaluation``.

    A library call is taken for one kernel, a convolution's backward pass for two (of its input and of its weights).
    """
    library = sum(count * (2 if "backward" in name else 1) for name, count in work["library"].items())
    return sum(work["launches"].values()) + library


# ------------------------------------------------------------------------------------------------------------- parts


def own_bytes(recipe: Recipe, cost: Cost, names: Mapping[str, int]) -> float:
    """Return the bytes that our own kernels read and write in a step, and the gathering of gradients.

    Args:
        recipe: the run.
        cost: of its model.
        names: the kernels in the ledger's step, with how often: they tell whether BatchNorm is ours or the compiler's,
            and how many of its layers were given their input's sums.
    """
    wide = _bytes_per_value(recipe)
    moved: float = flat_bytes(recipe) * cost.parameters + recipe.train.batch_size * IMAGE_VALUES * (1 + wide)
    if "statistics_kernel" in names:
        norms = sum(o.values for o in cost.operations if o.kind == "batch_norm")
        # One of the eight reads and writes of each input is for its statistics; all layers are taken for one size.
        moves = 1 - (1 - names["statistics_kernel"] / names["normalize_kernel"]) / 8
        moved += recipe.train.batch_size * _passes(recipe) * norms * moves * wide
    return moved


def flat_bytes(recipe: Recipe) -> float:
    """Return the bytes a parameter that a step moves in the flat buffers, all of float32 but the working copy."""
    copy = 2 if recipe.engine.gpu_precision in ("bf16", "fp16") and recipe.train.accumulate == 1 else 0
    gathering = (copy or 4) + 4  # of the gradients: read where autograd left them, written into the flat buffer
    ascent = 4 * (2 + 4) + copy  # SAM: the norm reads w, g; the step reads w, g and writes w, saved
    moments = 2 if recipe.optimizer.name in ("adam", "adamw") else 1
    update = 4 * (3 + 2 * moments) + copy  # reads w, g and the moments; writes w and the moments
    averages = 4 * 2 if recipe.ema else 0
    return _passes(recipe) * gathering + (_passes(recipe) - 1) * ascent + update + averages


def _bytes_per_value(recipe: Recipe) -> int:
    return 2 if recipe.engine.gpu_precision in ("bf16", "fp16") else 4


def _seconds(recipe: Recipe, card: Card, operations: Iterable[Operation]) -> float:
    """Return the seconds of these operations for one image, forward and backward."""
    flops_per_s = card.tflops[recipe.engine.gpu_precision] * 1e12 * ASSUMPTIONS.arithmetic
    values_per_s = card.gbs * 1e9 * ASSUMPTIONS.memory / _bytes_per_value(recipe)
    return sum(operation.floor_s(flops_per_s, values_per_s) for operation in operations)


def _evaluation_s(recipe: Recipe, card: Card, cost: Cost, kernels: int) -> float:
    """Return the seconds of evaluation in an epoch, without what only the last epoch does."""
    sizes = [recipe.data.test_subset or CIFAR_TEST, recipe.data.holdout]
    passes = (2 if recipe.ema else 1) / recipe.eval.every_epochs
    batches = sum(-(-size // recipe.eval.batch_size) for size in sizes)
    image_s = FORWARD_SHARE * _seconds(recipe, card, cost.operations)
    return passes * (sum(sizes) * image_s + batches * kernels * ASSUMPTIONS.kernel_s)


def _floor(recipe: Recipe, card: Card, cost: Cost) -> EpochPrediction:
    """Return what is left without launches: the cost model's floor at the peaks that we assume to be reached."""
    samples = images_to_train(recipe) * _passes(recipe)
    graphed = recipe.engine.mode == "auto"
    why = "no launches of this model in the ledger" if graphed else "the ledger knows engine.mode auto only"
    return EpochPrediction(
        card=card.name,
        basis="floor",
        source=f"{why}: the cost model's floor, launches and elementwise kernels left out",
        kernels_per_step=None,
        library_s=samples * _seconds(recipe, card, cost.operations),
        evaluation_s=_evaluation_s(recipe, card, cost, 0),
    )
