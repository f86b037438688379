"""A trained run on other images than its own test set: another data set, an image folder, corrupted images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcifar.analysis.calibration import calibration_error, reliability
from fastcifar.analysis.content import data_config
from fastcifar.analysis.corruptions import corrupted
from fastcifar.analysis.ensemble import softmax
from fastcifar.analysis.predict import Trained, logits_of, read_image
from fastcifar.analysis.statistics import accuracy, negative_log_likelihood, wilson_interval
from fastcifar.data.images import SUFFIXES
from fastcifar.data.pixels import Images, choose
from fastcifar.data.sources import readable
from fastcifar.data.split import subset_rows
from fastcifar.data.store import Store, is_store, open_store, resolve_store
from fastcifar.errors import UserError, nearest
from fastcifar.run_directory import RunDirectory
from fastcifar.train.precision import PRECISIONS

SPLITS = ("test", "train")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class LabelledImages:
    """Images to evaluate on.

    Attributes:
        name: what they are, for the table.
        images: uint8 (N, S, S, C) of the model's size, in memory or in a store.
        labels: int64 (N,), positions in the model's classes.
    """

    name: str
    images: Images
    labels: np.ndarray


def read_labelled(
    run: RunDirectory, trained: Trained, data: Path | None, split: str = "test", limit: int = 0
) -> LabelledImages:
    """Find images and give them the model's labels, by the names of their classes.

    Args:
        run: the trained run.
        trained: its model.
        data: a store, a release, ``train/<class>/*`` with ``test/<class>/*``, or ``<class>/*`` alone; None for the
            kind that the run's recipe names, where ``FASTCIFAR_DATA`` or ``./data`` has it.
        split: ``test`` or ``train`` where there are both.
        limit: take so many images, each class in proportion; 0 for all.

    Raises:
        UserError: no images there, a class that the model does not have, or another size than the model's.
    """
    if data is not None and _is_of_classes(data, trained.classes):
        found = _from_class_folders(data, trained)
    else:
        found = _from_store(_store(run, data), trained, split)
    if not limit:
        return found
    rows = subset_rows(found.labels, limit, "--limit")
    return LabelledImages(found.name, choose(found.images, rows), found.labels[rows])


def _store(run: RunDirectory, data: Path | None) -> Store:
    if data is not None and is_store(data):
        return open_store(data)
    config = data_config(run)
    if data is not None and (data / "train").is_dir():
        config = config.model_copy(update={"source": "folder"})
    return resolve_store(config, data)


def _is_of_classes(place: Path, classes: Sequence[str]) -> bool:
    """Return whether a place holds folders of classes, not of splits; CIFAR-100 has a class named ``train``."""
    with readable(place, "--data"):
        return place.is_dir() and not is_store(place) and _has_class_folders(place, classes)


def _has_class_folders(folder: Path, classes: Sequence[str]) -> bool:
    splits = all((folder / split).is_dir() for split in SPLITS)
    return not splits and bool(_class_folders(folder, classes))


def _class_folders(folder: Path, classes: Sequence[str]) -> list[Path]:
    """Return the folders that are named as classes of the model."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name in classes)


def _from_class_folders(folder: Path, trained: Trained) -> LabelledImages:
    unknown = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    _refuse_unknown([name for name in unknown if name not in trained.classes], folder, trained)
    files = [
        (path, trained.classes.index(part.name))
        for part in _class_folders(folder, trained.classes)
        for path in sorted(part.iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise UserError(f"{folder}: no images in its class folders ({', '.join(SUFFIXES)})")
    # Not turned as their EXIF data say, as training on such folders does not turn them.
    images = np.stack([read_image(path, trained.image_px, upright=False) for path, _ in files])
    return LabelledImages(str(folder), images, np.array([label for _, label in files], np.int64))


def _from_store(store: Store, trained: Trained, split: str) -> LabelledImages:
    if split not in SPLITS:
        raise UserError(f'--split {split}: unknown{nearest(split, SPLITS)}; allowed: {", ".join(SPLITS)}')
    _refuse_unknown([name for name in store.classes if name not in trained.classes], store.name, trained)
    size = trained.image_px
    if store.image_shape[:2] != (size, size):
        height, width, _ = store.image_shape
        raise UserError(f"{store.name}: has {width}x{height} pixels, the model takes {size}x{size}; scale the images")
    found = store.split(split)
    own = np.array([trained.classes.index(name) for name in store.classes], np.int64)
    kind = store.manifest.source.kind
    named = store.name if kind == "folder" else kind
    return LabelledImages(f"{named} ({split})", found.images, own[np.asarray(found.labels)])


def _refuse_unknown(names: Sequence[str], where: Path | str, trained: Trained) -> None:
    if names:
        known = ", ".join(trained.classes[:20])
        raise UserError(
            f'{where}: its class "{names[0]}" is none of the model\'s{nearest(names[0], trained.classes)}; '
            f"known: {known}"
        )


def metrics_on(trained: Trained, images: Images, labels: np.ndarray, tta: str = "none") -> dict[str, Any]:
    """Return ``images``, ``accuracy`` with its 95% ``interval`` (percent), ``loss`` (nats), ``calibration_error``.

    Args:
        trained: the model, wherever it is.
        images: uint8 (N, S, S, C).
        labels: int64 (N,).
        tta: ``none``, ``flip`` or ``multicrop``.
    """
    return _metrics(logits_of(trained, images, tta), labels)


def _metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    right = int((logits.argmax(1) == labels).sum())
    return {
        "images": len(labels),
        "accuracy": accuracy(logits, labels),
        "interval": list(wilson_interval(right, len(labels))),
        "loss": negative_log_likelihood(softmax(logits), labels),
        "calibration_error": calibration_error(reliability(logits, labels)),
    }


def evaluate(
    trained: Trained,
    found: LabelledImages,
    corruptions: Sequence[str] = (),
    levels: Sequence[int] = (),
    *,
    tta: str = "none",
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Evaluate a model on images as they are, and on each corruption of them in each level.

    Returns:
        ``clean``, the metrics of `metrics_on`; ``corrupted``, a list of the same with ``corruption`` and ``level``;
        ``mean_corrupted``, their mean accuracy in percent, None without any.
    """
    on_device(trained)
    clean = metrics_on(trained, found.images, found.labels, tta)
    rows = []
    for name in corruptions:
        for level in levels:
            progress(f"{name} {level}")
            parts = corrupted(found.images, name, level, seed)
            logits = np.concatenate([logits_of(trained, part, tta) for part in parts])
            rows.append({"corruption": name, "level": level, **_metrics(logits, found.labels)})
    mean = float(np.mean([row["accuracy"] for row in rows])) if rows else None
    return {"data": found.name, "clean": clean, "corrupted": rows, "mean_corrupted": mean}


def on_device(trained: Trained) -> None:
    """Move the model to a GPU where there is one, and let it compute in fp32 there, as it does on a CPU."""
    if torch.cuda.is_available():
        PRECISIONS["fp32"].apply_to_cuda()
        trained.model.to("cuda")
    else:
        trained.model.to("cpu")
