"""The training step against two plain loops, by mode, and by its parts.

Each kind of step is the one of a shipped recipe, on synthetic images that are resident. The bare loop trains lenet5 on
tensors that are normalized beforehand and lie in memory: nothing but indexing, forward, backward and Adam. The other,
``published.py``, is our reimplementation of the training loop of github.com/windopper/cifar (commit 70ec89d):
DataLoader with four workers, PIL transforms, fp32, ASAM and averages per tensor. On a GPU there is a third: WRN-16-8 in
channels-last, compiled, with torch's fused SGD, on images that are normalized beforehand and not augmented. Both bare
loops have the precision of our step, bf16 where there are instructions for it. ``--recipe`` takes other recipes.
"""

import resource
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common import THEIR_LOOP, Row, alternate, device, execute, parser_of, result, timed
from fastcifar.augment.augment import build_augment
from fastcifar.augment.mix import build_mix
from fastcifar.config import load_recipe
from fastcifar.config.operations import AutoAugment, Rotate
from fastcifar.config.schema import Recipe
from fastcifar.data.batch import Batch
from fastcifar.device import with_precision
from fastcifar.errors import UserError
from fastcifar.kernels.sam import ascend, norm_squared
from fastcifar.models import build_model
from fastcifar.train.precision import PRECISIONS
from fastcifar.train.selection import build_proxy
from fastcifar.train.step import Step, build_step
from published import PublishedLoop

IMAGES, BATCH = 50_000, 128
BARE = {
    "cpu": "bare PyTorch loop over tensors in memory", "cuda": "bare compiled {} loop over tensors in memory",
}  # fmt: skip


def synthetic(count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), generator.integers(0, 10, count)


class Ours:
    """A recipe's step on resident images, a number of steps at a time."""

    def __init__(self, recipe: Recipe, images: np.ndarray, labels: np.ndarray, mode: str = "auto") -> None:
        changed = recipe.engine.model_copy(update={"mode": mode})
        self.device = device()
        self.recipe = recipe = with_precision(recipe.model_copy(update={"engine": changed}), self.device)
        self.images, self.labels = (torch.from_numpy(a).to(self.device) for a in (images, labels))
        augment = build_augment(
            recipe.augment, mean=recipe.data.mean, std=recipe.data.std, image_shape=(32, 32, 3), seed=0,
            device=self.device, dtype=PRECISIONS[recipe.engine.precision].images,
        )  # fmt: skip
        self.size, per_epoch = recipe.train.batch_size, len(images) // recipe.train.batch_size
        mix = build_mix(recipe.mix, seed=0, epochs=recipe.train.epochs, steps_per_epoch=per_epoch)
        model = build_model(recipe.model, seed=0).to(self.device)
        proxy = build_proxy(recipe, 10, 32, self.device)
        self.step: Step = build_step(
            self.recipe, model, augment, mix, steps_per_epoch=per_epoch, device=self.device, proxy=proxy
        )  # fmt: skip
        self._batches = self._forever(per_epoch)

    def _forever(self, per_epoch: int) -> Iterator[Batch]:
        epoch = 0
        while True:
            self.step.begin_epoch(epoch % self.recipe.train.epochs)
            order = torch.randperm(len(self.images), device=self.device)
            for rows in order[: per_epoch * self.size].split(self.size):
                yield Batch(self.images, rows, self.labels[rows], rows)
            epoch += 1

    def take(self, count: int) -> None:
        """Train ``count`` steps."""
        for _ in range(count):
            self.step(next(self._batches))

    def batch(self) -> Batch:
        """Return the next batch."""
        return next(self._batches)


class Bare:
    """What a user writes by hand: normalized tensors in memory, autocast; compiled and fused on a GPU.

    Attributes:
        precision: as our step resolves it on this device.
    """

    def __init__(self, recipe: Recipe, images: np.ndarray, labels: np.ndarray) -> None:
        self.device = device()
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)
        # Neither a slower layout nor a slower precision than ours: bf16 is slow without instructions for it.
        self.precision = with_precision(recipe, self.device).engine.precision
        self.autocast = self.precision == "bf16"
        dtype = torch.bfloat16 if self.autocast else torch.float32
        self.x = x.to(self.device, dtype, memory_format=torch.channels_last)
        self.y = torch.from_numpy(labels).to(self.device)
        self.model = build_model(recipe.model, seed=0).to(self.device, memory_format=torch.channels_last).train()
        gpu = self.device.type == "cuda"
        self.forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(self.model) if gpu else self.model
        settings = {"lr": recipe.optimizer.lr, "weight_decay": recipe.optimizer.weight_decay, "fused": gpu}
        if recipe.optimizer.name == "sgd":
            momentum = {"momentum": recipe.optimizer.momentum, "nesterov": recipe.optimizer.nesterov}
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), **settings, **momentum)
        else:
            self.optimizer = torch.optim.Adam(self.model.parameters(), **settings)
        self.order, self.at = torch.randperm(len(self.x), device=self.device), 0

    def take(self, count: int) -> None:
        """Train ``count`` steps."""
        for _ in range(count):
            rows = self.order[self.at : self.at + BATCH]
            self.at = (self.at + BATCH) % (len(self.x) - BATCH)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                loss = F.cross_entropy(self.forward(self.x[rows]), self.y[rows])
            loss.backward()
            self.optimizer.step()


def published(recipe: Recipe, images: np.ndarray, labels: np.ndarray) -> PublishedLoop:
    """Return the reimplemented loop with a recipe's settings."""
    kinds = {type(op) for op in recipe.augment.ops}
    augment = "autoaugment" if AutoAugment in kinds else "standard" if Rotate in kinds else "none"
    model = build_model(recipe.model, seed=0).to(memory_format=torch.contiguous_format)
    return PublishedLoop(
        model, images, labels, device=device(), augment=augment, optimizer=recipe.optimizer.name,
        lr=recipe.optimizer.lr, rho=recipe.asam.rho if recipe.asam else 0.0,
        decay=recipe.ema.decay if recipe.ema else 0.0, smoothing=recipe.loss.label_smoothing,
        batch_size=recipe.train.batch_size,
    )  # fmt: skip


def rate(take: Callable[[int], Any], steps: int, size: int) -> Callable[[], float]:
    """Return a side for `alternate`: images a second over some steps."""
    return lambda: steps * size / timed(lambda: take(steps), device())


def steady_rate(loop: PublishedLoop, steps: int, size: int) -> Callable[[], float]:
    """Return `rate` of the reimplemented loop, which first takes as many untimed steps as batches may lie ready.

    Its workers go on while other sides are timed: the batches that they have made by then would cost it nothing.
    """
    measure = rate(loop.steps, steps, size)

    def side() -> float:
        loop.steps(loop.ahead)
        return measure()

    return side


def against_bare(name: str, images: np.ndarray, labels: np.ndarray, rounds: int, steps: int) -> list[Row]:
    recipe = _recipe(name)
    ours = Ours(recipe, images, labels)
    ours.take(3)
    # The highest so far, before the bare loop makes its own tensors.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bare = Bare(recipe, images, labels)
    sides = {"ours": rate(ours.take, steps, BATCH), "bare": rate(bare.take, steps, BATCH)}
    found = alternate(sides, rounds, warmup=2)
    return [
        result(name, found["ours"], "images/s", BARE[bare.device.type].format(bare.precision), found["bare"]),
        result(f"{name}: peak host memory", [peak], "GiB"),
    ]


def by_mode(name: str, images: np.ndarray, labels: np.ndarray, rounds: int, steps: int) -> list[Row]:
    """Compare the modes that make sense on this device with each other and with the reimplemented loop."""
    recipe = _recipe(name)
    modes = ("eager", "compile", "graph", "auto") if device().type == "cuda" else ("eager",)
    ours = {mode: Ours(recipe, images, labels, mode) for mode in modes}
    theirs, size = published(recipe, images, labels), recipe.train.batch_size
    sides = {mode: rate(side.take, steps, size) for mode, side in ours.items()}
    found = alternate(sides | {"published": steady_rate(theirs, steps, size)}, rounds)
    theirs.close()
    rows = []
    for mode, side in ours.items():
        done = side.step.execution
        label = f"{name}: {mode}" + (f" ({done.mode}; {done.fallback})" if done.fallback else "")
        rows.append(result(label, found[mode], "images/s", THEIR_LOOP, found["published"]))
    return rows + parts(name, ours["eager"], steps)


def parts(name: str, ours: Ours, repeats: int) -> list[Row]:
    """Time an eager step and each of its parts alone, on one batch."""
    step, batch = ours.step, ours.batch()
    images, target = step.inputs(batch)
    sides: dict[str, Callable[[], Any]] = {
        "whole step, eager": lambda: step(ours.batch()),
        "augmentation and mixing": lambda: step.inputs(batch),
        "forward and backward, once": lambda: step.backward(images, target, len(images)),
    }
    if ours.recipe.asam is not None:
        sides["norm and ascent"] = lambda: ascent_step(step)
    sides["optimizer step, average"] = lambda: step.optimizer.step(step.cursor.lr)
    rows = []
    for what, work in sides.items():
        work()
        rows.append(result(f"{name}: {what}", [1e3 * timed(work, ours.device) for _ in range(repeats)], "ms"))
    return rows


def ascent_step(step: Step) -> None:
    """Take SAM's ascent step by whatever lies in the gradient buffer."""
    flat = step.flat
    partials = norm_squared(flat.weights, flat.grads, step.ascent)
    ascend(flat.weights, flat.grads, torch.empty_like(flat.weights), partials, step.ascent)  # type: ignore[arg-type]


def _recipe(name: str) -> Recipe:
    """Load a recipe whose steps are all of one kind.

    Raises:
        UserError: it is not one.
    """
    recipe = load_recipe(name)
    if not isinstance(recipe, Recipe):
        raise UserError(f"{name}: combines trained runs; name a recipe that trains")
    if recipe.distill is not None:
        raise UserError(f"{name}: its teacher is another run; name the recipe that it extends")
    if recipe.asam is not None and recipe.asam.start:
        raise UserError(f"{name}: has two kinds of steps, without and with ASAM; name a recipe with asam.start = 0")
    return recipe


def run(quick: bool, recipes: list[str] | None = None) -> list[Row]:
    warnings.filterwarnings("ignore", message="This DataLoader will create 4 worker")
    images, labels = synthetic(5_000 if quick else IMAGES)
    gpu = device().type == "cuda"
    bare = ["lenet5", "wrn-sgd"] if gpu and not quick else ["lenet5"]
    names = ["deep-bn", "wrn-sgd", "wrn-200", "pyramid200"] if gpu else ["lenet5", "deep-bn"]
    if quick:
        names = ["wrn-200"] if gpu else ["lenet5"]
    if recipes:  # the bare loop has neither ASAM nor batches of other sizes
        names, bare = recipes, [name for name in recipes if name in ("lenet5", "wrn-sgd")]
    rows: list[Row] = []
    for name in bare:
        rows += against_bare(name, images, labels, 3 if quick else 9, 10 if quick else 60)
    for name in names:
        rows += by_mode(name, images, labels, 2 if quick else 5, 5 if quick else 20)
    return rows


def _main() -> None:
    parser = parser_of("step")
    parser.add_argument("--recipe", action="append", help="this one's step; more than once for several")
    arguments = parser.parse_args()
    execute("step", arguments, lambda quick: run(quick, arguments.recipe), arguments.recipe)


if __name__ == "__main__":
    _main()
