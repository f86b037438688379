"""The loaders: four backends behind one contract, and the choice among them."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from fastcifar.config.schema import AugmentConfig, LoaderConfig
from fastcifar.data.loaders.base import Blocks, EpochOrder, Loader
from fastcifar.data.loaders.read_ahead import ReadAhead
from fastcifar.data.loaders.streaming import StreamingLoader
from fastcifar.data.store import Progress, Store, no_progress, store_as
from fastcifar.errors import UserError
from fastcifar.host_memory import available_bytes, total_bytes
from fastcifar.locations import install_command

__all__ = ["PACKAGES", "EpochOrder", "Loader", "build_loader", "choose_backend", "choose_order", "decide_order"]

PACKAGES = {"ffcv": ("ffcv", "ffcv"), "dali": ("nvidia.dali", "dali")}
"""The module that a backend needs, and the extra of fastcifar that installs it."""
HELD = 0.8
"""The share of the memory that a set's pages may take before it counts as larger than memory."""


def build_loader(
    config: LoaderConfig,
    store: Store,
    rows: np.ndarray | None,
    *,
    seed: int,
    batch_size: int,
    drop_last: bool,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    augment: AugmentConfig | None = None,
    progress: Progress = no_progress,
    memory_bytes: int | None = None,
    begun: str | None = None,
) -> Loader:
    """Return the loader of the training images.

    A backend whose format the store does not have converts it once into the cache.

    Args:
        config: which backend, how many workers, whose order.
        store: the data, in any format.
        rows: int64 (N,), ascending: which training images take part; None for all. ``Batch.indices`` are these rows.
        seed: of the epoch order, 0..2**64-1.
        batch_size: samples per global batch, all ranks together.
        drop_last: leave out the odd last batch.
        device: where images go.
        rank: which part of each batch, 0..world-1.
        world: how many parts.
        augment: the augmentations; with ``where = "loader"`` the torchvision backend executes them.
        progress: told of a conversion's steps.
        memory_bytes: the memory that decides between random and block order; None for this machine's, or for the limit
            of this process's control groups.
        begun: the order that ``order = "plan"`` has become already, as `decide_order` says it; None decides now.

    Raises:
        UserError: a backend's package is missing, the images are of a kind that it cannot hold, or a batch has fewer
            samples than there are ranks.
    """
    chosen = np.arange(store.count("train")) if rows is None else np.asarray(rows, np.int64)
    in_workers = _in_workers(augment)
    name, reason = choose_backend(config, store, len(chosen), device, in_workers)
    blocks, larger, why = choose_order(config, name, store, len(chosen), memory_bytes, begun)
    order = EpochOrder(chosen, seed, batch_size, drop_last, rank, world, blocks)
    if name in PACKAGES:
        store = store_as(store, name, progress)
    loader = _BUILDERS[name](config, store, order, device, reason + why, in_workers)
    if isinstance(loader, StreamingLoader):
        loader.read_ahead = ReadAhead(loader.source, order, larger)
    return loader


def choose_backend(
    config: LoaderConfig, store: Store, count: int, device: torch.device, in_workers: AugmentConfig | None = None
) -> tuple[str, str]:
    """Return a backend's name and one line that says why.

    Raises:
        UserError: the backend that the recipe names is not installed.
    """
    if in_workers is not None:
        return "torchvision", 'augment.where = "loader"'
    set_bytes, free = count * int(np.prod(store.image_shape)), free_memory(device)
    share = f"{_readable(set_bytes)} of images, {_readable(free)} free on {device}"
    if config.name == "resident" and set_bytes > 0.9 * free:
        name, why = _streaming()
        return name, f"resident does not fit ({share}); {why}"
    if config.name != "auto":
        _require(config.name)
        return config.name, "named by the recipe"
    if set_bytes <= free / 4:
        return "resident", f"auto: {share}"
    name, why = _streaming()
    return name, f"auto: {share}, more than a quarter; {why}"


def choose_order(
    config: LoaderConfig, name: str, store: Store, count: int, memory_bytes: int | None = None,
    begun: str | None = None,
) -> tuple[Blocks | None, bool, str]:
    """Return the blocks of a quasi-random order or None, whether the set exceeds the memory, and what to say of it.

    Args:
        config: of the loader.
        name: the backend that was chosen.
        store: the data.
        count: images that take part.
        memory_bytes: what to compare with, as in `build_loader`.
        begun: the order that the plan has become already, as in `build_loader`.
    """
    set_bytes, memory = count * int(np.prod(store.image_shape)), memory_bytes or total_bytes()
    larger = name != "resident" and set_bytes > HELD * memory
    exceeds = f"{_readable(set_bytes)} of images exceed {HELD:.0%} of {_readable(memory)} of memory"
    if config.order == "block":
        return Blocks.of(store.image_shape), larger, "; block order"
    if config.order == "plan" and (larger if begun is None else begun == "block"):
        return Blocks.of(store.image_shape), larger, f"; block order: {exceeds if larger else 'as the run began'}"
    advice = f'; {exceeds}: data.loader.order = "block" reads faster' if config.order == "random" and larger else ""
    return None, larger, advice


def decide_order(
    config: LoaderConfig, store: Store, count: int, device: torch.device, augment: AugmentConfig | None = None,
    memory_bytes: int | None = None,
) -> str:
    """Return the order that a run begins with here and now: ``random``, ``block`` or ``native``.

    What ``plan`` becomes depends on the backend, and so on what a device has free at the moment.

    Args:
        config: of the loader.
        store: the data.
        count: images that take part.
        device: where images go.
        augment: the augmentations.
        memory_bytes: what to compare with, as in `build_loader`.

    Raises:
        UserError: the backend that the recipe names is not installed.
    """
    if config.order != "plan":
        return config.order
    name, _ = choose_backend(config, store, count, device, _in_workers(augment))
    blocks, _, _ = choose_order(config, name, store, count, memory_bytes)
    return "random" if blocks is None else "block"


def _in_workers(augment: AugmentConfig | None) -> AugmentConfig | None:
    """Return the augmentations where the loader's workers execute them, else None."""
    return augment if augment is not None and augment.where == "loader" else None


def _streaming() -> tuple[str, str]:
    """Return the best installed backend that does not hold the whole set."""
    for name, (module, _) in PACKAGES.items():
        if _installed(module):
            return name, f"{name} instead"
    return "torchvision", "torchvision instead (neither ffcv nor DALI is installed)"


def _installed(module: str) -> bool:
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        return False
    # Uninstalling DALI leaves empty folders, which Python takes for a package without a file of its own.
    return found is not None and found.origin is not None


def _require(name: str) -> None:
    if name in PACKAGES and not _installed(PACKAGES[name][0]):
        module, extra = PACKAGES[name]
        raise UserError(
            f'data.loader.name = "{name}" needs {module}, which is not installed; '
            f"install it with `{install_command(extra)}`, or choose another loader"
        )


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; for the CPU, what the machine and its control groups let us have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()


def _readable(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


_Builder = Callable[[LoaderConfig, Store, EpochOrder, torch.device, str, AugmentConfig | None], Loader]


def _resident(
    config: LoaderConfig, store: Store, order: EpochOrder, device: torch.device, reason: str,
    augment: AugmentConfig | None,
) -> Loader:
    from fastcifar.data.loaders.resident import ResidentLoader

    return ResidentLoader(store, order, device, reason)


def _ffcv(
    config: LoaderConfig, store: Store, order: EpochOrder, device: torch.device, reason: str,
    augment: AugmentConfig | None,
) -> Loader:
    from fastcifar.data.loaders.ffcv import FfcvLoader

    return FfcvLoader(store, order, device, reason, config.workers)


def _dali(
    config: LoaderConfig, store: Store, order: EpochOrder, device: torch.device, reason: str,
    augment: AugmentConfig | None,
) -> Loader:
    from fastcifar.data.loaders.dali import DaliLoader

    return DaliLoader(store, order, device, reason, config.workers, config.order)


def _torchvision(
    config: LoaderConfig, store: Store, order: EpochOrder, device: torch.device, reason: str,
    augment: AugmentConfig | None,
) -> Loader:
    from fastcifar.data.loaders.torchvision import TorchvisionLoader

    return TorchvisionLoader(store, order, device, reason, config.workers, augment)


_BUILDERS: dict[str, _Builder] = {"resident": _resident, "ffcv": _ffcv, "dali": _dali, "torchvision": _torchvision}
