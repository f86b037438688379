"""Operations by import path: in their place among ours, on the device and in a loader's workers."""

import numpy as np
import pytest
import torch

from fastcifar.augment.augment import build_augment
from fastcifar.augment.staged import Draws
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch
from fastcifar.data.loaders.pil import augment_one, pil_transforms
from fastcifar.errors import UserError

NORMAL = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "image_shape": (32, 32, 3), "device": torch.device("cpu")}


def augmented(ops, batch, seed, epoch=3):
    return build_augment(AugmentConfig(ops=ops), seed=seed, dtype=torch.bfloat16, **NORMAL)(batch, epoch)


def a_batch(rng, count=12):
    images = torch.from_numpy(rng.integers(0, 256, (40, 32, 32, 3), np.uint8))
    rows = torch.from_numpy(rng.permutation(40)[:count])
    return Batch(images, rows, torch.zeros(count, dtype=torch.int64), rows + 1000)


@pytest.mark.parametrize("place", [0, 1, 3, 5])
def test_one_that_does_nothing_changes_nothing_wherever_it_stands(workplace, rng, seed, place):
    """Not a byte, and none of the draws, of which two operations of one kind must not share any."""
    ours = ["crop(4)", "flip(0.5)", "cutout(8)", "crop(2)", "autoaugment"]
    batch = a_batch(rng)
    expected = augmented(ours, batch, seed)
    found = augmented([*ours[:place], "theirs.ops:Nothing", *ours[place:]], batch, seed)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_it_acts_where_it_stands(workplace, rng, seed):
    batch = a_batch(rng)
    after = augmented(["theirs.ops:Grid(4, p=1.0)"], batch, seed)
    black = -torch.tensor(NORMAL["mean"]) / torch.tensor(NORMAL["std"])
    columns = (after == black.bfloat16()[None, :, None, None]).all(2).all(1)
    assert (columns.sum(1) == 8).all()
    assert len({tuple(line.tolist()) for line in columns}) > 1, "each sample has its own draw"


def test_draws_belong_to_the_sample_and_not_to_the_batch(seed):
    indices = torch.arange(5000)
    draws = Draws(seed, indices, 7, 2)
    all_at_once = draws.uniform(6)
    few = Draws(seed, indices[[40, 3]], torch.tensor([7]), 2).uniform(2, first=3)
    assert torch.equal(few, all_at_once[[40, 3], 3:5])
    assert float(all_at_once.min()) >= 0
    assert float(all_at_once.max()) < 1
    assert torch.allclose(all_at_once.mean(0), torch.full((6,), 0.5), atol=0.03)
    assert float(torch.corrcoef(all_at_once.T).fill_diagonal_(0).abs().max()) < 0.08
    dice = draws.integers(6, count=2)
    assert dice.unique().tolist() == [0, 1, 2, 3, 4, 5]
    for other in (Draws(seed + 1, indices, 7, 2), Draws(seed, indices, 8, 2), Draws(seed, indices, 7, 3)):
        assert (other.uniform(1) == all_at_once[:, :1]).float().mean() < 0.01


def test_what_is_not_bytes_of_the_same_shape_is_refused(workplace, rng, seed):
    with pytest.raises(UserError, match=r"theirs.ops:Float.* returned torch.float32 \(12, 3, 32, 32\)"):
        augmented(["theirs.ops:Float"], a_batch(rng), seed)


def in_workers(op, image):
    return augment_one(image, pil_transforms(AugmentConfig(ops=[op], where="loader").ops, 32, 32), seed=5)


def test_a_transform_of_pil_images_or_of_tensors(workplace, rng):
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    assert np.array_equal(in_workers("theirs.ops:Shadow", image), image // 2)
    assert np.array_equal(in_workers("theirs.ops:Shadow(by=4)", image), image // 4)
    assert np.array_equal(in_workers("theirs.ops:TensorShadow", image), image // 2)
    assert np.array_equal(in_workers("theirs.ops:mirror", image), image[:, ::-1])
    kept = in_workers("torchvision.transforms.v2:RandomHorizontalFlip(p=1.0)", image)
    assert np.array_equal(kept, image[:, ::-1])


def test_a_transform_that_returns_something_else_is_refused(workplace):
    with pytest.raises(UserError, match=r"theirs.ops:grey.* returned a L image of 32x32, not an RGB image"):
        in_workers("theirs.ops:grey", np.zeros((32, 32, 3), np.uint8))


def test_in_the_workers_of_the_loader(workplace, synthetic_store):
    from fastcifar.config.schema import LoaderConfig
    from fastcifar.data.loaders import build_loader

    config = AugmentConfig(ops=["theirs.ops:Shadow(by=4)"], where="loader")
    loader = build_loader(
        LoaderConfig(workers=1), synthetic_store, np.arange(64), seed=1, batch_size=64, drop_last=False,
        device=torch.device("cpu"), augment=config,
    )  # fmt: skip
    batch = next(iter(loader.epoch(0)))
    loader.close()
    assert np.array_equal(batch.images.numpy(), synthetic_store.split("train").images[batch.indices.numpy()] // 4)


def test_a_transform_that_fails_in_the_workers_is_one_message(workplace, synthetic_store):
    """Not the traceback of torch's worker within that of the main process."""
    from fastcifar.config.schema import LoaderConfig
    from fastcifar.data.loaders import build_loader

    config = AugmentConfig(ops=["theirs.ops:only_black"], where="loader")
    loader = build_loader(
        LoaderConfig(workers=1), synthetic_store, np.arange(64), seed=1, batch_size=64, drop_last=False,
        device=torch.device("cpu"), augment=config,
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        next(iter(loader.epoch(0)))
    loader.close()
    assert str(caught.value).startswith('augment: "theirs.ops:only_black"')
    assert "ValueError: too bright (ops.py, line " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
