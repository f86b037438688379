"""What the augmentation refuses: a compiled kernel that reads where no image is would end the process."""

import pytest
import torch

from fastcifar.augment.augment import Augment, build_augment
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch


@pytest.fixture(scope="module")
def augment() -> Augment:
    config = AugmentConfig(ops=["crop(2)", "flip"])
    return build_augment(
        config, mean=[0.5] * 3, std=[0.5] * 3, image_shape=(8, 9, 3), seed=1, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip


def batch(images: torch.Tensor, rows: list[int]) -> Batch:
    row = torch.tensor(rows)
    return Batch(images, row, torch.zeros_like(row), torch.arange(len(rows)))


@pytest.mark.parametrize("rows", [[0, 1, 4], [-1, 0], [2**40], [0]])
def test_rows_beyond_the_images_are_refused(augment, rows):
    images = torch.zeros((0 if rows == [0] else 4, 8, 9, 3), dtype=torch.uint8)
    with pytest.raises(IndexError, match=rf"rows {min(rows)} to {max(rows)} of {len(images)} images"):
        augment(batch(images, rows), 0)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 9, 8, 3), torch.uint8), ((4, 8, 9, 1), torch.uint8), ((4, 8, 9, 3), torch.int8)]
)
def test_images_of_another_shape_or_type_are_refused(augment, shape, dtype):
    with pytest.raises(ValueError, match=r"8x9x3"):
        augment(batch(torch.zeros(shape, dtype=dtype), [0]), 0)


def test_an_empty_batch_and_the_last_row_are_fine(augment):
    images = torch.zeros((4, 8, 9, 3), dtype=torch.uint8)
    assert len(augment(batch(images, [3, 0]), 0)) == 2
    assert len(augment(Batch(images, *(torch.zeros(0, dtype=torch.int64),) * 3), 0)) == 0
