"""The CPU kernel against torchvision on PIL images: equal on every byte."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, RandAugment, TrivialAugmentWide
from torchvision.transforms import functional as F

from fastcifar.augment.augment import Augment, build_augment, linear_form, normal_table
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch
from fastcifar.kernels.augment.decisions import Program, build_program, rotate_angle
from fastcifar.kernels.augment.policy import magnitudes, operation_row, rotation_params, step_row
from fastcifar.kernels.augment.reference import apply
from fastcifar.kernels.augment.reference import augment as augment_by_pil
from tests.forked import CONTEXT
from tests.kernels.augment import three_threads

BYTES = torch.arange(256, dtype=torch.float32).repeat(3, 1)
CIFAR_SPACE = AutoAugment(AutoAugmentPolicy.CIFAR10)._augmentation_space(10, (32, 32))
SPACES = {
    "autoaugment": (CIFAR_SPACE, 10, False),
    "randaugment": (RandAugment()._augmentation_space(31, (32, 32)), 31, False),
    "trivialaugment": (TrivialAugmentWide()._augmentation_space(31), 31, True),
}


def batch_of(images):
    rows = torch.arange(len(images))
    return Batch(torch.from_numpy(images), rows, rows, rows)


def run_row(row, images):
    """uint8 (N, H, W, 3) -> uint8: one step on every image."""
    table = np.array([step_row(0), row], np.int32)
    program = Program(np.array([[1, 1, 1, 0, 0, 0, 0, 0]], np.int32), table)
    augment = Augment(program, BYTES, images.shape[1:], 0)
    return augment(batch_of(images), 0).permute(0, 2, 3, 1).to(torch.uint8).numpy()


def noise(rng, count, height=32, width=32):
    images = rng.integers(0, 256, (count, height, width, 3), np.uint8)
    images[0] = 128  # one value: histogram steps change nothing
    images[1] = np.where(images[1] > 200, 255, 3)  # two values
    images[2] = images[2] // 8 + 100  # a narrow range
    images[3, :-1] = 7  # nearly one value
    return images


def check(images, name, magnitude):
    height, width = images.shape[1:3]
    got = run_row(operation_row(name, magnitude, height, width), images)
    want = np.stack([np.array(apply(Image.fromarray(i), name, magnitude)) for i in images])
    np.testing.assert_array_equal(got, want, err_msg=f"{name} {magnitude}")


def all_magnitudes(space):
    """Every (operation, magnitude) of a space, both signs."""
    for name, (values, has_sign) in SPACES[space][0].items():
        for value in values.flatten().tolist():
            yield name, value
            if has_sign and value:
                yield name, -value


@pytest.mark.parametrize("space", SPACES)
def test_every_operation_at_every_magnitude_on_noise(rng, space):
    images = noise(rng, 12)
    for name, magnitude in all_magnitudes(space):
        check(images, name, magnitude)


@pytest.mark.real
def test_every_operation_of_the_policy_on_real_images(rng, real_images):
    """Each at every magnitude on images of its own; the reference takes most of the time."""
    for name, magnitude in all_magnitudes("autoaugment"):
        check(real_images[rng.choice(len(real_images), 50, replace=False)], name, magnitude)


@pytest.mark.parametrize("space", SPACES)
def test_magnitudes_are_torchvisions(space):
    values, bins, wide = SPACES[space]
    for name, (expected, _) in values.items():
        if expected.ndim:
            assert magnitudes(name, bins, 32, 32, wide) == expected.tolist(), name


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (17, 9)])
def test_rotations(rng, size):
    images = noise(rng, 4, *size)
    for k in rng.integers(0, 4096, 60).tolist():
        angle = rotate_angle(15.0, k)
        got = run_row(step_row(3, *rotation_params(angle, *size)), images)
        want = np.stack([np.array(F.rotate(Image.fromarray(i), angle)) for i in images])
        np.testing.assert_array_equal(got, want, err_msg=str(angle))


@pytest.mark.parametrize("size", [(24, 40), (17, 9)])
def test_operations_on_other_sizes(rng, size):
    images = noise(rng, 6, *size)
    for name, (values, _) in AutoAugment(AutoAugmentPolicy.CIFAR10)._augmentation_space(10, size).items():
        check(images, name, float(values.flatten()[-1]))


LISTS = [
    ["crop(4)", "flip", "rotate(15)"],
    ["crop(4)", "flip", "autoaugment", "cutout(16, p=0.5)"],
    ["flip", "crop(3)", "crop(2)", "trivialaugment", "flip(0.3)", "cutout(7, p=0.7, holes=3)"],
    ["randaugment(3, 14)", "rotate(180)", "autoaugment"],
    ["rotate(30)", "flip", "crop", "rotate(5)"],
    ["cutout(8)", "crop(4)"],
    ["crop(2, pad='reflect')", "flip(alternate=true)", "cutout(7, inside=true)"],
    ["flip(0.3, alternate=true)", "crop(8, pad='reflect')", "rotate(90)", "crop(3, pad='reflect')", "flip"],
    ["crop(3)", "crop(2, pad='reflect')", "rotate(40)"],
    ["erase(0.8, fill='black')", "flip", "erase(0.5, 0.1, 0.2)", "autoaugment"],
]


def test_cutout_in_the_mean_colour(rng):
    images, ops = noise(rng, 50), AugmentConfig(ops=["cutout(9, fill='mean', p=0.8, holes=2)"]).ops
    mean, seed = rng.uniform(0, 1, 3).tolist(), 11
    program = build_program(ops, 32, 32, mean)
    augment = Augment(program, BYTES, (32, 32, 3), seed)
    got = augment(batch_of(images), 2).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    decisions = augment.decisions(np.arange(50), 2)
    want = [augment_by_pil(i, ops, program, p, mean) for i, p in zip(images, decisions, strict=True)]
    np.testing.assert_array_equal(got, np.stack(want), err_msg=f"mean {mean}")


def test_reflection_is_numpys(rng):
    image = noise(rng, 5)[4:]
    for dy, dx in rng.integers(-31, 32, (40, 2)).tolist():
        padded = np.pad(image[0], ((31, 31), (31, 31), (0, 0)), mode="reflect")
        want = padded[31 + dy : 63 + dy, 31 + dx : 63 + dx]
        np.testing.assert_array_equal(run_row(step_row(1, dy, dx, 1), image)[0], want, err_msg=f"{dy} {dx}")


def whole_lists(rng, images, ops):
    config = AugmentConfig(ops=ops)
    seed = int(rng.integers(0, 2**63))
    options = {"mean": [0.0] * 3, "std": [1.0] * 3, "image_shape": images.shape[1:], "seed": seed}
    augment = build_augment(config, device=torch.device("cpu"), dtype=torch.float32, **options)
    got = augment(batch_of(images), 7).permute(0, 2, 3, 1).numpy()
    decisions = augment.decisions(np.arange(len(images)), 7)
    want = [augment_by_pil(i, config.ops, augment.program, p) for i, p in zip(images, decisions, strict=True)]
    np.testing.assert_array_equal(got, np.stack(want).astype(np.float32) / np.float32(255), err_msg=f"seed {seed}")


@pytest.mark.parametrize("ops", LISTS, ids=" ".join)
def test_whole_lists_on_noise(rng, ops):
    whole_lists(rng, noise(rng, 300), ops)


@pytest.mark.parametrize("size", [(24, 40), (17, 9)])
@pytest.mark.parametrize("ops", [["crop(4)", "flip", "autoaugment", "cutout(9, p=0.5)"], *LISTS[6:8]], ids=" ".join)
def test_whole_lists_on_other_sizes(rng, size, ops):
    whole_lists(rng, noise(rng, 100, *size), ops)


@pytest.mark.real
@pytest.mark.parametrize("ops", LISTS[:3], ids=" ".join)
def test_whole_lists_on_real_images(rng, real_images, ops):
    whole_lists(rng, real_images[rng.choice(len(real_images), 2000, replace=False)], ops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalization_is_torchvisions(rng, dtype):
    images = noise(rng, 8)
    mean, std = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
    augment = build_augment(
        AugmentConfig(ops=["crop"]), mean=mean, std=std, image_shape=(32, 32, 3), seed=0,
        device=torch.device("cpu"), dtype=dtype,
    )  # fmt: skip
    got = augment.plain(torch.from_numpy(images))
    want = torch.stack([F.normalize(F.to_tensor(Image.fromarray(i)), mean, std) for i in images]).to(dtype)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("mean", "std"), [([0.5] * 3, [0.5] * 3), ([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616])])
def test_usual_normalizations_are_linear(mean, std):
    """So that the fast path is taken; were it wrong, `test_normalization_is_torchvisions` would fail."""
    center, scale = linear_form(normal_table(mean, std, torch.bfloat16), mean, std, 32)
    assert center.shape == scale.shape == (96,)


LINEAR = ([0.5] * 3, [0.5] * 3)
NOT_LINEAR = ([0.45, 0.5, 0.55], [0.25] * 3)  # 0.45: one of the 768 values rounds the other way


@pytest.mark.parametrize(("given", "is_linear"), [(LINEAR, True), (NOT_LINEAR, False)])
def test_normalization_by_table_where_it_is_not_linear(rng, given, is_linear):
    assert (len(linear_form(normal_table(*given, torch.bfloat16), *given, 32)[0]) > 0) == is_linear
    images, byte = noise(rng, 4), np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    drawn = [(rng.uniform(0, 1, 3).tolist(), rng.uniform(0.1, 1, 3).tolist()) for _ in range(30)]
    for mean, std in [given, *drawn]:
        augment = build_augment(
            AugmentConfig(), mean=mean, std=std, image_shape=(32, 32, 3), seed=0,
            device=torch.device("cpu"), dtype=torch.bfloat16,
        )  # fmt: skip
        normal = torch.from_numpy((byte - np.float32(mean)) / np.float32(std)).bfloat16()
        want = normal[torch.from_numpy(images).long(), torch.arange(3)]
        assert torch.equal(augment.plain(torch.from_numpy(images)).permute(0, 2, 3, 1), want), (mean, std)


def test_a_batch_on_one_thread_equals_a_batch_on_several(rng):
    images = noise(rng, 300)
    augment = build_augment(
        AugmentConfig(ops=LISTS[1]), mean=[0.5] * 3, std=[0.5] * 3, image_shape=(32, 32, 3), seed=3,
        device=torch.device("cpu"), dtype=torch.bfloat16,
    )  # fmt: skip
    whole = batch_of(images)
    parts = [augment(Batch(whole.images, rows, rows, rows), 5) for rows in whole.rows.split([1, 63, 64, 17, 155])]
    assert torch.equal(torch.cat(parts), augment(whole, 5))


def test_augmenting_leaves_torchs_number_of_threads_alone():
    """The first parallel call of a process would set it, and a resumed run would differ in its last bits."""
    process = CONTEXT.Process(target=three_threads.main)
    process.start()
    process.join()
    assert process.exitcode == 0
