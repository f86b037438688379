"""In Triton's interpreter: the GPU kernel's decisions and images equal the CPU kernel's."""

import torch

from fastcifar.augment.augment import Augment, GpuAugment, build_augment, normal_table
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch
from fastcifar.kernels.augment import triton as gpu
from fastcifar.kernels.augment.decisions import Program
from fastcifar.kernels.augment.policy import operation_row, step_row

CPU = torch.device("cpu")
found: list[tuple[str, float, float]] = []
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
CASES: dict[str, tuple[list[str], tuple[int, int], torch.dtype, int]] = {
    "standard": (["crop(4)", "flip", "rotate(15)"], (32, 32), torch.bfloat16, 3),
    "autoaugment": (["crop(4)", "flip", "autoaugment", "cutout(16, p=0.5)", "erase(0.7)"], (32, 32), torch.float32, 6),
    "mixture": (["flip", "crop(3)", "crop", "trivialaugment", "cutout(5, holes=2)"], (32, 32), torch.float16, 4),
    "airbench": (
        ["crop(2, pad='reflect')", "flip(alternate=true)", "cutout(12, fill='mean', inside=true)"],
        (32, 32), torch.float32, 3,
    ),
    "reflected": (
        ["flip(0.3, alternate=true)", "crop(8, pad='reflect')", "rotate(90)", "crop(3, pad='reflect')", "flip"],
        (9, 17), torch.bfloat16, 4,
    ),
    "other_size": (["crop(2)", "randaugment(2, 20)", "rotate(90)"], (9, 17), torch.bfloat16, 5),
}  # fmt: skip


def compare(ops, size, dtype, count):
    images = torch.randint(0, 256, (count + 3, *size, 3), dtype=torch.uint8)
    images[0] = 77
    rows, index = torch.randperm(count + 3)[:count], torch.randint(0, 2**32, (count,))
    seed = int(torch.randint(0, 2**62, ()))
    options = {"mean": MEAN, "std": STD, "image_shape": (*size, 3), "seed": seed, "device": CPU, "dtype": dtype}
    augment = build_augment(AugmentConfig(ops=ops), **options)
    gpu_augment = GpuAugment(augment.program, normal_table(MEAN, STD, dtype), (*size, 3), seed, CPU)
    batch = Batch(images, rows, index, index)
    decisions = gpu.decide_on_device(index, torch.tensor([9]), gpu_augment._tables)
    check(torch.equal(decisions, torch.from_numpy(augment.decisions(index.numpy(), 9))), f"decisions of {ops}, {seed}")
    even = gpu.decide_on_device(index, torch.tensor([4]), gpu_augment._tables)
    check(torch.equal(even, torch.from_numpy(augment.decisions(index.numpy(), 4))), f"epoch 4 of {ops}, {seed}")
    check(torch.equal(gpu_augment(batch, torch.tensor(9)), augment(batch, 9)), f"images of {ops}, seed {seed}")
    two = Batch(images, rows[:2], index[:2], index[:2])
    check(torch.equal(gpu_augment(two, 10), augment(two, 10)), f"images of another epoch, seed {seed}")
    check(torch.equal(gpu_augment.plain(images[:2]), augment.plain(images[:2])), "normalization")


def operations():
    """Every operation once, on noise, a narrow range and a flat image."""
    rows = [step_row(0)]
    for name, value in {
        "ShearX": 0.2, "ShearY": -0.3, "TranslateX": 9.0, "TranslateY": -14.0, "Rotate": 17.0, "Brightness": 0.7,
        "Color": -0.9, "Contrast": 0.6, "Sharpness": 0.9, "Posterize": 5.0, "Solarize": 113.3, "AutoContrast": 0.0,
        "Equalize": 0.0, "Invert": 0.0,
    }.items():  # fmt: skip
        rows.append(operation_row(name, value, 32, 32))
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    images[1], images[2] = images[1] // 5 + 90, 200
    index = torch.arange(3)
    for number, row in enumerate(rows):
        table = torch.tensor([rows[0], row], dtype=torch.int32).numpy()
        program = Program(torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.int32).numpy(), table)
        normal = normal_table(MEAN, STD, torch.float32)
        batch = Batch(images, index, index, index)
        cpu = Augment(program, normal, (32, 32, 3), 0)(batch, 0)
        check(torch.equal(GpuAugment(program, normal, (32, 32, 3), 0, CPU)(batch, 0), cpu), f"step {number}")


def check(same, what):
    found.append((what, float(not same), 0.0))


def main() -> list[tuple[str, float, float]]:
    """Return what differs from numba's kernel."""
    for case in CASES.values():
        compare(*case)
    operations()
    return found
