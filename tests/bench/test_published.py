"""``benchmarks/published.py``: what it draws from a seed, against torch's own loader and layers."""

import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import published  # noqa: E402


def lenet5_layers() -> list[nn.Module]:
    return [nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)]


def deep_layers(first: int, last: int) -> list[nn.Module]:
    """Five convolutions, the first of so many outputs, and four linear layers, the last of so many inputs."""
    convolutions = [
        (3, first),
        (first, 2 * first),
        (2 * first, 4 * first),
        (4 * first, 4 * first),
        (4 * first, 8 * first),
    ]
    linear = [(16 * 8 * first, 4 * last), (4 * last, 2 * last), (2 * last, last), (last, 10)]
    return [*(nn.Conv2d(*widths, 3, padding=1) for widths in convolutions), *(nn.Linear(*widths) for widths in linear)]


def deep_baseline_layers(narrow_before: bool) -> list[nn.Module]:
    lenet5_layers()
    if narrow_before:
        deep_layers(16, 64)
    return deep_layers(32, 128)


def check_weights(build, layers):
    seed = random.randrange(2**31)
    before = torch.get_rng_state()
    found = list(build(weights_seed=seed).state_dict().values())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(seed)
    next(iter(DataLoader(TensorDataset(torch.arange(100)), 16, shuffle=True)))
    expected = [tensor for layer in layers() for tensor in layer.state_dict().values()]
    assert len(found) == len(expected) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_lenet5_has_the_weights_of_a_program_that_shuffles_before_it():
    check_weights(published.lenet5, lenet5_layers)


@pytest.mark.parametrize("narrow_before", [True, False])
def test_the_deep_baseline_has_the_weights_of_a_program_that_makes_other_nets_before_it(narrow_before):
    build = partial(published.deep_baseline, narrow_before=narrow_before)
    check_weights(build, partial(deep_baseline_layers, narrow_before))
