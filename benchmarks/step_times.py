"""How long one step, one image's evaluation and the compilation of each kind of step in the recipes take.

`fastcifar plan --ladder` predicts the time of a run from these. Each kind is measured with the first recipe that has
it, on synthetic images that are resident on the device, in a process of its own and with empty caches of compiled code:
its compilation is its own, also where kinds share kernels. Without a GPU, kinds of more than a few seconds a step are
left out, as is everything but two cheap kinds with ``--quick``; distilled ones always, whose teacher is another run.
Where SAM's ascent starts late, the time is the mean over the run.

What is measured of a kind is in the results file at once, in a report that is not ``complete``; the next start goes on
after it, where sources and torch are still the same.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from common import Row, alternate, device, main, result, timed
from fastcifar.augment.augment import build_augment
from fastcifar.augment.mix import build_mix
from fastcifar.config import load_recipe, shipped_recipes
from fastcifar.config.schema import Recipe
from fastcifar.data.batch import Batch
from fastcifar.device import with_precision
from fastcifar.errors import UserError
from fastcifar.models import build_model
from fastcifar.models.budget import (
    compilation_key,
    evaluation_key,
    images_to_train,
    step_key,
    steps_per_epoch,
)
from fastcifar.models.cost import forward_macs
from fastcifar.train.evaluate import Evaluator
from fastcifar.train.precision import PRECISIONS
from fastcifar.train.selection import build_proxy
from fastcifar.train.step import build_step
from resuming import keep, unfinished

IMAGE_SHAPE, CLASSES = (32, 32, 3), 10
SAMPLE_S = 0.5  # the least time that one measure takes, so that many replays are in it
GPU_LESS_GMACS = 50.0  # of a batch's forward pass; one step of more takes over 2 s on two cores


def kinds(quick: bool) -> list[Recipe]:
    """Return one recipe per kind of step, cheapest forward pass first."""
    loaded = (load_recipe(path) for path in shipped_recipes())
    found: dict[str, Recipe] = {}
    for recipe in loaded:
        if isinstance(recipe, Recipe) and recipe.distill is None:
            found.setdefault(step_key(recipe), recipe)
    cost = {key: forward_macs(r.model) * r.train.batch_size / 1e9 for key, r in found.items()}
    ordered = [found[key] for key in sorted(found, key=cost.__getitem__)]
    if device().type == "cuda":
        return ordered
    affordable = [recipe for recipe in ordered if cost[step_key(recipe)] <= GPU_LESS_GMACS]
    return affordable[:2] if quick else affordable


class Kind:
    """One kind of step with its evaluation, built on synthetic images that are resident on the device.

    Attributes:
        batch: a whole one.
        odd: the epoch's smaller last batch, or None where there is none.
        images: uint8, one batch of evaluation.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.device = device()
        self.recipe = recipe = with_precision(recipe, self.device)
        self.batch, self.images = synthetic_batch(recipe, self.device)
        precision, steps = PRECISIONS[recipe.engine.precision], steps_per_epoch(recipe, images_to_train(recipe))
        rest = 0 if recipe.train.drop_last else images_to_train(recipe) % recipe.train.batch_size
        self.odd = self.batch.first(rest) if rest else None
        precision.apply_to_cuda()
        augment = build_augment(
            recipe.augment, mean=recipe.data.mean, std=recipe.data.std, image_shape=IMAGE_SHAPE,
            seed=recipe.seed, device=self.device, dtype=precision.images,
        )  # fmt: skip
        mix = build_mix(recipe.mix, seed=recipe.seed, epochs=recipe.train.epochs, steps_per_epoch=steps)
        model = build_model(recipe.model, seed=recipe.seed).to(self.device)
        proxy = build_proxy(recipe, CLASSES, IMAGE_SHAPE[0], self.device)
        self.step = build_step(
            recipe, model, augment, mix, steps_per_epoch=steps, device=self.device, proxy=proxy
        )  # fmt: skip
        mode, size = self.step.execution.mode, recipe.eval.batch_size
        self.evaluator = Evaluator(model, augment, precision, self.device, size, mode)

    def compile(self) -> None:
        """Compile, capture and warm up every shape of training and evaluation, as a run does before its first step."""
        self.step.begin_epoch(0)
        self.step.execution.warm_up([self.batch, *([self.odd] if self.odd else [])])
        self.evaluator.warm_up(IMAGE_SHAPE)

    def train(self, steps: int) -> float:
        """Return the milliseconds that one step of the run takes on average, over ``steps`` in each of its phases."""
        start = self.recipe.asam.start if self.recipe.asam else 0.0
        if not start:
            return self._train(steps, 0)
        return start * self._train(steps, 0) + (1 - start) * self._train(steps, self.recipe.train.epochs - 1)

    def _train(self, steps: int, epoch: int) -> float:
        def work() -> None:
            for k in range(steps):
                if k % len(self.step.losses) == 0:
                    self.step.begin_epoch(epoch)  # each step of an epoch has its place in the losses
                self.step(self.batch)

        return 1e3 * timed(work, self.device) / steps

    def evaluate(self, batches: int) -> float:
        """Return the milliseconds that one image's evaluation takes, over batches of the recipe's evaluation size."""

        def work() -> None:
            for _ in range(batches):
                self.evaluator.logits(self.images)

        return 1e3 * timed(work, self.device) / (batches * len(self.images))


def synthetic_batch(recipe: Recipe, where: torch.device) -> tuple[Batch, torch.Tensor]:
    """Return a batch of training and uint8 images of a batch of evaluation, of random bytes, on the device."""
    generator = torch.Generator().manual_seed(0)
    count, sizes = recipe.train.batch_size, (recipe.train.batch_size, recipe.eval.batch_size)
    train, test = (torch.randint(0, 256, (n, *IMAGE_SHAPE), dtype=torch.uint8, generator=generator) for n in sizes)
    labels, rows = torch.randint(0, 10, (count,), generator=generator), torch.arange(count)
    return Batch(*(tensor.to(where) for tensor in (train, rows, labels, rows))), test.to(where)


def measure(recipe: Recipe, quick: bool) -> list[Row]:
    """Return the rows of one kind: step, evaluation, compilation with warm-up of all shapes."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        kind = Kind(recipe)
        compilation_ms = 1e3 * timed(kind.compile, kind.device)
        kind.train(1)
        kind.evaluate(1)
        sample_ms = 1e3 * SAMPLE_S / (5 if quick else 1)
        steps = max(1, round(sample_ms / kind.train(3)))
        batches = max(1, round(sample_ms / (kind.evaluate(3) * len(kind.images))))
        sides: dict[str, Callable[[], float]] = {
            step_key(recipe): lambda: kind.train(steps),
            evaluation_key(recipe): lambda: kind.evaluate(batches),
        }
        measures = alternate(sides, n=3 if quick else 5)
    if kind.evaluator.fallback:
        raise UserError(f"{recipe.name}: {kind.evaluator.fallback}")
    rows = [result(name, values, "ms", higher_is_better=False) for name, values in measures.items()]
    return [*rows, result(compilation_key(recipe), [compilation_ms], "ms", higher_is_better=False)]


def measure_apart(recipe: Recipe, quick: bool) -> list[Row]:
    """Return `measure` of a new process.

    Raises:
        UserError: the kind cannot be measured here.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, recipe, quick).result()
        except BrokenProcessPool:
            raise UserError(f"{recipe.name}: the process ended before it had measured anything") from None


def run(quick: bool) -> list[Row]:
    """Measure each kind of step, in milliseconds; a kind that fails does not keep the others from being measured.

    Raises:
        UserError: a kind failed.
    """
    path, report = (Path(), None) if quick else unfinished("step_times")
    rows: dict[str, Row] = {row["name"]: row for row in report["results"]} if report else {}
    failed = []
    for recipe in kinds(quick):
        if compilation_key(recipe) in rows:
            continue
        print(f"step_times: {step_key(recipe)}", file=sys.stderr)
        try:
            rows |= {row["name"]: row for row in measure_apart(recipe, quick)}
        except UserError as error:
            failed.append(str(error))
        if not quick:
            keep(path, "step_times", list(rows.values()))
    if failed:
        raise UserError("; ".join(failed))
    return list(rows.values())


if __name__ == "__main__":
    main("step_times", run)
