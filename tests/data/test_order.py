"""Quasi-random order: blocks of consecutive samples shuffled, and the samples within a window; the same everywhere."""

import os

import numpy as np
import pytest
import torch

from fastcifar.config.schema import LoaderConfig
from fastcifar.data import loaders, pixels
from fastcifar.data.loaders import build_loader, choose_order, decide_order, read_ahead
from fastcifar.data.loaders.base import Blocks, EpochOrder
from fastcifar.data.store import store_as
from fastcifar.kernels.philox import epoch_order

CPU = torch.device("cpu")
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not loaders._installed(module), reason=f"{name} is not installed"))
    for name, module in (("resident", "torch"), ("ffcv", "ffcv"), ("dali", "nvidia.dali"), ("torchvision", "torch"))
]


def test_every_position_once_block_by_block_and_window_by_window(rng, seed):
    for _ in range(20):
        count, samples, window = (int(n) for n in rng.integers(1, [700, 40, 9]))
        order = Blocks(samples, window).order(count, seed, epoch=3).numpy()
        assert np.array_equal(np.sort(order), np.arange(count))
        sequence = Blocks(samples, window).sequence(count, seed, epoch=3)
        assert np.array_equal(np.sort(sequence), np.arange(-(-count // samples)))
        first = 0
        for blocks in np.split(sequence, range(window, len(sequence), window)):
            members = np.concatenate([np.arange(count)[b * samples : (b + 1) * samples] for b in blocks])
            assert np.array_equal(np.sort(order[first : first + len(members)]), np.sort(members))
            first += len(members)


def test_what_fits_one_window_is_in_random_order():
    assert torch.equal(Blocks(10, 50).order(500, 7, 2), epoch_order(500, 7, 2))
    assert not torch.equal(Blocks(10, 49).order(500, 7, 2), epoch_order(500, 7, 2))
    assert Blocks.of((64, 64, 3)) == Blocks(85, 128)


def test_windows_and_blocks_are_shuffled_well():
    """Every position of an epoch is near each sample about as often: over many epochs the mean place is the middle."""
    epochs = 300
    place = np.empty((epochs, 400))
    for epoch in range(epochs):
        place[epoch, Blocks(10, 5).order(400, 11, epoch).numpy()] = np.arange(400)
    # The mean of 300 places, uniform over 0..399, has a standard error of 6.7; the fixed seed keeps it the same.
    assert abs(place.mean(0) - 199.5).max() < 5 * 400 / np.sqrt(12 * epochs)
    within = [np.abs(np.diff(Blocks(10, 5).order(400, 11, epoch).numpy())).mean() for epoch in range(20)]
    assert np.mean(within) > 60  # neighbours in an epoch are far apart in the set


def test_ranks_divide_the_same_batches(rng):
    rows = np.sort(rng.permutation(5_000)[:3_217])
    settings = {"seed": 5, "batch_size": 64, "drop_last": False, "blocks": Blocks(20, 8)}
    alone = np.split(EpochOrder(rows, **settings).rows_of(4), range(64, 3_217, 64))
    for world in (2, 3):
        shares = []
        for rank in range(world):
            order = EpochOrder(rows, **settings, rank=rank, world=world)
            ends = np.cumsum([order.rank_batch] * (len(alone) - 1))
            shares.append(np.split(order.rows_of(4), ends))
        for whole, *parts in zip(alone, *shares, strict=True):
            assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_blocks_on_every_loader(rng, synthetic_store, monkeypatch, backend):
    monkeypatch.setattr(Blocks, "of", classmethod(lambda cls, shape: cls(30, 4)))
    asked = []
    monkeypatch.setattr(read_ahead, "will_need", lambda images, first, last: asked.append((first, last)))
    rows, true = np.sort(rng.permutation(2_000)[:1_030]), synthetic_store.split("train")
    config = LoaderConfig(name=backend, workers=1, order="block")
    loader = build_loader(config, synthetic_store, rows, seed=3, batch_size=100, drop_last=False, device=CPU)
    try:
        assert loader.reason.endswith("; block order")
        batches = list(loader.epoch(1))
        indices = torch.cat([batch.indices for batch in batches]).numpy()
        assert np.array_equal(indices, rows[Blocks(30, 4).order(1_030, 3, 1).numpy()])
        assert np.array_equal(torch.cat([batch.gathered() for batch in batches]), true.images[indices])
    finally:
        loader.close()
    if backend != "resident":  # each block was asked for, once, in the epoch's order
        assert [first for first, _ in asked] == [rows[30 * b] for b in Blocks(30, 4).sequence(1_030, 3, 1)]


def test_a_batch_finds_what_was_asked_for(rng, synthetic_store, monkeypatch):
    """Whatever a batch reads was asked for before, and no more than a window and a half ahead."""
    asked = np.zeros(2_000, bool)

    def ask(images, first: int, last: int) -> None:
        asked[first:last] = True

    monkeypatch.setattr(read_ahead, "will_need", ask)
    order = EpochOrder(np.arange(2_000), 1, 64, False, blocks=Blocks(20, 10))
    before, rows = read_ahead.ReadAhead(synthetic_store.split("train").images, order, True).epoch(0), order.rows_of(0)
    for batch in range(order.batches):
        before(batch)
        assert asked[rows[batch * 64 : (batch + 1) * 64]].all()
        assert asked.sum() <= min(2_000, batch * 64 + 20 * 16)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_what_exceeds_memory_is_let_go_of_window_by_window(rng, synthetic_store, monkeypatch, backend):
    """Every block of a window that is done is forgotten, once, and none of a window that is still in use."""
    monkeypatch.setattr(Blocks, "of", classmethod(lambda cls, shape: cls(30, 4)))
    events = []
    monkeypatch.setattr(read_ahead, "will_need", lambda images, first, last: events.append((first, "asked")))
    monkeypatch.setattr(read_ahead, "forget", lambda images, first, last: events.append((first, "forgotten")))
    config, images = LoaderConfig(name=backend, workers=1, order="block"), synthetic_store.split("train").images
    for memory, forgotten in ((1 << 20, 15 * 4), (1 << 30, 0)):
        loader = build_loader(
            config, synthetic_store, None, seed=3, batch_size=100, drop_last=False, device=CPU, memory_bytes=memory
        )
        events.clear()
        try:
            for batch in loader.epoch(1):
                assert np.array_equal(batch.gathered(), images[batch.indices])
        finally:
            loader.close()
        order = [30 * block for block in Blocks(30, 4).sequence(2_000, 3, 1).tolist()]
        gone = [first for first, what in events if what == "forgotten"]
        if forgotten:
            assert events.pop(0) == (gone.pop(0), "forgotten") == (0, "forgotten")  # whatever was there before
        assert gone == order[:forgotten]
        for place in range(0, len(gone), 4):  # two windows on had been asked for by then
            before = events[: events.index((gone[place], "forgotten"))]
            assert {(first, "asked") for first in order[: place + 8]} <= set(before)


@pytest.mark.parametrize(("wanted", "backend", "memory", "blocks", "said"), [
    ("plan", "ffcv", 1 << 30, False, ""),
    ("plan", "ffcv", 7 << 20, True, "; block order: 6 MiB of images exceed 80% of 7 MiB of memory"),
    ("plan", "resident", 1 << 20, False, ""),
    ("random", "ffcv", 1 << 20, False, 'data.loader.order = "block" reads faster'),
    ("block", "dali", 1 << 30, True, "; block order"),
    ("native", "dali", 1 << 20, False, ""),
])  # fmt: skip
def test_the_plan_is_blocks_where_memory_is_short(synthetic_store, wanted, backend, memory, blocks, said):
    found, larger, why = choose_order(LoaderConfig(order=wanted), backend, synthetic_store, 2_000, memory)
    assert (found is not None) is blocks
    assert larger is (backend != "resident" and memory <= 7 << 20)
    assert why.endswith(said) if said else why == ""


@pytest.mark.parametrize(("wanted", "begun", "memory", "blocks", "said"), [
    ("plan", "block", 1 << 30, True, "; block order: as the run began"),
    ("plan", "block", 7 << 20, True, "; block order: 6 MiB of images exceed 80% of 7 MiB of memory"),
    ("plan", "random", 7 << 20, False, ""),
    ("random", "block", 1 << 30, False, ""),
])  # fmt: skip
def test_the_plan_stays_what_it_has_become(synthetic_store, wanted, begun, memory, blocks, said):
    for backend in ("resident", "torchvision"):
        found, _, why = choose_order(LoaderConfig(order=wanted), backend, synthetic_store, 2_000, memory, begun)
        assert (found is not None) is blocks
        assert why == (said if backend != "resident" or not blocks else "; block order: as the run began")


def test_an_order_that_is_decided_on_is_the_loaders_wherever_it_is_made(synthetic_store, monkeypatch):
    """What is streamed in blocks where little memory is free would be resident, in random order, where more is."""
    monkeypatch.setattr(Blocks, "of", classmethod(lambda cls, shape: cls(30, 4)))
    settings, config = {"device": CPU, "memory_bytes": 7 << 20}, LoaderConfig(workers=1)
    for free, decided in ((1 << 40, "random"), (7 << 20, "block")):
        monkeypatch.setattr(loaders, "free_memory", lambda device, free=free: free)
        assert decide_order(config, synthetic_store, 2_000, **settings) == decided
    assert decide_order(LoaderConfig(order="random"), synthetic_store, 2_000, **settings) == "random"
    monkeypatch.setattr(loaders, "free_memory", lambda device: 1 << 40)
    for begun, blocks in (("block", Blocks(30, 4)), ("random", None)):
        loader = build_loader(config, synthetic_store, None, seed=3, batch_size=100, drop_last=False, begun=begun,
                              **settings)  # fmt: skip
        assert loader.name == "resident"
        visited = np.concatenate([batch.indices.numpy() for batch in loader.epoch(1)])
        assert np.array_equal(visited, EpochOrder(np.arange(2_000), 3, 100, False, blocks=blocks).rows_of(1))
        loader.close()


def test_the_text_of_the_plan_names_the_share_of_memory_that_the_code_takes():
    assert f"larger than {loaders.HELD:.0%} of the memory" in " ".join((LoaderConfig.__doc__ or "").split())


def test_files_are_read_ahead(tmp_path, synthetic_store, monkeypatch):
    """The ranges that the kernel is asked for are those of the samples, in every format."""
    for to in ("raw", "ffcv", "dali"):
        store, asked = store_as(synthetic_store, to), []
        monkeypatch.setattr(os, "posix_fadvise", lambda f, start, size, advice, a=asked: a.append((start, size)))
        images, true = store.split("train").images, synthetic_store.split("train").images
        pixels.will_need(images, 300, 400)
        path = next(store.root / n for n in store.manifest.files if n.startswith("train") and not n.endswith(".idx")
                    and "labels" not in n)  # fmt: skip
        content = b"".join(path.read_bytes()[start : start + size] for start, size in asked)
        assert content.startswith(true[300].tobytes())
        assert content.endswith(true[399].tobytes())
        assert len(content) < 100 * 3_072 * 1.9
