"""From a recipe to a trained, evaluated and recorded model, one step after the other.

recipe -> store -> loader -> augment -> model -> step -> evaluate -> record
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcifar import interrupt
from fastcifar.augment.augment import Augment, AugmentBySize, build_augment
from fastcifar.augment.mix import build_mix
from fastcifar.config.schema import DataConfig, Recipe, UserModelConfig
from fastcifar.config.user_code import changes, check_user_code
from fastcifar.data.batch import Batch
from fastcifar.data.loaders import Loader, build_loader, decide_order
from fastcifar.data.loaders.resident import ResidentLoader
from fastcifar.data.loaders.resized import WHOLE, ResizedLoader, first_epochs
from fastcifar.data.pixels import Images, choose
from fastcifar.data.shared import resident_images
from fastcifar.data.split import holdout_split, subset_rows
from fastcifar.data.store import Store, resolve_store
from fastcifar.device import pick_device, with_precision
from fastcifar.errors import UserError
from fastcifar.models import build_model, hooks, user
from fastcifar.open_run import teacher_digest
from fastcifar.run_directory import RunDirectory, as_json
from fastcifar.track import Callback, Callbacks, make_trackers
from fastcifar.train.check_nan import check_finite
from fastcifar.train.checks import check_data
from fastcifar.train.clock import Clock
from fastcifar.train.display import Display, conversion_steps, tell
from fastcifar.train.distillation import build_teacher
from fastcifar.train.evaluate import RESIDENT_BYTES, EvaluationSet, Evaluator
from fastcifar.train.execution import is_strict
from fastcifar.train.follower import Follower
from fastcifar.train.precision import PRECISIONS
from fastcifar.train.profile import profiled
from fastcifar.train.ranks import ALONE, Ranks
from fastcifar.train.results import Results, RunSetting, diverged
from fastcifar.train.resumption import record_resumption
from fastcifar.train.selection import build_proxy
from fastcifar.train.step import Step, build_step


def train(
    recipe: Recipe, run: RunDirectory | Follower, *, data: Path | None = None, stop_after: int | None = None,
    quiet: bool = False, check_nan: bool = False, ranks: Ranks = ALONE, callbacks: Sequence[Callback] = (),
    profile: str | None = None,
) -> dict[str, Any]:
    """Train what is left of a run and return its summary; with several ranks, all of them call it at once.

    Args:
        recipe: the run's own recipe.
        run: its directory, on the first rank; training goes on from its newest checkpoint.
        data: where the images are, before every other place.
        stop_after: end after this many of the planned epochs; the run can be resumed. An epoch that was interrupted is
            finished, also one after these.
        quiet: show no progress.
        check_nan: train eagerly and end at the first layer whose output or gradient is not finite.
        ranks: the processes that train together, each with a slice of every batch.
        callbacks: told of the run's begin, of each epoch, and of the end, beside the recipe's trackers.
        profile: ``10:20`` traces these steps with torch.profiler into the run's ``profile/``.

    Raises:
        UserError: bad data, a missing package or GPU, a full disk, a damaged checkpoint, a loss that is not finite.
    """
    steps = training(
        recipe, run, data=data, stop_after=stop_after, quiet=quiet, check_nan=check_nan, ranks=ranks,
        callbacks=callbacks, profile=profile,
    )
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return dict(end.value)


def training(
    recipe: Recipe, run: RunDirectory | Follower, *, data: Path | None = None, stop_after: int | None = None,
    quiet: bool = False, check_nan: bool = False, ranks: Ranks = ALONE, callbacks: Sequence[Callback] = (),
    profile: str | None = None, together: int = 1,
) -> Generator[None, None, dict[str, Any]]:
    """Do what `train` does, and pause before training and after each step, so that runs can take turns.

    Args, errors and what it returns are those of `train`; ``together`` is how many runs take turns.
    """
    if check_nan:
        recipe = eagerly(recipe)
    told = begin_callbacks(recipe, run, callbacks)
    device, quiet = pick_device(recipe.engine, ranks.place), quiet or not ranks.first
    ranks = ranks.on(device)
    # As it was when the run began, wherever it goes on: the order of the samples and the rounding must stay.
    keys = ("memory_bytes", "precision", "epoch_order")
    memory, precision, order = ranks.from_first([run.environment.get(key) for key in keys])
    recipe = with_precision(recipe, device, precision)
    store, rows, loader, order = open_data(recipe, data, device, quiet, ranks, memory, order)
    record_order(run, recipe, order)
    if together > 1 and loader.name != "resident":
        raise UserError(f"--seeds: the runs share one resident set, but: {loader.reason}")
    augment = make_augment(recipe, store.image_shape, device)
    model, step = make_step(with_order(recipe, order), store, rows, augment, len(loader), device, ranks)
    if check_nan:
        check_every_layer(model, step)
    evaluator = Evaluator(model, augment, step.precision, device, recipe.eval.batch_size, step.execution.mode, ranks)
    # Takes up the newest checkpoint, so that all after it is the same for a new run and a resumed one.
    results = Results(recipe, run, model, step, evaluation_sets(recipe, store, rows, evaluator))
    done, epochs = results.progress.epochs_done, recipe.train.epochs
    if done or results.progress.partial:
        record_resumption(run, done)
    # Half an epoch's weights would be no epoch's result: one that has begun is finished.
    begun = done + bool(results.progress.partial)
    end = epochs if stop_after is None else min(max(stop_after, begun), epochs)
    clock = Clock(device, results.progress.clocks)
    label = f"seed {recipe.seed}" if together > 1 else None
    with Display(recipe.name, recipe.train.epochs, len(loader), recipe.train.batch_size, quiet, label=label) as display:
        display.say(introduction(recipe, device, ranks, loader))
        display.begin(done)
        with closing(loader), closing(told):
            told.begin(recipe)
            # Compiling is not training: the clock of the published comparison starts after it.
            warm_up(range(done, end), step, evaluator, loader, clock, display, store.image_shape)
            prepare_teachers(range(done, end), step, loader, display)
            with clock.paused():
                yield
            with closing(profiled(loader, profile, run)) as source:
                yield from train_epochs(range(done, end), source, step, clock, display, results, told)
            how = step.execution
            px, content = store.image_shape[0], store.manifest.content
            facts = (store.classes, px, content, rows.holdout)
            setting = RunSetting(loader.name, how.mode, how.fallback, *facts, together)
            return told.summary(results.finish(clock.seconds(), setting))


def make_step(
    recipe: Recipe, store: Store, rows: "Rows", augment: Augment | AugmentBySize, steps: int, device: torch.device,
    ranks: Ranks,
) -> tuple[nn.Module, Step]:
    """Return the model, fitted to the first images, and its training step; ``steps`` are those of an epoch."""
    mix = build_mix(recipe.mix, seed=recipe.seed, epochs=recipe.train.epochs, steps_per_epoch=steps)
    px, classes = store.image_shape[0], len(store.classes)
    model = build_model(recipe.model, num_classes=classes, image_px=px, seed=recipe.seed).to(device)
    if isinstance(recipe.model, UserModelConfig):
        for _, smaller in recipe.data.resize:
            user.check_logits(model, recipe.model.name, classes, smaller)
    teacher, proxy = build_teacher(recipe, store, device), build_proxy(recipe, classes, px, device)
    # Before the step: its averages begin as copies of the weights.
    fit_images((model, proxy), store, rows, augment, device)
    return model, build_step(recipe, model, augment, mix, steps, device, ranks, teacher, proxy)


def introduction(recipe: Recipe, device: torch.device, ranks: Ranks, loader: Loader) -> str:
    """Return a run's first line: what is trained, where, and from which loader for what reason."""
    where = f"{device}" if ranks.world == 1 else f"{ranks.world} ranks, the first on {device}"
    return f"{recipe.name}: seed {recipe.seed} on {where}, {loader.name} loader ({loader.reason})"


def eagerly(recipe: Recipe) -> Recipe:
    """Return the recipe executed operation by operation: compiled models and fused layers cannot be looked into."""
    changes = {"mode": "eager", "fused_batch_norm": False}
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=changes)})


def check_every_layer(model: nn.Module, step: Step) -> None:
    """End the run at the first layer that is not finite, and say in which step it was."""
    check_finite(
        model, lambda: f"epoch {int(step.cursor.epoch) + 1}, step {int(step.cursor.step) + 1}",
        lambda: f"the evaluation after epoch {int(step.cursor.epoch) + 1}",
    )  # fmt: skip


def open_data(
    recipe: Recipe, data: Path | None, device: torch.device, quiet: bool, ranks: Ranks,
    memory_bytes: int | None = None, begun: str | None = None,
) -> tuple[Store, "Rows", Loader, str]:
    """Return a recipe's store, the rows of it that take part, this rank's loader of them, and the order that it has.

    The two of a run that goes on are those that it began with: see `fastcifar.data.loaders.build_loader`.

    Raises:
        UserError: no such data, or it does not go with the recipe or the number of ranks; a missing package.
    """
    with ranks.one_per_host_first(), conversion_steps(quiet) as progress:
        store = resolve_store(recipe.data, data, progress=progress)
        rows = choose_rows(recipe.data, store, recipe.seed)
        check_data(recipe, store, rows, ranks.world)
    config, count = recipe.data.loader, len(rows.train)
    # What the first rank decides: another one's device may have less memory free, and streams what this one holds.
    order = begun or ranks.from_first(decide_order(config, store, count, device, recipe.augment, memory_bytes))
    with ranks.one_per_host_first(), conversion_steps(quiet) as progress:
        loader = build_loader(
            config, store, rows.train, seed=recipe.seed, batch_size=recipe.train.batch_size,
            drop_last=recipe.train.drop_last, device=device, augment=recipe.augment,
            rank=ranks.place.rank, world=ranks.world, progress=progress,
            memory_bytes=memory_bytes, begun=order,
        )
    if recipe.data.resize:
        if not isinstance(loader, ResidentLoader):
            raise UserError(f"data.resize needs the resident loader, but: {loader.reason}")
        loader = ResizedLoader(loader, loader.images, recipe.data.resize, recipe.train.epochs)
    return store, rows, loader, order


def with_order(recipe: Recipe, order: str) -> Recipe:
    """Return the recipe with the order of the samples that its loader has."""
    loader = recipe.data.loader.model_copy(update={"order": order})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"loader": loader})})


def record_order(run: RunDirectory | Follower, recipe: Recipe, order: str) -> None:
    """Keep what ``data.loader.order = "plan"`` has become with the run, which goes on with it wherever it is resumed.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    if recipe.data.loader.order == "plan" and not run.environment.get("epoch_order"):
        run.environment["epoch_order"] = order
        run.commit({"environment.json": as_json(run.environment)})


def make_augment(recipe: Recipe, image_shape: tuple[int, int, int], device: torch.device) -> Augment | AugmentBySize:
    """Compile a recipe's augmentations, for each size of images that it trains on and the data's own."""

    def make(height: int, width: int) -> Augment:
        return build_augment(
            recipe.augment, mean=recipe.data.mean, std=recipe.data.std, image_shape=(height, width, image_shape[2]),
            seed=recipe.seed, device=device, dtype=PRECISIONS[recipe.engine.precision].images,
        )

    own = make(*image_shape[:2])
    if not recipe.data.resize:
        return own
    return AugmentBySize({px: make(px, px) for _, px in recipe.data.resize} | {image_shape[0]: own})


def begin_callbacks(recipe: Recipe, run: RunDirectory | Follower, callbacks: Sequence[Callback]) -> Callbacks:
    """Return the recipe's trackers and these callbacks; of several ranks, only the first has any.

    It says which code of the user's own is not what the run began with; the run goes on with what there is now.

    Raises:
        UserError: that code cannot be found any more, a tracker's package is missing, or a distilling run's teacher has
            other weights than when it began.
    """
    if isinstance(run, Follower):
        return Callbacks(None, [])
    if run.environment.get("teacher") not in (None, teacher_digest(recipe)):
        assert recipe.distill is not None
        raise UserError(f"distill.teacher: {recipe.distill.teacher} has other weights now than when this run began")
    check_user_code(recipe)
    for change in changes(recipe, run.environment.get("user_code")):
        tell(change)
    return Callbacks(run, [*make_trackers(recipe.track), *callbacks])


def train_epochs(
    epochs: range, loader: Loader, step: Step, clock: Clock, display: Display, results: Results,
    callbacks: Callbacks | None = None,
) -> Generator[None, None, None]:
    """Train epoch after epoch, pausing after each step; a signal stops after the step at hand, with a checkpoint.

    Raises:
        UserError: see `train_epoch`.
        Interrupted: a signal came, at the last step too; what is left then is the run's end, without training.
    """
    with interrupt.deferred():
        for epoch in epochs:
            row = yield from train_epoch(epoch, loader, step, clock, display, results)
            stopping = step.ranks.settled()
            results.add(row, clock.seconds(), save=stopping)
            display.epoch(row)
            if callbacks is not None:
                callbacks.epoch(row)
            if stopping or step.ranks.world == 1:  # alone, a signal while the epoch was recorded counts too
                stop(step.ranks)


def train_epoch(
    epoch: int, loader: Loader, step: Step, clock: Clock, display: Display, results: Results
) -> Generator[None, None, dict[str, Any]]:
    """Train one epoch, or the rest of one that was interrupted, and return its row of metrics; pause after each step.

    Raises:
        UserError: the loss was not finite; the message names the step.
        Interrupted: a signal came; the checkpoint of the step is written.
    """
    lr = step.begin_epoch(epoch)
    start = results.begin_epoch(clock.seconds())
    done, before = start["steps"], start["before"]
    with clock.span("training_s"):
        for batch in batches_from(loader, epoch, done, step.ranks):
            step(batch)
            done += 1
            display.step(epoch + 1, done)
            with clock.paused():
                yield
        result = step.end_epoch()
    if result["nonfinite_step"] is not None and step.recipe.engine.on_nonfinite == "stop":
        raise UserError(diverged(f"the loss was not finite at step {result['nonfinite_step']} of epoch {epoch + 1}"))
    if done < len(loader):
        results.save_within_epoch({"steps": done, "before": before}, clock.seconds())
        stop(step.ranks)
    after = clock.seconds()
    training_s = after["training_s"] - before["training_s"]
    return {
        "epoch": epoch + 1, "lr": lr, "train_loss": result["loss"], "train_accuracy": result["accuracy"],
        "images": result["samples"], "training_s": training_s,
        "images_per_s": result["samples"] / max(training_s, 1e-9),
        "seconds": after["total_s"] - before["total_s"],
    }


@torch.no_grad()
def prepare_teachers(epochs: range, step: Step, loader: Loader, display: Display) -> None:
    """With ``distill.cache``, compute the teachers' logits of the epochs that are not kept yet, before training.

    Raises:
        UserError: the cache cannot be written.
    """
    teacher = step.teacher
    if teacher is None or teacher.logits is None:
        return
    numbers = sorted({teacher.logits.kept_as(epoch) for epoch in epochs})
    missing = [epoch for epoch in numbers if not teacher.logits.load(epoch)]
    if missing:
        told = f"computing the teachers' logits once, {len(missing)} of {len(epochs)} epochs"
        display.say(f"{told}: {teacher.logits.folder}")
    for epoch in missing:
        step.cursor.begin(epoch)
        for batch in loader.epoch(epoch):
            images, _ = step.inputs(batch)
            with step.precision.autocasting(images.device.type):
                logits = teacher.see(images)
            teacher.logits.put(batch.indices, logits)
            step.cursor.advance()
        teacher.logits.save(epoch)


def warm_up(
    epochs: range, step: Step, evaluator: Evaluator, loader: Loader, clock: Clock, display: Display,
    image_shape: tuple[int, ...],
) -> None:
    """Compile and capture every shape of training and evaluation before the training clock starts, if epochs are left.

    Nothing is trained. What cannot be done as the recipe asks for is said here, at once.

    Raises:
        UserError: out of memory, or, with ``engine.strict``, anything less than the recipe asks for.
    """
    if not epochs:
        return
    eager = step.execution.mode == "eager"
    if not eager:
        display.say(f"compiling ({step.execution.mode}); a second run of the same recipe finds it in the cache")
    with clock.span("compilation_s"):
        # An eager step has nothing to prepare for each shape: one batch loads and compiles the augmentation.
        firsts = first_epochs(epochs, step.recipe.train.epochs, step.recipe.data.resize or WHOLE)
        examples = chain.from_iterable(example_batches(loader, epoch) for epoch in firsts)
        step.execution.warm_up(islice(examples, 1 if eager else None))
        if not eager:
            evaluator.warm_up(image_shape, {"none", step.recipe.eval.tta})
    if evaluator.fallback and is_strict(step.recipe.engine):
        raise UserError(f"{evaluator.fallback} (engine.strict)")
    for fallback in filter(None, (step.execution.fallback, evaluator.fallback)):
        display.say(fallback)


def example_batches(loader: Loader, epoch: int) -> Iterator[Batch]:
    """Yield a batch of each size that an epoch has: a full one, and the smaller last one where there is one."""
    batch = next(iter(loader.epoch(epoch)))
    yield batch
    rest, share = loader.samples - (len(loader) - 1) * len(batch.rows), loader.share(len(loader) - 1)
    # The place in the global batch is part of what is compiled and captured, beside the shape.
    if (rest, share) != (len(batch.rows), batch.share):
        yield batch.first(rest, share)


def batches_from(loader: Loader, epoch: int, done: int, ranks: Ranks) -> Iterator[Batch]:
    """Yield the batches of an epoch after the first ``done``, until a signal asks to stop; on all ranks at once."""
    try:
        for batch in islice(loader.epoch(epoch), done, None):
            yield batch
            if ranks.stopping():
                return
    except Exception:
        # A signal to the whole process group ends worker processes too; the steps done so far are good. One rank of
        # several cannot stop by itself.
        if interrupt.requested() is None or ranks.world > 1:
            raise


def stop(ranks: Ranks) -> None:
    """End the run where a signal asked for it, when the first rank has written the checkpoint.

    Raises:
        Interrupted: on all ranks.
    """
    ranks.wait_for_all()
    interrupt.stop_if_requested()


@dataclass(frozen=True)
class Rows:
    """Which rows of the stored splits a run uses: int64 (n,) each; train and holdout are rows of the training split."""

    train: np.ndarray
    holdout: np.ndarray
    test: np.ndarray


def choose_rows(config: DataConfig, store: Store, seed: int) -> Rows:
    """Return the rows to train, select and test on: first the subset of each split, then the holdout out of it."""
    labels = store.labels("train")
    # The subset first: a holdout is a part of what the run may see.
    train = subset_rows(labels, config.subset)
    test = subset_rows(store.labels("test"), config.test_subset, "data.test_subset")
    holdout = train[:0]
    if config.holdout:
        holdout_seed = seed if config.holdout_seed is None else config.holdout_seed
        kept, held = holdout_split(labels[train], config.holdout, holdout_seed)
        train, holdout = train[kept], train[held]
    return Rows(train, holdout, test)


def fit_images(
    models: Iterable[nn.Module | None], store: Store, rows: Rows, augment: Augment | AugmentBySize,
    device: torch.device,
) -> None:
    """Hand the first training images to models that want them; before the step copies weights for its averages."""
    for model in filter(None, models):
        if wanted := hooks.images_to_fit(model):
            images = torch.from_numpy(np.asarray(store.split("train").images[rows.train[:wanted]]))
            hooks.fit_images(model, augment.plain(images.to(device)).float())


def evaluation_sets(recipe: Recipe, store: Store, rows: Rows, evaluator: Evaluator) -> dict[str, EvaluationSet]:
    """Return what to evaluate on, by name: test, holdout if there is one, train if its logits are wanted.

    Raises:
        UserError: the files of a split are damaged. They are hashed here, where they are read.
    """
    wanted = {"test": ("test", rows.test), "holdout": ("train", rows.holdout)}
    if recipe.eval.train_logits:
        wanted["train"] = ("train", rows.train)
    sets = {}
    for name, (split_name, chosen) in wanted.items():
        if len(chosen):
            store.check_split(split_name)
            split, device = store.split(split_name), evaluator.device
            images: Images | Tensor = choose(split.images, chosen)
            if device.type != "cpu" and images.nbytes <= RESIDENT_BYTES:
                images = resident_images(store, split_name, chosen, device)
            sets[name] = EvaluationSet(images, split.labels[chosen], evaluator)
    return sets
