"""Our reimplementation of the training loop behind the published ladder, written plainly, to compare fastcifar with.

The ladder is the article "CIFAR-10 분류 모델 97.78% 달성하기"; its code is github.com/windopper/cifar, commit 70ec89d.
Nothing is copied from there: this does what that code is known to do. fp32, no compilation, a DataLoader whose workers
run PIL transforms, ASAM and the moving average tensor by tensor. Its speed is this file's, measured here; it is not a
measurement of that code.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from fastcifar.models.deep_baseline import DeepBaseline
from fastcifar.models.lenet import LeNet5


class ImageSet(Dataset):
    """Images in memory, each transformed as PIL when it is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def transform(augment: str) -> Callable:
    """Return the published ladder's transform.

    Args:
        augment: "none", "standard" (crop, flip, rotation) or "autoaugment" (crop, flip, AutoAugment).
    """
    steps: list[Callable] = []
    if augment != "none":
        steps += [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()]
    if augment == "standard":
        steps.append(T.RandomRotation(15))
    if augment == "autoaugment":
        steps.append(T.AutoAugment(T.AutoAugmentPolicy.CIFAR10))
    return T.Compose([*steps, T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])


def lenet5(num_classes: int = 10, weights_seed: int = 42) -> nn.Module:
    """Return LeNet-5 with the initial weights that the published code gives it.

    Before it makes its nets, that code takes a batch from its loader, which draws two seeds. The nets that it makes
    after the one that it trains move its random generator on: the order of its images is not repeated here, but in
    ``replay.py``. To train from these weights: ``fastcifar run lenet5 --set model.name=benchmarks.published:lenet5``.

    Args:
        num_classes: number of logits.
        weights_seed: what the published code is seeded with, 42 for all that is published. The seed of the run, which
            orders the images, is another one.
    """
    with torch.random.fork_rng(devices=[]):
        seed_as_published(weights_seed)
        return LeNet5(num_classes)


def deep_baseline(num_classes: int = 10, weights_seed: int = 42, narrow_before: bool = True) -> nn.Module:
    """Return the deep baseline with the initial weights that the published code gives it.

    To train from these weights: ``fastcifar run deep --set model.name=benchmarks.published:deep_baseline``.

    Args:
        num_classes: number of logits.
        weights_seed: as for `lenet5`.
        narrow_before: before this net that code makes a LeNet-5 and, as of commit 7e81e91, whose README has the
            published accuracies, a net of half its widths with BatchNorm. That which wrote the log with batches of 256
            made the LeNet-5 alone.
    """
    with torch.random.fork_rng(devices=[]):
        seed_as_published(weights_seed)
        LeNet5(num_classes)
        if narrow_before:  # for its draws alone
            for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 64), (64, 128)):
                nn.Conv2d(inputs, outputs, 3, padding=1)
            for inputs, outputs in ((2048, 256), (256, 128), (128, 64), (64, num_classes)):
                nn.Linear(inputs, outputs)
        return DeepBaseline(num_classes)


def seed_as_published(seed: int) -> None:
    """Leave torch's generator as a loader leaves it that was asked for its first batch just after the seeding."""
    torch.default_generator.manual_seed(seed)
    for _ in ("the loader's workers", "the shuffling"):
        torch.empty((), dtype=torch.int64).random_()


class Asam:
    """ASAM tensor by tensor: e = rho w^2 g / (|| |w| g || + 1e-12), one norm over all tensors."""

    def __init__(self, model: nn.Module, rho: float) -> None:
        self.model, self.rho, self.steps = model, rho, {}

    @torch.no_grad()
    def ascend(self) -> None:
        """Go to w + e and clear the gradient."""
        norms = [(p.abs() * p.grad).norm(p=2) for p in self.model.parameters()]
        norm = torch.norm(torch.stack(norms), p=2) + 1e-12
        for p in self.model.parameters():
            e = p.pow(2) * p.grad * (self.rho / norm)
            p.add_(e)
            self.steps[p] = e
        self.model.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to w."""
        for p in self.model.parameters():
            p.sub_(self.steps[p])


class Ema:
    """The moving average of every floating-point entry of the state dict."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.average = model, decay, copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average."""
        state = self.model.state_dict()
        for name, average in self.average.state_dict().items():
            if average.dtype.is_floating_point:
                average.mul_(self.decay).add_(state[name], alpha=1 - self.decay)


def torch_defaults() -> Any:
    """Return a context with cuDNN's switches as torch has them, which that code leaves alone: tf32, nothing timed.

    Our precisions set them for the whole process; without this the other side would convolve in slower fp32.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True)


class PublishedLoop:
    """Trains for a number of steps at a time; the loader goes on where it stopped."""

    def __init__(
        self, model: nn.Module, images: np.ndarray, labels: np.ndarray, *, device: torch.device, augment: str,
        optimizer: str, lr: float, rho: float = 0.0, decay: float = 0.0, smoothing: float = 0.0, batch_size: int = 128,
        workers: int = 4,
    ) -> None:  # fmt: skip
        self.model, self.device, self.smoothing = model.to(device).train(), device, smoothing
        if optimizer == "sgd":
            settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr, **settings)
        else:
            self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=5e-4)
        self.asam, self.ema = Asam(model, rho) if rho else None, Ema(model, decay) if decay else None
        data = ImageSet(images, labels, transform(augment))
        self.loader = DataLoader(data, batch_size, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda")
        self._batches = self._forever()

    def _forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    @property
    def ahead(self) -> int:
        """How many batches the loader's workers make ready, at most, before they are asked for."""
        return self.loader.num_workers * (self.loader.prefetch_factor or 0)

    def close(self) -> None:
        """Stop the loader's workers."""
        self._batches.close()

    def steps(self, count: int) -> float:
        """Take ``count`` steps and return their mean loss."""
        total = 0.0
        with torch_defaults():
            for _ in range(count):
                images, labels = (t.to(self.device, non_blocking=True) for t in next(self._batches))
                total += self.step(images, labels)
        return total / count

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Take one step; reading the loss waits for the device, as in the code of the published ladder."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.smoothing)
        loss.backward()
        if self.asam is not None:
            self.asam.ascend()
            F.cross_entropy(self.model(images), labels, label_smoothing=self.smoothing).backward()
            self.asam.restore()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return loss.item()
