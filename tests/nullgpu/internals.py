"""The one place where the null device's tests touch fastcifar's internals; it runs in the child process.

All else drives the project as a user does. Where a module moves, this file is what follows it.
"""

import contextlib
import io
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastcifar.augment.augment import build_augment
from fastcifar.augment.mix import build_mix
from fastcifar.config import Recipe, load_recipe
from fastcifar.data.batch import Batch
from fastcifar.device import with_precision
from fastcifar.errors import UserError
from fastcifar.models import build_model
from fastcifar.models.shakedrop import ShakeDraws
from fastcifar.train import execution
from fastcifar.train.clock import Clock
from fastcifar.train.cuda_graph import GraphedStep
from fastcifar.train.evaluate import Evaluator
from fastcifar.train.execution import Execution
from fastcifar.train.precision import PRECISIONS
from fastcifar.train.selection import build_proxy
from fastcifar.train.step import Step, build_step
from fastcifar.train.together import Own

IMAGE_SHAPE = (32, 32, 3)
Patches = Iterator[tuple[Any, str, Any]]
"""Owners, names of their attributes, and what to put there."""

seen_steps: list[Step] = []
"""Every step object that was called, in order; the last one belongs to the running job."""

seen_draws: list[tuple[int, int, int, int]] = []
"""Of each call of a step: the run's seed, the address of its images, and its generator's seed and offset after it."""


def watch(mark: Callable[[str, Any], None]) -> None:
    """Mark in the device's log where steps, evaluations and captures begin and end, and which clock is running.

    Args:
        mark: takes a word and a detail; report.py reads them.
    """
    called = Step.__call__

    def watched_step(self: Step, batch: Batch) -> None:
        if self not in seen_steps:
            seen_steps.append(self)
        called(self, batch)
        generator = torch.cuda.default_generators[0]
        drawn = generator.initial_seed(), generator.get_offset()
        seen_draws.append((self.recipe.seed, batch.images.data_ptr(), *drawn))

    Step.__call__ = region(mark, "step", watched_step, rows=lambda step, batch: len(batch.rows))  # type: ignore
    GraphedStep.capture = region(  # type: ignore[method-assign]
        mark, "capture step", GraphedStep.capture, rows=lambda graphed, batch: len(batch.rows)
    )
    Evaluator._capture = region(  # type: ignore[method-assign]
        mark, "capture evaluation", Evaluator._capture, rows=lambda evaluator, kind: evaluator.batch_size
    )
    Evaluator.logits = region(  # type: ignore[method-assign]
        mark, "evaluation", Evaluator.logits, rows=lambda evaluator, images, *rest: len(images)
    )
    span = Clock.span

    @contextmanager
    def watched_span(self: Clock, name: str) -> Iterator[None]:
        mark(f"span {name}", "")
        try:
            with span(self, name):
                yield
        finally:
            mark("span ", "")

    Clock.span = watched_span  # type: ignore[method-assign]


def region(mark: Callable[[str, Any], None], kind: str, work: Callable[..., Any], rows: Callable[..., int]) -> Any:
    """Return a method that does ``work`` between the marks of a region; ``rows`` counts the images in its arguments."""

    @wraps(work)
    def marked(*args: Any, **kwargs: Any) -> Any:
        mark(f"region {kind}", rows(*args))
        try:
            return work(*args, **kwargs)
        finally:
            mark("region-end", "")

    return marked


def modes() -> dict[str, Any]:
    """Return how the last step was executed and why that is less than was asked for, if it is."""
    step = seen_steps[-1] if seen_steps else None
    if step is None:
        return {"mode": None, "fallback": None}
    return {"mode": step.execution.mode, "fallback": step.execution.fallback}


def command(*words: str) -> dict[str, Any]:
    """Run ``fastcifar WORDS...`` in this process and return its status and what it printed to stderr."""
    printed, before, status = io.StringIO(), sys.argv, 0
    sys.argv = ["fastcifar", *words]
    try:
        with contextlib.redirect_stderr(printed):
            runpy.run_module("fastcifar", run_name="__main__")
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        sys.argv = before
    return {"status": status, "stderr": printed.getvalue()}


def run_summary(folder: Path) -> dict[str, Any]:
    """Return the summary of a run directory."""
    from fastcifar.run_directory import RunDirectory

    return dict(RunDirectory.open(folder).summary)


# --------------------------------------------------------------------------- faults that the project once had, put back


def draw_in_the_model() -> Patches:
    """Draw ShakeDrop's factors inside the compiled model, with Philox's constants, instead of in an operator."""

    def forward(self: ShakeDraws, batch: int) -> torch.Tensor:
        blocks = torch.arange(len(self.thresholds), device=self.counter.device) * 0xCD9E8D57
        words = (
            blocks[:, None, None] + torch.arange(2 * batch, device=self.counter.device).view(2, batch)
        ) ^ self.counter
        return (words & 0xFFFFFF).float() / 2**24

    yield ShakeDraws, "forward", forward


def capture_without_a_rehearsal() -> Patches:
    """Capture without looking for waits first, and go on without a graph where the capture fails."""
    capture = Execution.warm_up

    def first_wait(run: Callable[[], Any]) -> None:
        run()

    def warm_up(self: Execution, batches: Iterable[Batch]) -> None:
        batches = list(batches)
        try:
            capture(self, batches)
        except UserError as error:
            self.graph, self.fallback = None, f"the step cannot be captured: {error}"

    yield execution, "first_wait", first_wait
    yield Execution, "warm_up", warm_up


def warm_up_one_shape() -> Patches:
    """Prepare the whole batch only, and leave the odd last one to the first epoch."""
    warm_up = Execution.warm_up

    def first_only(self: Execution, batches: Iterable[Batch]) -> None:
        warm_up(self, islice(batches, 1))

    yield Execution, "warm_up", first_only


def one_generator_for_all() -> Patches:
    """Let runs side by side draw from one state of torch's generator, each on a stream of its own."""

    @contextmanager
    def on_stream(self: Own) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    yield Own, "_on_stream", on_stream


FAULTS: dict[str, Callable[[], Patches]] = {
    "wide indices": draw_in_the_model, "failed capture": capture_without_a_rehearsal, "odd batch": warm_up_one_shape,
    "one generator": one_generator_for_all,
}  # fmt: skip


@contextmanager
def fault(name: str) -> Iterator[None]:
    """Have a fault of `FAULTS` for the time of a block."""
    patches = list(FAULTS[name]())
    before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in patches]
    for owner, attribute, spoilt in patches:
        setattr(owner, attribute, spoilt)
    try:
        yield
    finally:
        for owner, attribute, sound in before:
            setattr(owner, attribute, sound)


# ---------------------------------------------------------------------------------------------- a step without a loader


class Waiting:
    """An augmentation that waits for the device, which a capture forbids."""

    def __init__(self, augment: Any) -> None:
        self._augment = augment

    def __call__(self, batch: Batch, epoch: Any) -> torch.Tensor:
        """Return the augmented images after a look at one of them."""
        images: torch.Tensor = self._augment(batch, epoch)
        images.sum().item()
        return images


class Bench:
    """A recipe's step on synthetic images that are resident on the device, without a loader or a run directory.

    Args:
        name: a shipped recipe.
        changes: ``table.key=value`` as ``--set`` takes them.
        batches: whole batches in the set.
        spoil: put around the augmentation, such as `Waiting`.
    """

    def __init__(
        self, name: str, changes: list[str], batches: int = 2, spoil: Callable[[Any], Any] | None = None
    ) -> None:
        recipe = load_recipe(name, changes)
        if not isinstance(recipe, Recipe):
            raise ValueError(f"{name} trains nothing")
        self.device = torch.device("cuda")
        self.recipe = recipe = with_precision(recipe, self.device)
        self.size, self.steps = recipe.train.batch_size, batches + 1
        count = self.size * batches
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (count, *IMAGE_SHAPE), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (count,), generator=generator)
        augment = build_augment(
            recipe.augment, mean=recipe.data.mean, std=recipe.data.std, image_shape=IMAGE_SHAPE,
            seed=0, device=self.device, dtype=PRECISIONS[recipe.engine.precision].images,
        )  # fmt: skip
        mix = build_mix(recipe.mix, seed=0, epochs=recipe.train.epochs, steps_per_epoch=self.steps)
        self.model = build_model(recipe.model, seed=0).to(self.device)
        given = spoil(augment) if spoil else augment
        proxy = build_proxy(recipe, 10, IMAGE_SHAPE[0], self.device)
        self.step = build_step(
            recipe, self.model, given, mix, steps_per_epoch=self.steps, device=self.device, proxy=proxy
        )
        self.evaluator = Evaluator(
            self.model, augment, self.step.precision, self.device, recipe.eval.batch_size, self.step.execution.mode
        )
        self._images, self._labels = images.to(self.device), labels.to(self.device)
        self._rows = torch.arange(count, device=self.device)

    def batch(self, number: int, size: int = 0) -> Batch:
        """Return one batch of the resident set: a whole one, or its first ``size`` images."""
        rows = self._rows[number * self.size : number * self.size + (size or self.size)]
        return Batch(self._images, rows, self._labels[rows], rows)

    def evaluate(self) -> None:
        """Evaluate one batch with the raw weights, and with the averaged ones where the recipe has them."""
        images = self._images[: self.recipe.eval.batch_size]
        for kind in ("raw", "ema") if self.recipe.ema else ("raw",):
            with self.step.weights(kind):
                self.evaluator.logits(images)
