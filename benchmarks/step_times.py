"""How long one step, one image's evaluation and the compilation of each kind of step in the recipes take.

`fastcifar plan --ladder` predicts the time of a run from these. Each kind is measured with the first recipe that has
it, on synthetic images that are resident on the device. Without a GPU, kinds of more than a few seconds a step are left
out, as is everything but two cheap kinds with ``--quick``.
"""

from collections.abc import Callable

import torch

from common import Row, alternate, device, main, result, timed
from fastcifar.augment.augment import build_augment
from fastcifar.augment.mix import build_mix
from fastcifar.config import load_recipe, shipped_recipes
from fastcifar.config.schema import Recipe
from fastcifar.data.batch import Batch
from fastcifar.models import build_model
from fastcifar.models.budget import compilation_key, evaluation_key, step_key
from fastcifar.models.cost import cost_of_config
from fastcifar.train.precision import PRECISIONS
from fastcifar.train.step import build_step

STEPS_PER_EPOCH = 391
GPU_LESS_GMACS = 50.0  # of a batch's forward pass; one step of more takes over 2 s on two cores


def kinds(quick: bool) -> list[Recipe]:
    """Return one recipe per kind of step, cheapest forward pass first."""
    loaded = (load_recipe(path) for path in shipped_recipes())
    found: dict[str, Recipe] = {}
    for recipe in loaded:
        if isinstance(recipe, Recipe):
            found.setdefault(step_key(recipe), recipe)
    cost = {key: cost_of_config(r.model).macs * r.train.batch_size / 1e9 for key, r in found.items()}
    ordered = [found[key] for key in sorted(found, key=cost.__getitem__)]
    if device().type == "cuda":
        return ordered
    affordable = [recipe for recipe in ordered if cost[step_key(recipe)] <= GPU_LESS_GMACS]
    return affordable[:2] if quick else affordable


class Kind:
    """One kind of step, built on synthetic images that are resident on the device."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.device = recipe, device()
        generator = torch.Generator().manual_seed(0)
        count = recipe.train.batch_size
        images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
        labels, rows = torch.randint(0, 10, (count,), generator=generator), torch.arange(count)
        self.batch = Batch(*(tensor.to(self.device) for tensor in (images, rows, labels, rows)))
        self.augment = build_augment(
            recipe.augment, mean=recipe.data.mean, std=recipe.data.std, image_shape=(32, 32, 3),
            seed=recipe.seed, device=self.device, dtype=PRECISIONS[recipe.engine.precision].images,
        )  # fmt: skip
        mix = build_mix(recipe.mix, seed=recipe.seed, epochs=recipe.train.epochs, steps_per_epoch=STEPS_PER_EPOCH)
        model = build_model(recipe.model, seed=recipe.seed).to(self.device)
        self.step = build_step(
            recipe, model, self.augment, mix, steps_per_epoch=STEPS_PER_EPOCH, device=self.device
        )

    def train(self, steps: int) -> float:
        """Return the milliseconds that one step takes, over ``steps`` of them."""
        self.step.begin_epoch(0)

        def work() -> None:
            for _ in range(steps):
                self.step(self.batch)

        return 1e3 * timed(work, self.device) / steps

    def evaluate(self) -> float:
        """Return the milliseconds that one image's evaluation takes, in a batch of the training's size."""
        images = self.augment.plain(self.batch.images)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.engine.precision == "bf16")
        self.step.model.eval()
        with torch.no_grad(), half:
            return 1e3 * timed(lambda: self.step.model(images), self.device) / len(images)


def measure(recipe: Recipe, quick: bool) -> list[Row]:
    """Return the rows of one kind: step, evaluation, compilation (the first step beyond the time of a later one)."""
    kind = Kind(recipe)
    first_ms = kind.train(1)
    one_ms = kind.train(1)
    steps = max(1, min(200, int((100 if quick else 500) / one_ms)))  # about half a second a repeat
    sides: dict[str, Callable[[], float]] = {
        step_key(recipe): lambda: kind.train(steps),
        evaluation_key(recipe): kind.evaluate,
    }
    measures = alternate(sides, n=3 if quick else 5)
    rows = [result(name, values, "ms", higher_is_better=False) for name, values in measures.items()]
    return [*rows, result(compilation_key(recipe), [max(0.0, first_ms - one_ms)], "ms", higher_is_better=False)]


def run(quick: bool) -> list[Row]:
    """Measure each kind of step, in milliseconds."""
    rows = [row for recipe in kinds(quick) for row in measure(recipe, quick)]
    return list({row["name"]: row for row in rows}.values())


if __name__ == "__main__":
    main("step_times", run)
