"""Test-time augmentation against views made by numpy."""

import numpy as np
import pytest
import torch

from fastcifar.errors import UserError
from fastcifar.train.tta import tta_logits


@pytest.fixture
def model():
    """A model that sees position: linear on the flattened image."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3 * 32 * 32, 10, generator=generator, dtype=torch.float64)
    return lambda images: images.reshape(len(images), -1) @ weight


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def numpy_views(images, shifts):
    """Return every shifted view (dy, dx in -1..1, reflected border) and its mirror image, made by np.pad."""
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    views = [padded[..., 1 + dy : 33 + dy, 1 + dx : 33 + dx] for dy, dx in shifts]
    return [[torch.from_numpy(np.ascontiguousarray(v)) for v in (view, view[..., ::-1])] for view in views]


def test_none_is_the_model(model, images):
    assert torch.equal(tta_logits(model, images, "none"), model(images))


def test_flip_is_the_mean_of_two_views(model, images):
    (pair,) = numpy_views(images, [(0, 0)])
    expected = torch.stack([model(v) for v in pair]).mean(0)
    torch.testing.assert_close(tta_logits(model, images, "flip"), expected)


def test_multicrop_weighs_the_plain_view_by_half(model, images):
    pairs = numpy_views(images, [(0, 0), (1, 1), (-1, -1)])
    means = [torch.stack([model(v) for v in pair]).mean(0) for pair in pairs]
    expected = 0.5 * means[0] + 0.25 * means[1] + 0.25 * means[2]
    torch.testing.assert_close(tta_logits(model, images, "multicrop"), expected)


@pytest.mark.parametrize("kind", ["none", "flip", "multicrop"])
def test_views_in_16_bits_are_averaged_in_32(model, images, kind):
    rounded = lambda views: model(views).bfloat16()  # noqa: E731
    found = tta_logits(rounded, images, kind)
    assert found.dtype == torch.float32
    assert torch.equal(found, tta_logits(lambda views: rounded(views).float(), images, kind))


def test_flip_does_not_tell_an_image_from_its_mirror(model, images):
    torch.testing.assert_close(tta_logits(model, images, "flip"), tta_logits(model, images.flip(-1), "flip"))


def test_every_view_keeps_the_memory_order(images):
    seen = []

    def model(views):
        seen.append(views.is_contiguous(memory_format=torch.channels_last))
        return views.mean((2, 3))

    tta_logits(model, images.to(memory_format=torch.channels_last), "multicrop")
    assert seen == [True] * 6


def test_an_unknown_kind_is_refused(model, images):
    with pytest.raises(UserError, match='did you mean "flip"'):
        tta_logits(model, images, "flipp")
