"""Fixtures that several test folders share, and the skipping of tests whose hardware or data is absent."""

import os
from pathlib import Path

import numpy as np
import pytest

REAL = os.environ.get("FASTCIFAR_DATA")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("real") and not REAL:
            item.add_marker(pytest.mark.skip(reason="real CIFAR-10: FASTCIFAR_DATA is not set"))
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep converted data away from the user's cache; a session's tests (and their subprocesses) share it."""
    given = os.environ.get("FASTCIFAR_TEST_CACHE")
    folder = Path(given) if given else tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTCIFAR_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def real_store(cache: Path):
    """The real CIFAR-10 as a raw store."""
    if not REAL:
        pytest.skip("real CIFAR-10: FASTCIFAR_DATA is not set")
    from fastcifar.config.schema import DataConfig
    from fastcifar.data.store import resolve_store

    return resolve_store(DataConfig(source="cifar10"), Path(REAL))


@pytest.fixture(scope="session")
def synthetic_store(cache: Path):
    """The drawn images as a raw store: 2,000 to train on, 1,000 to test."""
    from fastcifar.config.schema import DataConfig
    from fastcifar.data.store import resolve_store

    return resolve_store(DataConfig(source="synthetic"))


@pytest.fixture(scope="session")
def real_images(real_store) -> np.ndarray:
    """The 10,000 real test images, uint8 (10000, 32, 32, 3)."""
    return np.array(real_store.split("test").images)


@pytest.fixture(scope="session")
def real_train(real_store):
    """The 50,000 real training images with labels, memory-mapped."""
    return real_store.split("train")
