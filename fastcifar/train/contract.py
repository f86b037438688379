"""A training under the timing contract of the speed records (Jordan, 2024, airbench).

Free is what does not depend on the run's data and seed: reading the images, making the model's memory, compilation and
capture. The clock counts the reset of weights and optimizer, the whitening layer's filters, and all of training:
shuffling, augmentation, steps, learning rates. Evaluation is not counted; what test-time augmentation takes is told
beside it, because airbench's own clock has it.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastcifar.augment.mix import build_mix
from fastcifar.config.schema import ModelBase, Recipe
from fastcifar.device import pick_device, with_precision
from fastcifar.errors import UserError
from fastcifar.models import build_model, hooks
from fastcifar.train.clock import Clock
from fastcifar.train.display import Display
from fastcifar.train.distillation import build_teacher
from fastcifar.train.evaluate import Evaluator
from fastcifar.train.ranks import ALONE
from fastcifar.train.results import diverged
from fastcifar.train.run import evaluation_sets, make_augment, open_data, prepare_teachers, warm_up, with_order
from fastcifar.train.selection import build_proxy
from fastcifar.train.step import build_step

AVERAGES = {"ema": "weights", "stats_ema": "stats", "lookahead": "weights", "stats_lookahead": "stats"}
"""Flat buffers that begin as copies of others."""


class ContractResult(NamedTuple):
    """What one run took and reached.

    Attributes:
        seconds: that count.
        evaluation_s: seconds of the evaluation at the end, test-time augmentation included; they do not count.
        accuracy: of the last epoch, in percent, with the recipe's test-time augmentation.
    """

    seconds: float
    evaluation_s: float
    accuracy: float


class ContractRun:
    """One training, made ready: everything that is free has happened when this has been made. It runs once.

    Args:
        recipe: what to train; its seed decides weights and data.
        data: where the images are, before every other place.

    Raises:
        UserError: bad data, a missing package or GPU; with ``engine.strict``, less than the recipe asks for.
    """

    def __init__(self, recipe: Recipe, data: Path | None = None):
        device = pick_device(recipe.engine)
        recipe = with_precision(recipe, device)
        store, rows, self._loader, order = open_data(recipe, data, device, True, ALONE)
        recipe = with_order(recipe, order)
        self._augment = make_augment(recipe, store.image_shape, device)
        steps, px, classes = len(self._loader), store.image_shape[0], len(store.classes)
        mix = build_mix(recipe.mix, seed=recipe.seed, epochs=recipe.train.epochs, steps_per_epoch=steps)
        self.model = build_model(recipe.model, num_classes=classes, image_px=px, seed=recipe.seed).to(device)
        self._proxy = build_proxy(recipe, classes, px, device)
        wanted = max(hooks.images_to_fit(model) for model in (self.model, self._proxy) if model is not None)
        self._first_images = torch.from_numpy(store.split("train").images[rows.train[:wanted]]).to(device)
        self._recipe, self._classes, self._px = recipe, classes, px
        self.step = build_step(
            recipe, self.model, self._augment, mix, steps_per_epoch=steps, device=device,
            teacher=build_teacher(recipe, store, device), proxy=self._proxy,
        )
        kind = self.step.execution.mode
        evaluator = Evaluator(self.model, self._augment, self.step.precision, device, recipe.eval.batch_size, kind)
        self._test = evaluation_sets(recipe, store, rows, evaluator)["test"]
        self._clock = Clock(device, {"evaluation_s": 0.0})
        self._display = Display(recipe.name, recipe.train.epochs, steps, recipe.train.batch_size, quiet=True)
        with self._display as display:
            epochs = range(recipe.train.epochs)
            warm_up(epochs, self.step, evaluator, self._loader, self._clock, display, store.image_shape)

    def __call__(self) -> ContractResult:
        """Reset, train, evaluate.

        Raises:
            UserError: the loss was not finite.
        """
        with self._clock.span("training_s"):
            self._reset()
            prepare_teachers(range(self._recipe.train.epochs), self.step, self._loader, self._display)
            for epoch in range(self._recipe.train.epochs):
                self.step.begin_epoch(epoch)
                for batch in self._loader.epoch(epoch):
                    self.step(batch)
                if (bad := self.step.end_epoch()["nonfinite_step"]) is not None:
                    raise UserError(diverged(f"the loss was not finite at step {bad} of epoch {epoch + 1}"))
        averaged = "raw" if self._recipe.ema is None else "ema"
        with self._clock.span("evaluation_s"), self.step.weights(averaged):
            accuracy = self._test.metrics(self._recipe.eval.tta).accuracy
        self._loader.close()
        seconds = self._clock.seconds()
        return ContractResult(seconds["training_s"], seconds["evaluation_s"], accuracy)

    @torch.no_grad()
    def _reset(self) -> None:
        """Draw the seed's weights and fit whitening layers, in the memory that is there."""
        flat = self.step.flat
        self._begin_anew(self.model, self._recipe.model)
        if self._proxy is not None and self._recipe.select is not None:
            self._begin_anew(self._proxy, self._recipe.select.model)
        for average, present in AVERAGES.items():
            if average in flat.buffers:
                flat.buffers[average].copy_(flat.buffers[present])
        flat.cast()

    def _begin_anew(self, model: nn.Module, config: ModelBase) -> None:
        fresh = build_model(config, num_classes=self._classes, image_px=self._px, seed=self._recipe.seed)
        model.load_state_dict(fresh.state_dict())
        if wanted := hooks.images_to_fit(model):
            hooks.fit_images(model, self._augment.plain(self._first_images[:wanted]).float())
