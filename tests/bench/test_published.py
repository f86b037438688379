"""``benchmarks/published.py``: what is drawn from a seed, against torch's own loader and layers."""

import random
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import published  # noqa: E402  # beside the other benchmarks, which are scripts

CONVOLUTIONS = ((3, 32), (32, 64), (64, 128), (128, 128), (128, 256))
LINEAR = ((4096, 512), (512, 256), (256, 128), (128, 10))


def test_the_deep_baseline_has_the_weights_of_a_program_that_shuffles_and_makes_a_lenet_before_it():
    seed = random.randrange(2**31)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = published.deep_baseline().state_dict()
        torch.manual_seed(seed)
        next(iter(DataLoader(TensorDataset(torch.arange(100)), 16, shuffle=True)))
        # A LeNet-5, layer by layer, which nobody keeps.
        _ = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        layers = [nn.Conv2d(*shape, 3, padding=1) for shape in CONVOLUTIONS]
        layers += [nn.Linear(*shape) for shape in LINEAR]
    expected = [tensor for layer in layers for tensor in layer.state_dict().values()]
    assert len(found) == len(expected) == 18
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.values(), expected, strict=True))
