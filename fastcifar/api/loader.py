"""Batches of CIFAR-10, or of any set that fastcifar reads, for somebody else's training loop."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from fastcifar.augment.augment import build_augment
from fastcifar.augment.standalone import HALF, check_arguments, find_device, read_ops
from fastcifar.config.schema import DataConfig, LoaderConfig
from fastcifar.data.batch import Batch
from fastcifar.data.loaders import build_loader
from fastcifar.data.pixels import as_tensor, choose
from fastcifar.data.split import subset_rows
from fastcifar.data.store import Store, resolve_store
from fastcifar.errors import UserError

SPLITS = ("train", "test")


class Loader:
    """Yields (images, labels): normalized (B, 3, H, W), channels-last, and int64 (B,), on the device.

    Training images come in a new order and with new augmentations each time the loader is iterated over; test images in
    their own order, normalized only. An epoch is a function of (seed, epoch) alone: the same on every backend, device
    and number of workers, but for ``order="native"``, whose order is another one.

    Example:
        >>> train = fastcifar.Loader("cifar10", augment=["crop(4)", "flip", "autoaugment"], batch_size=512)
        >>> test = fastcifar.Loader("cifar10", split="test", batch_size=1000)
        >>> for images, labels in train:
        ...     loss = cross_entropy(model(images), labels)

    Args:
        source: ``cifar10``, ``cifar100``, ``folder``, or ``synthetic`` (made here, no download).
        split: ``train`` or ``test``.
        data: where the images are; by default FASTCIFAR_DATA, then ``./data``.
        batch_size: samples a batch.
        augment: operations as a recipe writes them, in order; for training images.
        where: ``device``, or ``loader`` for PIL transforms in the workers of the torchvision backend.
        backend: ``auto``, ``resident``, ``ffcv``, ``dali`` or ``torchvision``.
        workers: processes or threads of a backend that streams.
        order: of the training images: ``random``, ``block`` (quasi-random: reads a disk in long runs), ``plan`` (one of
            the two, by the memory that there is), or ``native`` (DALI's own shuffle, with ``backend="dali"``).
        device: ``auto`` takes a GPU where there is one.
        dtype: of the images: float32, bfloat16 or float16.
        mean: per channel, of pixels in 0..1.
        std: per channel, above 0.
        seed: of the order and the augmentations, 0..2**63-1.
        drop_last: leave out the last batch of an epoch where it is smaller; for training images.
        subset: keep only so many images, each class in proportion; 0 keeps all.

    Attributes:
        epoch: which epoch the next iteration is, from 0; it counts up by itself and may be set, to resume.
        classes: names by label.
        samples: how many an epoch has.
        backend: which one is used, with the reason.

    Raises:
        UserError: there is no such data, operation or backend.
    """

    def __init__(
        self,
        source: str = "cifar10",
        *,
        split: str = "train",
        data: str | Path | None = None,
        batch_size: int = 128,
        augment: Sequence[str] = (),
        where: str = "device",
        backend: str = "auto",
        workers: int = 2,
        order: str = "plan",
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        seed: int = 42,
        drop_last: bool = False,
        subset: int = 0,
    ) -> None:
        check_arguments(dtype, mean=mean, std=std, seed=seed, batch_size=batch_size)
        if split not in SPLITS:
            raise UserError(f'split: "{split}"; allowed: {", ".join(SPLITS)}')
        if drop_last and split == "test":
            raise UserError("drop_last: a test set is read whole; leave drop_last away")
        loader = {"name": backend, "workers": workers, "order": order}
        config = _read({"source": source, "subset": subset, "loader": loader})
        if order == "native" and (backend != "dali" or where == "loader"):
            raise UserError('order: "native" is DALI\'s own order: it needs backend="dali" and where="device"')
        store = resolve_store(config, None if data is None else Path(data))
        where_to, ops = find_device(device), read_ops(augment, where)
        rows = subset_rows(store.labels(split), subset)
        self.epoch, self.classes = 0, list(store.classes)
        self._augment = build_augment(
            ops, mean=mean, std=std, image_shape=store.image_shape, seed=seed, device=where_to, dtype=dtype
        )
        if split == "test":
            self._loader: Any = _InOrder(store, rows, batch_size, where_to)
        else:
            self._loader = build_loader(
                config.loader, store, rows, seed=seed, batch_size=batch_size, drop_last=drop_last, device=where_to,
                augment=ops,
            )  # fmt: skip
        self._plain = split == "test"
        self.samples, self.backend = self._loader.samples, f"{self._loader.name}: {self._loader.reason}"

    def __len__(self) -> int:
        """Return how many batches an epoch has."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the epoch `epoch`, which counts up at once."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._loader.epoch(epoch):
            images = self._augment.plain(batch.images) if self._plain else self._augment(batch, epoch)
            yield images, batch.labels

    def close(self) -> None:
        """Let go of images, workers and files."""
        self._loader.close()


class _InOrder:
    """The rows of the test split, batch after batch; each is read and sent to the device when it is its turn."""

    name, reason = "resident", "a test set is read once"

    def __init__(self, store: Store, rows: np.ndarray, batch_size: int, device: torch.device) -> None:
        split = store.split("test")
        self._images, self._labels = choose(split.images, rows), torch.from_numpy(split.labels[rows]).to(device)
        self.samples, self._size, self._device = len(rows), batch_size, device

    def __len__(self) -> int:
        return -(-self.samples // self._size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for first in range(0, len(self._images), self._size):
            images = as_tensor(self._images[first : first + self._size]).to(self._device)
            rows = torch.arange(len(images), device=images.device)
            yield Batch(images, rows, self._labels[first : first + self._size], rows)

    def close(self) -> None:
        self._images = self._images[:0]
        self._labels = self._labels[:0]


def _read(table: dict[str, Any]) -> DataConfig:
    """Return the ``data`` table of these values.

    Raises:
        UserError: one of them is wrong.
    """
    try:
        return DataConfig.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = {"name": "backend"}.get(str(first["loc"][-1]), str(first["loc"][-1]))
        field = {"backend": "name", "order": "order"}.get(key)
        names = get_args(LoaderConfig.model_fields[field].annotation) if field else ()
        more = f"; allowed: {', '.join(names)}" if names else ""
        raise UserError(f"{key}: {first['input']!r}: {first['msg']}{more}") from None
