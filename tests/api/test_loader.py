"""`fastcifar.Loader` and `fastcifar.augment.Augmentation`: what training sees, in somebody else's loop."""

import inspect

import numpy as np
import pytest
import torch

import fastcifar
from fastcifar.augment.augment import build_augment
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch
from fastcifar.errors import UserError

OPS = ["crop(4)", "flip", "autoaugment"]


def epoch_of(**options):
    loader = fastcifar.Loader("synthetic", device="cpu", subset=200, batch_size=64, **options)
    images, labels = zip(*loader, strict=True)
    loader.close()
    return torch.cat(images), torch.cat(labels)


def test_an_epoch_is_the_runs_own(synthetic_store, seed):
    """Against the pieces that `fastcifar.train.run` puts together."""
    from fastcifar.data.loaders import EpochOrder

    loader = fastcifar.Loader("synthetic", device="cpu", augment=OPS, batch_size=500, seed=seed)
    loader.epoch = 3
    images, labels = next(iter(loader))
    rows = EpochOrder(np.arange(2000), seed, 500, False).rows_of(3)[:500]
    split = synthetic_store.split("train")
    assert np.array_equal(labels.numpy(), split.labels[rows])
    augment = build_augment(
        AugmentConfig(ops=OPS), mean=[0.5] * 3, std=[0.5] * 3, image_shape=(32, 32, 3), seed=seed,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    indices = torch.from_numpy(rows)
    expected = augment(Batch(torch.from_numpy(np.array(split.images)), indices, labels, indices), 3)
    assert torch.equal(images, expected)
    assert loader.epoch == 4
    assert len(loader) == 4


def test_every_backend_gives_the_same_epoch(seed):
    reference = epoch_of(augment=OPS, seed=seed, backend="resident")
    found = epoch_of(augment=OPS, seed=seed, backend="torchvision", workers=1)
    assert all(torch.equal(a, b) for a, b in zip(reference, found, strict=True))
    assert len(reference[1]) == 200


def test_an_epoch_in_the_order_that_was_asked_for(synthetic_store, seed, monkeypatch):
    from fastcifar.data.loaders.base import Blocks, EpochOrder

    monkeypatch.setattr(Blocks, "of", classmethod(lambda cls, shape: cls(30, 4)))
    labels = synthetic_store.split("train").labels
    for order, blocks in (("plan", None), ("random", None), ("block", Blocks(30, 4))):
        loader = fastcifar.Loader("synthetic", device="cpu", order=order, batch_size=512, seed=seed)
        rows = EpochOrder(np.arange(2000), seed, 512, False, blocks=blocks).rows_of(0)
        assert np.array_equal(torch.cat([batch[1] for batch in loader]), labels[rows])
        assert loader.backend.endswith("; block order") is (order == "block")


def test_dalis_order_is_reached_from_python(synthetic_store, seed):
    pytest.importorskip("nvidia.dali.pipeline")
    loader = fastcifar.Loader("synthetic", device="cpu", backend="dali", order="native", batch_size=500, seed=seed)
    first, second = (torch.cat([batch[1] for batch in loader]) for _ in range(2))
    assert torch.equal(first.bincount(), second.bincount())
    assert not torch.equal(first, second)
    loader.epoch = 1
    assert torch.equal(torch.cat([batch[1] for batch in loader]), second)
    loader.close()


def test_epochs_differ_and_come_again():
    loader = fastcifar.Loader("synthetic", device="cpu", augment=OPS, subset=100, batch_size=100)
    first, second = next(iter(loader)), next(iter(loader))
    assert not torch.equal(first[0], second[0])
    loader.epoch = 0
    assert torch.equal(next(iter(loader))[0], first[0])


def test_test_images_come_in_order_and_are_normalized_only(synthetic_store):
    loader = fastcifar.Loader("synthetic", split="test", device="cpu", batch_size=300, augment=OPS)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    split = synthetic_store.split("test")
    assert np.array_equal(labels.numpy(), split.labels)
    expected = torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(images, expected)
    assert loader.samples == len(labels)


def test_the_augmentation_alone(rng):
    pixels = torch.from_numpy(rng.integers(0, 256, (20, 32, 32, 3), np.uint8))
    augment = fastcifar.augment.Augmentation(OPS, seed=3)
    again = fastcifar.augment.Augmentation(OPS, seed=3)
    first, second = augment(pixels), augment(pixels)
    assert first.shape == (20, 3, 32, 32)
    assert not torch.equal(first, second), "each call draws anew"
    assert torch.equal(again(pixels, epoch=1), second)
    few = again(pixels[5:7], indices=torch.tensor([5, 6]), epoch=0)
    assert torch.equal(few, first[5:7])
    torch.testing.assert_close(augment.plain(pixels), pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)


@pytest.mark.parametrize("indices", [torch.arange(3), torch.arange(4.0), torch.arange(4).int(), [0, 1, 2, 3]])
def test_indices_of_another_shape_or_type_are_refused(indices):
    with pytest.raises(UserError, match=r"indices are .*: give int64 \(4,\), one for each image"):
        fastcifar.augment.Augmentation(OPS)(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), indices=indices)


@pytest.mark.parametrize("images", [torch.zeros(4, 3, 32, 32), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)])
def test_normalized_images_or_another_layout_are_refused(images):
    augment = fastcifar.augment.Augmentation(OPS)
    for use in (augment, augment.plain):
        with pytest.raises(UserError, match=r"\(4, 3, 32, 32\): give uint8 pixels \(B, H, W, 3\)"):
            use(images)


def test_what_is_no_tensor_is_called_so(rng):
    with pytest.raises(UserError, match=r"images are a ndarray: give a tensor, such as torch.from_numpy\(images\)"):
        fastcifar.augment.Augmentation(OPS)(rng.integers(0, 256, (4, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"std: 0\.0: Input should be greater than 0"):
        fastcifar.augment.Augmentation(OPS, std=(0.2, 0.0, 0.2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size: 0: Input should be greater than or equal to 1"),
        ({"batch_size": "64"}, "batch_size: '64': Input should be a valid integer"),
        ({"batch_size": 500.0}, "batch_size: 500.0: Input should be a valid integer"),
        ({"seed": -1}, "seed: -1: Input should be greater than or equal to 0"),
        ({"std": [0, 0, 0]}, "std: 0: Input should be greater than 0"),
        ({"mean": [0.5]}, "mean: .*at least 3"),
        ({"dtype": "float16"}, "dtype: 'float16': give one of torch.float32"),
        ({"dtype": torch.int64}, "dtype: torch.int64: give one of torch.float32"),
        ({"device": "gpu"}, "device: 'gpu': give \"auto\", \"cpu\""),
        ({"split": "test", "drop_last": True}, "drop_last: a test set is read whole"),
        ({"augment": "flip"}, r'augment: "flip" is one text; give a list of them: \["flip"\]'),
        ({"split": "valid"}, 'split: "valid"; allowed: train, test'),
        ({"backend": "tensorflow"}, "backend: 'tensorflow'.*resident, ffcv"),
        ({"order": "sorted"}, "order: 'sorted'.*allowed: plan, random, block, native"),
        ({"order": "native"}, 'order: "native" is DALI\'s own order: it needs backend="dali"'),
        ({"augment": ["crip(4)"]}, "did you mean"),
        ({"source": "imagenet"}, "source: 'imagenet'"),
        ({"device": "cuda"}, "no CUDA GPU"),
    ],
)
def test_bad_arguments_are_one_message(options, said):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=said):
        fastcifar.Loader(**{"source": "synthetic", **options})


def test_the_public_names_are_typed_and_documented():
    for name in fastcifar.__all__:
        value = getattr(fastcifar, name)
        assert name == "__version__" or value.__doc__, name
    for function in (fastcifar.load_recipe, fastcifar.Loader.__init__, fastcifar.optim.ASAM.__init__):
        hints = inspect.get_annotations(function)
        assert set(inspect.signature(function).parameters) - {"self"} <= set(hints)
    assert dir(fastcifar) == sorted(fastcifar.__all__)
