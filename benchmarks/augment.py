"""Augmented and normalized images per second, against a DataLoader with PIL transforms, torchvision v2 and DALI.

The DataLoader is our reimplementation (``published.py``) of the one in github.com/windopper/cifar, commit 70ec89d.

"standard" is crop(4), flip, rotate(15); "autoaugment" is crop(4), flip and the CIFAR-10 policy. Ours gives bf16, as
training uses it. torchvision v2 draws one decision for the whole batch and DALI's policy has other magnitudes, so
both do something else than that pipeline; only ours and the DataLoader draw for each image alike.

Without DALI, which is optional, its side is left out. Without CIFAR-10 (``FASTCIFAR_DATA`` or ``./data``) the synthetic
images are used.
"""

import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from common import THEIR_LOADER, Row, alternate, device, main, result, timed
from published import ImageSet, transform

BATCH_SIZE = 128
OPS = {"standard": ["crop(4)", "flip", "rotate(15)"], "autoaugment": ["crop(4)", "flip", "autoaugment"]}
Side = Callable[[], float]


def run(quick: bool) -> list[Row]:
    images, labels = training_images()
    rows = []
    for kind in OPS:
        sides = sides_of(kind, images, labels, 256 if quick else 8192)
        values = alternate(sides, 2 if quick else 5)
        ours = values[f"{kind}: fastcifar"]
        rows += [result(name, of, "images/s") for name, of in values.items() if of is not ours]
        for name, of in values.items():
            if of is not ours:
                rows.append(result(f"{kind}: fastcifar", ours, "images/s", name, of))
    return rows


def training_images() -> tuple[Any, Any]:
    import numpy as np

    from fastcifar.config.schema import DataConfig
    from fastcifar.data.store import resolve_store
    from fastcifar.errors import UserError

    try:
        store = resolve_store(DataConfig(source="cifar10"))
    except UserError:
        store = resolve_store(DataConfig(source="synthetic"))
    split = store.split("train")
    return np.array(split.images[:20_000]), np.array(split.labels[:20_000])


def sides_of(kind: str, images: Any, labels: Any, slow_count: int) -> dict[str, Side]:
    """Return what is compared; the slow sides see ``slow_count`` images a round, ours all of them."""
    sides = {f"{kind}: fastcifar": fastcifar(kind, images)}
    for workers in (4, 2):
        name = f"{kind}: {THEIR_LOADER}, {workers} workers"
        sides[name] = data_loader(kind, images[:slow_count], labels[:slow_count], workers)
    sides[f"{kind}: torchvision v2 on batches"] = torchvision_v2(kind, images[:slow_count])
    if kind == "autoaugment" and has_dali():
        sides[f"{kind}: DALI auto_augment"] = dali(images[:slow_count])
    return sides


def has_dali() -> bool:
    """Say whether DALI, an optional package, is here; ``nvidia`` alone is the folder of torch's CUDA packages."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def rate(count: int, work: Callable[[], Any]) -> Side:
    return lambda: count / timed(work, device())


def fastcifar(kind: str, images: Any) -> Side:
    """Our kernel on batches of a resident set, a new epoch each round."""
    from fastcifar.augment.augment import build_augment
    from fastcifar.config.schema import AugmentConfig
    from fastcifar.data.batch import Batch

    where = device()
    augment = build_augment(
        AugmentConfig(ops=OPS[kind]), mean=[0.5] * 3, std=[0.5] * 3, image_shape=images.shape[1:], seed=0,
        device=where, dtype=torch.bfloat16,
    )  # fmt: skip
    store = torch.from_numpy(images).to(where)
    batches = [Batch(store, rows, rows, rows) for rows in torch.randperm(len(images)).to(where).split(BATCH_SIZE)]
    epoch = torch.zeros(1, dtype=torch.int64, device=where)

    def work() -> None:
        epoch.add_(1)
        for batch in batches:
            augment(batch, epoch)

    return rate(len(images), work)


def data_loader(kind: str, images: Any, labels: Any, workers: int) -> Side:
    """The published ladder's pipeline, reimplemented: PIL transforms in worker processes, which stay between rounds."""
    settings = {"batch_size": BATCH_SIZE, "shuffle": True, "num_workers": workers, "persistent_workers": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores, as published
        loader = torch.utils.data.DataLoader(ImageSet(images, labels, transform(kind)), **settings)

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in loader:
                pass

    return rate(len(images), work)


def torchvision_v2(kind: str, images: Any) -> Side:
    """Torchvision's v2 transforms on uint8 batches: one decision for all images of a batch."""
    from torchvision.transforms import v2

    own = [v2.RandomRotation(15)] if kind == "standard" else [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)]
    scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    steps = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *own, *scale])
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device()).split(BATCH_SIZE)

    def work() -> None:
        for batch in batches:
            steps(batch).bfloat16()

    return rate(len(images), work)


def dali(images: Any) -> Side:
    """DALI's automatic augmentation with its policy for small images, to normalized batches."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import auto_augment

    on_gpu = torch.cuda.is_available()
    batches = [list(images[i : i + BATCH_SIZE]) for i in range(0, len(images) - BATCH_SIZE + 1, BATCH_SIZE)]

    def endless() -> Iterator[list[Any]]:
        while True:
            yield from batches

    @pipeline_def(
        batch_size=BATCH_SIZE, num_threads=2, device_id=0 if on_gpu else None, seed=0, enable_conditionals=True
    )
    def pipeline() -> Any:
        pixels = fn.external_source(source=endless(), batch=True, layout="HWC")
        offset = fn.random.uniform(values=list(range(-4, 5)), shape=2, dtype=types.INT32)
        pixels = fn.slice(
            pixels.gpu() if on_gpu else pixels, start=offset, shape=[32, 32], axes=[0, 1], out_of_bounds_policy="pad"
        )
        pixels = auto_augment.auto_augment(pixels, policy_name="reduced_cifar10", shape=(32, 32), fill_value=0)
        mirror = fn.random.coin_flip()
        settings = {"mean": [127.5] * 3, "std": [127.5] * 3, "output_layout": "HWC", "dtype": types.FLOAT16}
        return fn.crop_mirror_normalize(pixels, mirror=mirror, **settings)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls operators of its own that it has deprecated
        pipe = pipeline()
        pipe.build()

    def work() -> None:
        for _ in batches:
            pipe.run()

    return rate(len(batches) * BATCH_SIZE, work)


if __name__ == "__main__":
    main("augment", run)
