"""Published training logs, followed epoch by epoch: our step, from a log's first weights, on the same batches.

``python benchmarks/replay.py NAME [--epochs N] [--data PATH]`` prints what the log says beside what our step gives: an
end-to-end check of loss, optimizer, weight decay, schedule, normalization and evaluation against numbers of others.
``--other`` takes another order of the images, for comparison.

The code that wrote the logs (github.com/windopper/cifar) seeds torch once. All that it draws then can be drawn again:
two seeds for a batch that it looks at, the weights of every net that it knows, of which it trains one, and for each
epoch two seeds by the training loader and one by the test loader. What remains is rounding, which differs from its
GPU's, and which thousands of steps magnify.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from common import device
from fastcifar.augment.augment import build_augment
from fastcifar.config import load_recipe
from fastcifar.config.schema import Recipe
from fastcifar.data.batch import Batch
from fastcifar.data.store import resolve_store
from fastcifar.errors import UserError
from fastcifar.models.deep_baseline import DeepBaseline
from fastcifar.models.lenet import LeNet5
from fastcifar.train.evaluate import EvaluationSet, Evaluator
from fastcifar.train.precision import PRECISIONS
from fastcifar.train.step import build_step
from published import seed_as_published

SEED = 42

DRAWS = {
    "LeNet-5": 62_006, "deep baseline": 2_799_178, "deep, SiLU": 5_596_842, "deep, BatchNorm": 2_799_178,
    "deep, average pooling": 538_570, "deep, dropout": 2_799_178, "deep, dropout, residual": 3_486_698,
    "deep, squeeze and excitation": 2_818_570, "ResNet-18": 22_328_714, "VGG-16": 14_719_818,
    "MobileNetV2": 2_261_834, "DenseNet-121": 6_872_778,
}  # fmt: skip
"""How often the nets of commit 2f68b9d draw from torch's generator: once for each weight and bias of a convolution or
linear layer, and once more for each weight that is then initialized in another way."""

LATER_DRAWS = {
    "deep 2, BatchNorm": 6_501_386, "deep 2, residual": 10_432_330, "deep 2, pre-activation": 10_432_330,
    "deep 3, BatchNorm": 1_920_586,
}  # fmt: skip
"""Those of the nets that came after it. Commit b50a5ec, which brought the log of the deep baseline, has a ResNeXt
(5,654,858), too. With it, or without the last of these, the log's first epoch is further off than without it alone."""


@dataclass(frozen=True)
class Log:
    """A published log and how it came about.

    Attributes:
        path: in the repository of the code that wrote it.
        build: makes the net, drawing its weights.
        recipe: the shipped recipe that it is nearest to, and
        changes: what it does otherwise.
        draws_after: how often torch's generator is drawn from between the net's weights and the first epoch.
        train_loss: in nats, mean over the batches of each epoch.
        test_loss: in nats, after each epoch.
        test_accuracy: in percent.
    """

    path: str
    build: Callable[[], nn.Module]
    recipe: str
    changes: tuple[str, ...]
    draws_after: int
    train_loss: tuple[float, ...]
    test_loss: tuple[float, ...]
    test_accuracy: tuple[float, ...]


def deep_baseline() -> nn.Module:
    """Return the deep baseline, made after a LeNet-5."""
    LeNet5()
    return DeepBaseline()


LOGS = {
    "lenet5": Log(
        "outputs/baseline_adam_crossentropy_bs16_ep100_lr0.0003_mom0.9_schcosineannealinglr_tmax100_history.json",
        LeNet5,
        "lenet5",
        ("train.batch_size=16", "train.epochs=100", "schedule={name='cosine', per='epoch', final=0.0}"),
        sum(DRAWS.values()) - DRAWS["LeNet-5"],
        (1.6945, 1.4253, 1.3233, 1.2476, 1.1873, 1.1311, 1.0813, 1.0437, 1.0053, 0.9734,
         0.9441, 0.9138, 0.8879, 0.8652, 0.8389, 0.8190, 0.7962, 0.7777, 0.7587, 0.7394),
        (1.4948, 1.3762, 1.2952, 1.2639, 1.1953, 1.1726, 1.1482, 1.1300, 1.0766, 1.0944,
         1.0868, 1.0679, 1.0435, 1.0724, 1.0118, 1.0428, 1.0430, 1.0310, 1.0600, 1.0428),
        (46.05, 50.72, 53.77, 54.39, 57.28, 58.29, 58.80, 59.65, 61.47, 61.63,
         61.24, 62.68, 63.13, 62.48, 64.50, 63.83, 64.10, 64.57, 63.29, 64.47),
    ),
    "deep": Log(
        "outputs/deep_baseline_adam_crossentropy_bs256_ep20_lr0.0003_mom0.9_history.json",
        deep_baseline,
        "deep",
        ("train.batch_size=256",),
        sum(DRAWS.values()) + sum(LATER_DRAWS.values()) - DRAWS["LeNet-5"] - DRAWS["deep baseline"],
        (1.8633, 1.5022, 1.3515, 1.2240, 1.1192, 1.0119, 0.9355, 0.8356, 0.7651, 0.6876,
         0.6124, 0.5321, 0.4663, 0.3883, 0.3144, 0.2423, 0.1974, 0.1532, 0.1180, 0.1077),
        (1.5854, 1.4241, 1.3128, 1.1951, 1.0844, 1.0615, 0.9703, 0.9709, 0.9038, 0.8557,
         0.8781, 0.8217, 0.8398, 0.8968, 0.9000, 0.9798, 1.1167, 1.1753, 1.3643, 1.3137),
        (40.99, 46.79, 52.07, 56.75, 60.85, 62.58, 65.63, 66.59, 68.34, 70.06,
         70.54, 71.75, 72.66, 71.93, 72.72, 72.26, 71.77, 71.65, 71.13, 72.90),
    ),
}  # fmt: skip


def seed_of_loader(generator: torch.Generator) -> int:
    """Draw a seed as a DataLoader does."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator))


def orders(images: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield each epoch's order of the images, int64 (images,), as two DataLoaders that draw from one generator give it.

    The one shuffles the training images, the other goes through the test images once an epoch.
    """
    while True:
        seed_of_loader(generator)  # the workers'
        shuffling = torch.Generator().manual_seed(seed_of_loader(generator))
        yield torch.randperm(images, generator=shuffling)
        seed_of_loader(generator)  # the workers' of the test loader


def recipe_of(log: Log, precision: str = "fp32") -> Recipe:
    """Return the recipe that a log's settings make."""
    engine = [f"engine.precision={precision}", "engine.mode=eager"]
    recipe = load_recipe(log.recipe, [*log.changes, f"seed={SEED}", *engine])
    assert isinstance(recipe, Recipe)
    return recipe


def beginning(log: Log, other: int = 0) -> tuple[nn.Module, torch.Generator]:
    """Return the net with the log's first weights, channels-last, and the generator as it is before the first epoch.

    The generator is a copy: our step seeds torch's own one.

    Args:
        log: says which net, and how much is drawn for others.
        other: that much more is drawn: another order of the images, from the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        seed_as_published(SEED)
        # Channels-last afterwards: what is drawn fills a tensor in the order in which it lies in memory.
        model = log.build().to(memory_format=torch.channels_last)
        torch.empty(log.draws_after + other).uniform_()
        return model, torch.Generator().set_state(torch.get_rng_state())


def replay(
    log: Log, epochs: int, *, other: int = 0, precision: str = "fp32", data: Path | None = None
) -> Iterator[tuple[float, float, float]]:
    """Train and yield the training loss, test loss (nats) and test accuracy (percent) of each epoch.

    Args:
        log: to follow.
        epochs: how many.
        other: see `beginning`.
        precision: the logs are of fp32.
        data: where CIFAR-10 is, if not where it is usually found.

    Raises:
        UserError: CIFAR-10 is not there, or damaged.
    """
    recipe, on = recipe_of(log, precision), device()
    store = resolve_store(recipe.data, data, need=("raw",))
    for split in ("train", "test"):
        store.check_split(split)
    train, test = store.split("train"), store.split("test")
    images = torch.from_numpy(np.array(train.images)).to(on)
    labels = torch.from_numpy(np.asarray(train.labels, dtype=np.int64)).to(on)
    model, generator = beginning(log, other)
    formats = PRECISIONS[recipe.engine.precision]
    augment = build_augment(
        recipe.augment, mean=recipe.data.mean, std=recipe.data.std, image_shape=store.image_shape, seed=SEED,
        device=on, dtype=formats.images,
    )  # fmt: skip
    size = recipe.train.batch_size
    step = build_step(recipe, model, augment, None, steps_per_epoch=math.ceil(len(labels) / size), device=on)
    evaluator = Evaluator(model, augment, formats, on, recipe.eval.batch_size, "eager")
    test_set = EvaluationSet(torch.from_numpy(np.array(test.images)).to(on), test.labels, evaluator)
    for epoch, order in zip(range(epochs), orders(len(labels), generator), strict=False):
        step.begin_epoch(epoch)
        for rows in order.to(on).split(size):
            step(Batch(images, rows, labels[rows], rows))
        loss, after = step.step_losses().mean().item(), test_set.metrics()
        step.end_epoch()
        yield loss, after.loss, after.accuracy


def main() -> None:
    """Parse the command line, train, and print a line for each epoch as it ends."""
    parser = argparse.ArgumentParser(prog="benchmarks/replay.py", description=__doc__.partition("\n")[0])
    parser.add_argument("log", choices=LOGS)
    parser.add_argument("--epochs", type=int, default=20, help="at most so many (default 20)")
    parser.add_argument("--other", type=int, default=0, metavar="N", help="draw N more numbers: another order")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="the logs are of fp32 (default)")
    parser.add_argument("--data", type=Path, help="where CIFAR-10 is, instead of FASTCIFAR_DATA or ./data")
    arguments = parser.parse_args()
    if arguments.epochs < 1 or arguments.other < 0:
        parser.error("--epochs begins at 1, --other at 0")
    log, console = LOGS[arguments.log], Console(highlight=False)
    console.print(log.path, soft_wrap=True)
    console.print("epoch, training loss, test loss, test accuracy in %: as published, then ours", soft_wrap=True)
    published = zip(log.train_loss, log.test_loss, log.test_accuracy, strict=True)
    try:
        ours = replay(
            log, min(arguments.epochs, len(log.train_loss)), other=arguments.other, precision=arguments.precision,
            data=arguments.data,
        )  # fmt: skip
        for epoch, (theirs, found) in enumerate(zip(published, ours, strict=False), 1):
            pairs = [f"{a:.{n}f}  {b:.{n}f}" for a, b, n in zip(theirs, found, (4, 4, 2), strict=True)]
            console.print(f"{epoch:3}  " + "  |  ".join(pairs))
    except UserError as error:
        print(f"fastcifar: replay: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
