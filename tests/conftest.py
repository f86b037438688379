"""Fixtures that several test folders share, and the skipping of tests whose hardware or data is absent."""

import os
import random
import secrets
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.nullgpu.build import build, missing

REAL = os.environ.get("FASTCIFAR_DATA")
SEED = "FASTCIFAR_TEST_SEED"


# ------------------------------------------------------------------------------------------------ order, random inputs


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let one number decide the order of the tests and every random input: FASTCIFAR_TEST_SEED, else a fresh one."""
    option = config.getoption("randomly_seed", None)  # absent without pytest-randomly; "default", "last" or a number
    if isinstance(option, int):
        os.environ[SEED] = str(option)
    os.environ.setdefault(SEED, str(secrets.randbits(32)))  # the processes of pytest-xdist inherit it
    if option == "default":
        config.option.randomly_seed = int(os.environ[SEED])
    os.environ["OMP_NUM_THREADS"] = "1"  # the programs that tests start have one thread too
    if not os.access(Path.home(), os.W_OK):  # where Triton keeps what it has compiled
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"triton-{os.getuid()}"))


def session_seed(config: pytest.Config) -> int:
    option = config.getoption("randomly_seed", None)
    return option if isinstance(option, int) else int(os.environ[SEED])


def seed_of(item: pytest.Item) -> int:
    """Return the test's own seed, so that it draws the same inputs alone and in any order."""
    return (session_seed(item.config) + zlib.crc32(item.nodeid.encode())) % 2**32


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the global generators, and give torch one thread; both only if something has imported it.

    The last bits of a sum depend on the number of threads, which an earlier test may have changed. A fixture of the
    function's scope would come too late for it: those of a module, which may train a net, are made before.
    """
    seed = seed_of(item)
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:  # a fresh one has a constant seed and, by OMP_NUM_THREADS, one thread
        torch = sys.modules["torch"]
        # Without a GPU, torch.manual_seed notes for the generators of later ones by which calls it was reached, which
        # takes a thousand times as long as the seeding.
        (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(seed)
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed:
        report.sections.append(("Seed", f"{SEED}={session_seed(item.config)} repeats the order and the random inputs"))
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    seed = session_seed(terminalreporter.config)
    terminalreporter.write_line(f"Order and random inputs: {SEED}={seed}")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed, 0..2**32-1; a failure's report says how to get it again."""
    return seed_of(request.node)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A generator of fresh random inputs; a failure's report says how to get them again."""
    return np.random.default_rng(seed)


# --------------------------------------------------------------------------------------------------- hardware and data


# What takes longest, longest first: begun last, it would keep one process busy while the others have nothing to do.
LONG = [
    "nullgpu/test_small.py", "ladder/test_ray.py", "ladder/test_runner.py", "kernels/test_interpreted.py",
    "train/test_launch.py", "data/test_exit.py", "packaging/test_wheel.py", "nullgpu/test_device.py",
    "train/test_run.py", "cli/test_run.py",
]  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes
        place = {f"tests/{name}": number for number, name in enumerate(LONG)}
        items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(LONG)))
    for item in items:
        if item.get_closest_marker("real") and not REAL:
            item.add_marker(pytest.mark.skip(reason="real CIFAR-10: FASTCIFAR_DATA is not set"))
        if item.get_closest_marker("gpu"):
            # torch's compiler and its search for waits warn about themselves, where they are imported or begun first.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not _has_cuda():
                item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device"))
        if "null_device" in getattr(item, "fixturenames", ()) and (why := missing()):
            item.add_marker(pytest.mark.skip(reason=f"null device: {why}"))


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
    """The synthetic images as a raw store: 2,000 to train on, 1,000 to test."""
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


@pytest.fixture(scope="session")
def null_device() -> Path:
    """The compiled null device; a test that uses this fixture is skipped where it cannot run."""
    return build()
