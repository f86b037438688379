"""What a recipe and its data must agree on, checked before anything is made: one message instead of a failure later."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastcifar.config.operations import check_size
from fastcifar.config.schema import FIXED_SIZE, Recipe
from fastcifar.data.loaders.base import EpochOrder
from fastcifar.data.store import Store, resolve_store
from fastcifar.data.store import verify as verify_store
from fastcifar.errors import UserError
from fastcifar.models import smallest_px
from fastcifar.track import check_trackers

if TYPE_CHECKING:
    from fastcifar.train.run import Rows


def check_before(recipe: Recipe, data: Path | None, verify: bool = False) -> Store:
    """Find a recipe's data, check that the two go together, and return it; for a run that has no directory yet.

    Args:
        recipe: what is to be trained.
        data: the value of ``--data``.
        verify: hash every byte of the data, also of files that were hashed before and look unchanged.

    Raises:
        UserError: no such data, or it does not go with the recipe.
    """
    from fastcifar.train.run import choose_rows

    check_trackers(recipe.track)
    store = resolve_store(recipe.data, data)
    if verify:
        verify_store(store.root)
    rows = choose_rows(recipe.data, store, recipe.seed)
    check_data(recipe, store, rows)
    # Only here: a run that an earlier version began so can still be resumed.
    if recipe.train.batch_size > len(rows.train):
        raise UserError(
            f"train.batch_size = {recipe.train.batch_size:,} is larger than the {len(rows.train):,} training images "
            f"of {store.name}, after data.subset and data.holdout; set it to {len(rows.train):,} or less"
        )
    return store


def check_data(recipe: Recipe, store: Store, rows: "Rows", ranks: int = 1) -> None:
    """Check a recipe against its data.

    Args:
        recipe: what is to be trained.
        store: its data.
        rows: those that it chooses.
        ranks: how many devices divide each batch.

    Raises:
        UserError: too few images for a step, or images or classes that the model, the augmentation or the loss
            cannot take.
    """
    _check_counts(recipe, rows, ranks)
    _check_shape(recipe, store)
    weights, classes = recipe.loss.class_weights, len(store.classes)
    if weights is not None and len(weights) != classes:
        raise UserError(f"loss.class_weights: {len(weights)} weights for the {classes} classes of {store.name}")


def _check_counts(recipe: Recipe, rows: "Rows", ranks: int) -> None:
    """Refuse an epoch without a single step, an empty test set, and batches that the ranks cannot divide."""
    size, count = recipe.train.batch_size, len(rows.train)
    check_division(recipe, count, ranks)
    if not EpochOrder(rows.train, recipe.seed, size, recipe.train.drop_last).batches:
        raise UserError(
            f"train.drop_last: {count:,} training images make no whole batch of train.batch_size = {size:,}; "
            f"set train.drop_last = false, or train.batch_size to {max(count, 1):,} or less"
        )
    if not len(rows.test):
        raise UserError("there are no test images; each run is evaluated on them")


def check_division(recipe: Recipe, count: int, ranks: int) -> None:
    """Check that so many ranks can divide a recipe's batches.

    Args:
        recipe: what is to be trained.
        count: its training images.
        ranks: how many.

    Raises:
        UserError: a batch has fewer samples than there are ranks, or would go through them in different numbers of
            micro-batches.
    """
    size, accumulate = recipe.train.batch_size, recipe.train.accumulate
    if recipe.distill is not None and recipe.distill.cache and ranks > 1:
        raise UserError("distill.cache is filled by one device: train on one (--devices 1), or set it to false")
    if recipe.select is not None and ranks > 1:
        raise UserError("select chooses among the samples of a whole batch: train on one device (--devices 1)")
    EpochOrder(np.arange(count), recipe.seed, size, recipe.train.drop_last, world=ranks)
    last = 0 if recipe.train.drop_last else count % size
    if accumulate > 1 and (size % ranks or last % ranks):
        raise UserError(
            f"train.accumulate = {accumulate} needs batches that {ranks} ranks divide evenly, not of {size:,} and "
            f"{last:,} images: choose another train.batch_size, or train.drop_last = true"
        )


def _check_shape(recipe: Recipe, store: Store) -> None:
    """Refuse images of a shape that the model or an operation cannot take."""
    height, width, _ = store.image_shape
    models = {"model": recipe.model} | ({"select.model": recipe.select.model} if recipe.select else {})
    for key, model in models.items():
        if height != width and model.name in FIXED_SIZE:
            raise UserError(
                f"{store.name}: images of {width}x{height} pixels; {key}.name = {model.name!r} needs square ones. Cut "
                "or pad them, or choose residual15, wide_resnet, pyramidnet or speednet, which take any shape"
            )
    if height != width and recipe.data.resize:
        raise UserError(f"{store.name}: images of {width}x{height} pixels; data.resize needs square ones")
    for wide, high in ((width, height), *((px, px) for _, px in recipe.data.resize)):
        where = "data.resize" if (wide, high) != (width, height) else store.name
        for key, model in models.items():
            if min(wide, high) < (least := smallest_px(model)):
                raise UserError(
                    f"{where}: images of {wide}x{high} pixels; {key}.name = {model.name!r} needs {least} px or more"
                )
        check_size(recipe.augment.ops, min(wide, high))
