"""One contract, four backends: the same batches, in the same order, whatever moves the bytes."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from multiprocessing import resource_sharer
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcifar import locations
from fastcifar.config.operations import parse_op
from fastcifar.config.schema import AugmentConfig, LoaderConfig
from fastcifar.data import loaders
from fastcifar.data.batch import Batch
from fastcifar.data.loaders import PACKAGES, Loader, build_loader, choose_backend
from fastcifar.data.loaders.torchvision import _forgive_a_lost_reader
from fastcifar.data.store import Store, store_as
from fastcifar.errors import UserError
from fastcifar.kernels.philox import epoch_order

CPU = torch.device("cpu")
BACKENDS = ("resident", "ffcv", "dali", "torchvision")
KEPT = []  # numba prints a KeyError when compiled functions that refer to each other are collected
MODULES = {"ffcv": "ffcv", "dali": "nvidia.dali"}


@pytest.fixture(scope="module")
def store(request) -> Store:
    """Real images where there are any, else synthetic ones."""
    return request.getfixturevalue("real_store" if os.environ.get("FASTCIFAR_DATA") else "synthetic_store")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    if request.param in MODULES and not loaders._installed(MODULES[request.param]):
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture
def build(store, backend):
    made = []

    def make(rows=None, workers=1, batch_size=100, drop_last=False, seed=3, **other) -> Loader:
        config = LoaderConfig(name=backend, workers=workers, order=other.pop("order", "plan"))
        settings = {"seed": seed, "batch_size": batch_size, "drop_last": drop_last, "device": CPU, **other}
        made.append(build_loader(config, store, rows, **settings))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def some_rows(rng: np.random.Generator, store: Store, count: int) -> np.ndarray:
    return np.sort(rng.permutation(store.count("train"))[:count])


def threads_end(count: int) -> bool:
    """Return whether only ``count`` threads are left; the feeders of a DataLoader's queues take a moment to go."""
    until = time.monotonic() + 20
    while threading.active_count() > count and time.monotonic() < until:
        time.sleep(0.01)
    return threading.active_count() <= count


@pytest.mark.parametrize("workers", [1, 4])
def test_contract(rng, store, build, backend, workers):
    """Every sample once, in the epoch's order, with its pixels and label; batches stay valid; threads stay as set."""
    threads, running = torch.get_num_threads(), threading.active_count()
    rows, true = some_rows(rng, store, 1030), store.split("train")
    loader = build(rows, workers)
    assert isinstance(loader, Loader)
    assert (loader.name, loader.augmented, loader.samples, len(loader)) == (backend, False, 1030, 11)
    for epoch in (0, 5):
        batches = list(loader.epoch(epoch))
        assert [len(b.labels) for b in batches] == [100] * 10 + [30]
        indices = torch.cat([b.indices for b in batches]).numpy()
        assert np.array_equal(indices, rows[epoch_order(1030, 3, epoch).numpy()])
        assert np.array_equal(torch.cat([b.labels for b in batches]), true.labels[indices])
        assert np.array_equal(torch.cat([b.gathered() for b in batches]), true.images[indices])
        kinds = {(b.images.dtype, b.labels.dtype, b.rows.dtype, b.indices.dtype, b.images.device) for b in batches}
        assert kinds == {(torch.uint8, torch.int64, torch.int64, torch.int64, CPU)}
    assert torch.get_num_threads() == threads
    assert threads_end(running)


def test_whole_set(store, build):
    indices = torch.cat([b.indices for b in build(None, 2, batch_size=512).epoch(1)])
    assert torch.equal(indices, epoch_order(store.count("train"), 3, 1))


def test_early_break_is_forgotten(rng, store, build):
    rows, running = some_rows(rng, store, 500), threading.active_count()
    loader = build(rows, batch_size=50)
    for batch in loader.epoch(0):
        assert len(batch.labels) == 50
        break
    abandoned = loader.epoch(0)
    next(abandoned)
    whole = torch.cat([b.indices for b in loader.epoch(1)])
    assert np.array_equal(whole, rows[epoch_order(500, 3, 1).numpy()])
    loader.epoch(2)  # never started
    loader.close()
    assert list(loader.epoch(0)) == []
    assert threads_end(running)


@pytest.mark.parametrize(("world", "drop_last"), [(2, False), (3, True)])
def test_ranks_divide_every_batch(rng, store, build, world, drop_last):
    """Side by side, the ranks' parts are the batches of one device; 50 and the last 35 do not divide by 3 or 2."""
    rows = some_rows(rng, store, 335)
    alone = list(build(rows, batch_size=50, drop_last=drop_last).epoch(2))
    parts = [build(rows, batch_size=50, drop_last=drop_last, rank=r, world=world) for r in range(world)]
    seen = [list(part.epoch(2)) for part in parts]
    for part, batches in zip(parts, seen, strict=True):
        assert (len(part), part.samples) == (len(alone), sum(len(b.rows) for b in batches))
    for whole, *shares in zip(alone, *seen, strict=True):
        assert whole.share is None
        assert torch.equal(torch.cat([b.indices for b in shares]), whole.indices)
        assert torch.equal(torch.cat([b.gathered() for b in shares]), whole.gathered())
        sizes = [len(b.rows) for b in shares]
        assert [b.share for b in shares] == [(sum(sizes[:r]), whole.total) for r in range(world)]
        assert max(sizes) - min(sizes) <= 1


def test_a_rank_without_a_sample_is_refused(rng, store, build):
    with pytest.raises(UserError, match=r"last batch has 2 samples for 3 ranks: set train\.drop_last"):
        build(some_rows(rng, store, 102), batch_size=50, world=3)
    with pytest.raises(UserError, match=r"batch_size = 2 is fewer samples than the 3 ranks"):
        build(some_rows(rng, store, 102), batch_size=2, world=3)


def test_torchs_random_numbers_are_left_alone(rng, store, build):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(build(some_rows(rng, store, 64)).epoch(0))
    assert torch.equal(torch.rand(3), expected)


def test_reads_a_store_of_another_format(store, build, cache):
    """Each backend takes whatever store there is, and converts it once."""
    other = store_as(store, "dali")
    config = LoaderConfig(name=build().name)
    loader = build_loader(config, other, None, seed=3, batch_size=100, drop_last=False, device=CPU)
    first = next(iter(loader.epoch(0)))
    loader.close()
    assert np.array_equal(first.gathered(), store.split("train").images[first.indices])


# ------------------------------------------------------------------------------------------------------- native order


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_dalis_own_order(rng, synthetic_store, world, whole):
    """Every sample once an epoch, an order that depends on (seed, epoch) alone, and that is not the epoch order's."""
    pytest.importorskip("nvidia.dali.pipeline")
    rows = np.arange(2000) if whole else some_rows(rng, synthetic_store, 700)
    true = synthetic_store.split("train")

    def indices(epoch: int, seed: int = 3) -> list[int]:
        seen = []
        for rank in range(world):
            loader = build_loader(
                LoaderConfig(name="dali", order="native"),
                synthetic_store,
                rows,
                seed=seed,
                batch_size=64,
                drop_last=False,
                device=CPU,
                rank=rank,
                world=world,
            )
            batches = list(loader.epoch(epoch))
            assert len(batches) == len(loader)
            for batch in batches:
                assert np.array_equal(batch.gathered(), true.images[batch.indices])
                assert np.array_equal(batch.labels, true.labels[batch.indices])
                seen += batch.indices.tolist()
            loader.close()
        return seen

    first = indices(0)
    assert sorted(first) == rows.tolist()
    assert first == indices(0)
    assert first != indices(1)
    assert first != indices(0, seed=4)
    assert first != rows.tolist()


@pytest.mark.parametrize(("count", "drop_last", "world"), [(2000, False, 1), (700, True, 1), (1030, False, 2)])
def test_dalis_own_order_goes_on_in_one_pipeline(rng, synthetic_store, seed, monkeypatch, count, drop_last, world):
    """An epoch's order is DALI's, whether its pipeline has come there by itself or begins there."""
    pytest.importorskip("nvidia.dali.pipeline")
    from fastcifar.data.loaders.native import NativeReader

    monkeypatch.setattr("fastcifar.data.loaders.native.SHUFFLE_SAMPLES", 300)
    rows, built, build = some_rows(rng, synthetic_store, count), [], NativeReader._built
    monkeypatch.setattr(NativeReader, "_built", lambda self, at: built.append(at) or build(self, at))

    def make() -> Loader:
        return build_loader(
            LoaderConfig(name="dali", order="native"), synthetic_store, rows, seed=seed, batch_size=64,
            drop_last=drop_last, device=CPU, rank=world - 1, world=world,
        )  # fmt: skip

    def indices(loader: Loader, epoch: int) -> list[int]:
        return [index for batch in loader.epoch(epoch) for index in batch.indices.tolist()]

    whole = make()
    epochs = [indices(whole, epoch) for epoch in range(5)]
    assert built == [None]  # what DALI does by itself, four times over: the oracle
    assert len({tuple(order) for order in epochs}) == 5
    resumed = make()
    assert indices(resumed, 3) == epochs[3], seed
    assert indices(resumed, 4) == epochs[4]
    assert len(built) == 3  # one to ask for the seed's state, one at the third epoch
    next(resumed.epoch(1))
    assert indices(resumed, 2) == epochs[2]
    assert indices(resumed, 2) == epochs[2]
    whole.close(), resumed.close()


def test_dalis_random_numbers_are_followed_where_it_draws_again(synthetic_store):
    """The generator's largest number is no draw; the state that comes before it is put in front of an epoch."""
    pytest.importorskip("nvidia.dali.pipeline")
    from fastcifar.data.loaders import native

    order = loaders.EpochOrder(np.arange(2000), 3, 100, False)
    settings = {"batch_size": 100, "num_threads": 1, "device_id": None}
    reader = native.NativeReader(store_as(synthetic_store, "dali"), order, settings)
    before = pow(16807, -1, 2**31 - 1) * (2**31 - 2) % (2**31 - 1)
    at = native.with_state(reader._built(None).checkpoint(), before)
    assert native.state_of(at) == (before, 0)
    pipeline = reader._built(at)
    for _ in range(20):
        pipeline.run()
    assert native.state_of(pipeline.checkpoint()) == (native._state_after(before, 2000, 2000, 1), 0)
    assert native._state_after(before, 2000, 2000, 1) != pow(16807, 2000, 2**31 - 1) * before % (2**31 - 1)


def test_another_version_of_dali_is_refused_by_name(monkeypatch):
    pytest.importorskip("nvidia.dali.pipeline")
    from fastcifar.data.loaders.native import state_of

    with pytest.raises(UserError, match=r"native.*: DALI .* checkpoints that are not known here; use order = \"plan\""):
        state_of(b"\x0a\x1b\x0a\x06reader\x12\x11\x0a\x0f\x0a\x05words\x10\x00\x18\x00")


# ------------------------------------------------------------------------------------------------------------- choice


def test_an_empty_folder_is_no_installed_package(tmp_path, monkeypatch):
    """What is left of DALI where it was uninstalled."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "vendor_of_loaders"
    (package / "left" / "include").mkdir(parents=True)
    (package / "there").mkdir()
    for file in (package / "__init__.py", package / "there" / "__init__.py"):
        file.touch()
    names = ("vendor_of_loaders.there", "vendor_of_loaders.left", "vendor_of_loaders.missing", "no_such_vendor.package")
    assert [loaders._installed(name) for name in names] == [True, False, False, False]


def test_auto_takes_what_fits(store, monkeypatch):
    auto, count = LoaderConfig(), store.count("train")
    size = count * int(np.prod(store.image_shape))
    monkeypatch.setattr(loaders, "free_memory", lambda device: 4 * size)
    assert choose_backend(auto, store, count, CPU)[0] == "resident"
    monkeypatch.setattr(loaders, "free_memory", lambda device: 4 * size - 1)
    present = {"ffcv", "nvidia.dali"}
    monkeypatch.setattr(loaders, "_installed", lambda module: module in present)
    name, reason = choose_backend(auto, store, count, CPU)
    assert name == "ffcv"
    assert "more than a quarter; ffcv instead" in reason
    present.remove("ffcv")
    assert choose_backend(auto, store, count, CPU)[0] == "dali"
    present.clear()
    assert choose_backend(auto, store, count, CPU)[0] == "torchvision"
    monkeypatch.setattr(loaders, "free_memory", lambda device: size)
    name, reason = choose_backend(LoaderConfig(name="resident"), store, count, CPU)
    assert name == "torchvision"
    assert reason.startswith("resident does not fit (")


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_package_says_how_to_install_it(store, monkeypatch, name):
    monkeypatch.setattr(loaders, "_installed", lambda module: False)
    with pytest.raises(UserError, match="make environment"):
        choose_backend(LoaderConfig(name=name), store, 10, CPU)
    monkeypatch.setattr(locations, "clone", lambda: None)
    with pytest.raises(UserError, match=rf"pip install .*'fastcifar\[{name}\]'"):
        choose_backend(LoaderConfig(name=name), store, 10, CPU)


# ----------------------------------------------------------------------------------------------- augmented in workers


def test_workers_augment_as_published(rng, store):
    """PIL transforms in the workers: the batch comes augmented, the same whatever the number of workers."""
    ops = [parse_op(text) for text in ("crop(4)", "flip", "rotate(15)", "autoaugment", "cutout(8, p=0.5)")]
    augment = AugmentConfig.model_construct(ops=ops, where="loader")
    rows = some_rows(rng, store, 60)

    def batches(workers: int, epoch: int = 0) -> list:
        loader = build_loader(
            LoaderConfig(workers=workers),
            store,
            rows,
            seed=1,
            batch_size=32,
            drop_last=False,
            device=CPU,
            augment=augment,
        )
        assert (loader.name, loader.augmented, len(loader)) == ("torchvision", True, 2)
        return list(loader.epoch(epoch))

    one, two, later = batches(1), batches(2), batches(1, epoch=1)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.gathered(), b.gathered())
        assert torch.equal(a.indices, b.indices)
    true = torch.from_numpy(store.split("train").images[one[0].indices])
    assert one[0].images.shape == true.shape
    assert (one[0].gathered() != true).float().mean() > 0.3
    assert not torch.equal(one[0].gathered(), later[0].gathered())


def test_worker_transforms_are_torchvisions(real_images):
    """The same seed gives what torchvision's own Compose gives; the published order of operations."""
    from PIL import Image
    from torchvision import transforms as t

    from fastcifar.data.loaders.pil import augment_one, pil_transforms

    ours = pil_transforms([parse_op("crop(4)"), parse_op("flip"), parse_op("rotate(15)")], 32, 32)
    theirs = t.Compose([t.RandomCrop(32, padding=4), t.RandomHorizontalFlip(), t.RandomRotation(15)])
    for seed, image in enumerate(real_images[:40]):
        torch.manual_seed(seed)
        expected = np.asarray(theirs(Image.fromarray(image)))
        assert np.array_equal(augment_one(image, ours, seed), expected)


def test_worker_reflection_is_torchvisions(rng):
    from PIL import Image
    from torchvision import transforms as t

    from fastcifar.data.loaders.pil import augment_one, pil_transforms

    ours = pil_transforms([parse_op("crop(6, pad='reflect')")], 32, 32)
    theirs = t.RandomCrop(32, padding=6, padding_mode="reflect")
    for seed, image in enumerate(rng.integers(0, 256, (20, 32, 32, 3), np.uint8)):
        torch.manual_seed(seed)
        expected = np.asarray(theirs(Image.fromarray(image)))
        assert np.array_equal(augment_one(image, ours, seed), expected)
    with pytest.raises(UserError, match="32 px or more"):
        pil_transforms([parse_op("crop(31, pad='reflect')")], 28, 28)


def test_worker_alternation_mirrors_in_the_epochs_of_the_device(synthetic_store, rng):
    from fastcifar.augment.augment import build_augment

    config = AugmentConfig(ops=["flip(0.3, alternate=true)"], where="loader")
    rows, seed = np.arange(150), int(rng.integers(0, 2**63))
    loader = build_loader(
        LoaderConfig(workers=1), synthetic_store, rows, seed=seed, batch_size=150, drop_last=False, device=CPU,
        augment=config,
    )  # fmt: skip
    device = build_augment(
        config.model_copy(update={"where": "device"}), mean=[0.0] * 3, std=[1.0] * 3,
        image_shape=synthetic_store.image_shape, seed=seed, device=CPU, dtype=torch.float32,
    )  # fmt: skip
    for epoch in (0, 1):
        batch = next(iter(loader.epoch(epoch)))
        originals = torch.from_numpy(synthetic_store.split("train").images[batch.indices.numpy()])
        expected = device(Batch(originals, torch.arange(150), batch.labels, batch.indices), epoch)
        pixels = (expected.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
        assert torch.equal(pixels, batch.gathered()), f"seed {seed}, epoch {epoch}"
    loader.close()


def test_worker_cutout():
    from fastcifar.data.loaders.pil import augment_one, pil_transforms

    white = np.full((32, 32, 3), 255, np.uint8)
    cut = pil_transforms([parse_op("cutout(8, p=0.5)")], 32, 32)
    holes = [(augment_one(white, cut, seed) == 0).all(-1).sum() for seed in range(300)]
    assert max(holes) == 64
    assert 110 < sum(h == 0 for h in holes) < 190
    assert 0 < min(h for h in holes if h) < 64  # clipped at a border
    whole = pil_transforms([parse_op("cutout(20, inside=true)")], 32, 32)
    assert {(augment_one(white, whole, seed) == 0).all(-1).sum() for seed in range(60)} == {400}


def test_worker_erasing():
    from fastcifar.data.loaders.pil import augment_one, pil_transforms

    white = np.full((32, 32, 3), 255, np.uint8)
    erase = pil_transforms([parse_op("erase(0.5, 0.1, 0.2, fill='black')")], 32, 32)
    holes = [int((augment_one(white, erase, seed) == 0).all(-1).sum()) for seed in range(300)]
    assert 110 < sum(h == 0 for h in holes) < 190
    assert all(0.08 * 1024 < h < 0.22 * 1024 for h in holes if h)


def loaded_by_workers(rng, store) -> Iterator:
    """An epoch of torch's loader with one worker process, which has begun."""
    settings = LoaderConfig(name="torchvision", workers=1)
    rows = some_rows(rng, store, 400)
    loader = build_loader(settings, store, rows, seed=1, batch_size=2, drop_last=False, device=CPU)
    batches = iter(loader.epoch(0))
    next(batches)
    return batches


def waits(batches: Iterator) -> None:
    list(batches)


def does_something_else(batches: Iterator) -> None:
    time.sleep(20)


@pytest.mark.parametrize("process", [waits, does_something_else])
def test_a_worker_that_is_killed_is_one_message_whatever_the_main_process_does(rng, store, process):
    """The signal of its death comes in the middle of a step, too, not only where a batch is waited for."""
    batches = loaded_by_workers(rng, store)

    def kill() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        process(batches)

    with pytest.raises(UserError, match=r"is gone, .*memory \(.+\): lower data\.loader\.workers, or"):
        kill()
    batches.close()
    assert multiprocessing.active_children() == []


# ---------------------------------------------------------------------------------------------------- stock readers


def test_stock_ffcv_reads_our_beton(synthetic_store, cache):
    """ffcv's own loader with its default decoders, and its page-wise memory manager, on our file."""
    pytest.importorskip("cv2")
    if not loaders._installed("ffcv"):
        pytest.skip("ffcv is not installed")
    from fastcifar.data.loaders.ffcv import kept_threads

    root, true = store_as(synthetic_store, "ffcv").root, synthetic_store.split("train")
    with kept_threads(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ffcv imports distutils and builds deprecated syntax trees
        from ffcv.loader import Loader as Stock

        stock = Stock(str(root / "train.beton"), batch_size=250, num_workers=1, os_cache=False, drop_last=False)
        KEPT.append(stock)
        assert list(stock.pipeline_specs) == ["image", "label", "index"]
        batches = [[tensor.clone() for tensor in batch] for batch in stock]
    images, labels, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(indices.flatten(), torch.arange(2000))
    assert np.array_equal(images, true.images)
    assert np.array_equal(labels.flatten(), true.labels)


def test_stock_dali_reads_our_shards(synthetic_store, cache):
    pytest.importorskip("nvidia.dali.pipeline")
    from nvidia.dali import fn, pipeline_def, types

    root, true = store_as(synthetic_store, "dali").root, synthetic_store.split("train")

    @pipeline_def(batch_size=100, num_threads=1, device_id=None)
    def pipeline():
        images, labels, indices = fn.readers.webdataset(
            paths=[str(root / "train-00000.tar")],  # no index: DALI indexes the archive itself
            ext=["img", "cls", "idx"],
            dtypes=[types.UINT8, types.UINT8, types.INT64],
        )
        return images, labels, indices

    stock = pipeline()
    stock.build()
    for first in range(0, 2000, 100):
        images, labels, indices = (np.array(o.as_tensor()) for o in stock.run())
        assert indices.ravel().tolist() == list(range(first, first + 100))
        assert np.array_equal(images.reshape(-1, 32, 32, 3), true.images[first : first + 100])
        assert [int(bytes(text)) for text in labels] == true.labels[first : first + 100].tolist()


def test_ffcv_readers_errors_reach_the_trainer(store):
    """An exception on the reading thread ends the epoch with that exception, not with a hang."""
    from fastcifar.data.loaders.streaming import ahead

    def broken():
        yield "first"
        raise OSError("the disk has gone")

    items = ahead(broken())
    assert next(items) == "first"
    with pytest.raises(OSError, match="the disk has gone"):
        next(items)


def test_ffcv_memory_is_used_again_only_when_nobody_looks():
    from fastcifar.data.loaders.ffcv import _Buffers

    buffers = _Buffers()
    first = buffers.take((4, 2))
    address = first.data_ptr()
    for keep in (lambda t: t, lambda t: t[1:], lambda t: t.numpy()[2:], lambda t: t.view(-1).numpy()):
        kept = keep(first)
        del first
        assert buffers.take((4, 2)).data_ptr() != address
        del kept
        first = buffers.take((4, 2))
        assert first.data_ptr() == address
    assert buffers.take((3, 2)).shape == (3, 2)


def test_same_size_images_of_any_kind(rng, tmp_path, backend):
    """Images of another size and another number of classes, through a folder, on every backend."""
    from PIL import Image

    from fastcifar.config.schema import DataConfig
    from fastcifar.data.store import resolve_store

    for split, name, k in [(s, n, k) for s in ("train", "test") for n in ("a", "b", "c") for k in range(4)]:
        path = Path(tmp_path / split / name / f"{k}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 28, 3), np.uint8)).save(path)
    store = resolve_store(DataConfig(source="folder"), tmp_path)
    config = LoaderConfig(name=backend, workers=1)
    loader = build_loader(config, store, None, seed=0, batch_size=5, drop_last=False, device=CPU)
    for batch in loader.epoch(0):
        assert np.array_equal(batch.gathered(), store.split("train").images[batch.indices])
    loader.close()


def test_a_closed_loader_yields_nothing_even_to_who_has_begun(build):
    """A batch of a closed resident loader would name rows of images that are gone."""
    loader = build(batch_size=10)
    begun = iter(loader.epoch(0))
    next(begun)
    loader.close()
    assert list(begun) == []
    assert list(loader.epoch(1)) == []


def test_a_worker_says_nothing_when_the_main_process_stops_fetching(monkeypatch, capfd):
    """As after a signal: multiprocessing's thread in a worker hands every error to ``sys.excepthook``."""
    sharer, served = resource_sharer._resource_sharer, threading.Event()
    monkeypatch.setattr(sys, "excepthook", _forgive_a_lost_reader)
    address, key = sharer.register(lambda connection, pid: served.set(), lambda: None)
    authority = multiprocessing.current_process().authkey
    Client(address, authkey=authority).close()
    with Client(address, authkey=authority) as reader:
        reader.send((key, os.getpid()))  # the thread takes one after the other
        assert served.wait(60)
    resource_sharer.stop(60)
    assert capfd.readouterr().err == ""
    _forgive_a_lost_reader(ValueError, ValueError("another error"), None)
    assert "ValueError: another error" in capfd.readouterr().err
