"""The way to a GPU: the same batches, on the device, each in memory of its own, handed over between streams."""

import numpy as np
import pytest
import torch

from fastcifar.config.schema import LoaderConfig
from fastcifar.data import loaders
from fastcifar.data.loaders import build_loader, choose_backend
from fastcifar.data.loaders.streaming import HostBatch, to_device

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def build(store, name, order="plan", device=CUDA):
    if name in ("ffcv", "dali") and not loaders._installed({"ffcv": "ffcv", "dali": "nvidia.dali"}[name]):
        pytest.skip(f"{name} is not installed")
    config = LoaderConfig(name=name, workers=2, order=order)
    return build_loader(config, store, None, seed=3, batch_size=96, drop_last=False, device=device)


@pytest.mark.parametrize("name", ["resident", "ffcv", "dali", "torchvision"])
def test_same_batches_as_on_the_cpu(synthetic_store, name):
    loader = build(synthetic_store, name)
    reference = build(synthetic_store, "resident", device=torch.device("cpu"))
    batches = list(loader.epoch(1))
    assert len(batches) == len(loader) == 21
    for ours, true in zip(batches, reference.epoch(1), strict=True):
        assert {t.device for t in ours.tensors()} == {CUDA}
        assert torch.equal(ours.gathered().cpu(), true.gathered())
        assert torch.equal(ours.labels.cpu(), true.labels)
        assert torch.equal(ours.indices.cpu(), true.indices)
    loader.close()


@pytest.mark.parametrize(
    ("name", "order"), [("ffcv", "plan"), ("dali", "plan"), ("dali", "native"), ("torchvision", "plan")]
)
def test_consumer_on_a_busy_stream_of_its_own(synthetic_store, name, order):
    """The consumer lags far behind the host; every batch must still hold its own pixels when it gets there."""
    true, sums, indices = synthetic_store.split("train"), [], []
    stream = torch.cuda.Stream(CUDA)
    loader = build(synthetic_store, name, order)
    with torch.cuda.stream(stream):
        for epoch in range(2):  # DALI's pipeline of its own order lives on, and reads ahead into the second
            for batch in loader.epoch(epoch):
                torch.cuda._sleep(2_000_000)
                sums.append(batch.gathered().long().sum(dim=(1, 2, 3)))
                indices.append(batch.indices)
    torch.cuda.synchronize()
    found = torch.cat(sums).cpu().numpy()
    expected = true.images[torch.cat(indices).cpu().numpy()].reshape(len(found), -1).sum(1, dtype=np.int64)
    assert np.array_equal(found, expected)
    loader.close()


def test_copies_do_not_wait_for_the_device():
    """Handing over twenty batches returns while the consumer's stream is still asleep."""
    batches = [
        HostBatch(torch.full((64, 32, 32, 3), k, dtype=torch.uint8), torch.zeros(64).long(), torch.zeros(64).long())
        for k in range(20)
    ]
    for batch in to_device(iter(batches), CUDA):  # fills the allocators' caches, and loads the kernels
        batch.images.float().mean()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    means = [batch.images.float().mean() for batch in to_device(iter(batches), CUDA)]
    assert not torch.cuda.current_stream().query()
    assert [round(float(m)) for m in means] == list(range(20))


def test_native_order_covers_the_set(synthetic_store):
    batches = list(build(synthetic_store, "dali", "native").epoch(0))
    assert sorted(torch.cat([b.indices for b in batches]).tolist()) == list(range(2000))


def test_what_does_not_fit_streams(synthetic_store, monkeypatch):
    monkeypatch.setattr("fastcifar.data.loaders.free_memory", lambda device: 1000)
    name, reason = choose_backend(LoaderConfig(name="resident"), synthetic_store, 2000, CUDA)
    assert name != "resident"
    assert "resident does not fit" in reason
