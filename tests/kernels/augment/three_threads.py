"""Executed by test_exact.py in a process in which nothing has run in parallel yet: one batch on three threads."""

import sys

import torch

from fastcifar.augment.augment import build_augment
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch


def main() -> None:
    """Exit with status 0 where torch still has its three threads after the batch."""
    torch.set_num_threads(3)
    augment = build_augment(
        AugmentConfig(ops=["crop"]), mean=[0.5] * 3, std=[0.5] * 3, image_shape=(32, 32, 3), seed=3,
        device=torch.device("cpu"), dtype=torch.bfloat16,
    )  # fmt: skip
    rows = torch.arange(300)
    augment(Batch(torch.randint(0, 256, (300, 32, 32, 3), dtype=torch.uint8), rows, rows, rows), 0)
    sys.exit(torch.get_num_threads() != 3)
