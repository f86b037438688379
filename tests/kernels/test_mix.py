"""The kernels of CutMix and Mixup on sm_90 and on a GPU; test_interpreted.py has their values."""

import pytest
import torch

from fastcifar.kernels.mix import MixSettings, MixTables, reference, triton
from tests.kernels.sm90 import compile_for_sm90, resources

POINTERS = {"partner": "*i64", "epoch_at": "*i64", "step_at": "*i64", "labels": "*i64", "labels_b": "*i64"}
POINTERS |= {"images": "*bf16", "out": "*bf16", "lam": "*fp32", "quantiles": "*fp64", "seed_at": "*i64"}
POINTERS |= {"p_word": "fp32", "cutmix_word": "fp32", "first_step": "fp32"}


@pytest.mark.parametrize("per_sample", [True, False])
def test_mixing_compiles_for_sm90_without_spills(per_sample: bool) -> None:
    constants = {"PER_SAMPLE": per_sample, "C": 3, "H": 32, "W": 32, "BLOCK": 4096}
    used = resources(compile_for_sm90(triton.mix_kernel, constants, POINTERS, 8))
    assert used["LOCAL"] == used["STACK"] == 0


def test_the_permutation_compiles_for_sm90_without_spills() -> None:
    constants = {"ROUNDS": 1, "TILE": triton.TILE, "CHUNK": triton.CHUNK}
    used = resources(compile_for_sm90(triton.partner_kernel, constants, POINTERS, 4))
    assert used["LOCAL"] == used["STACK"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("per_sample", [True, False])
def test_the_gpu_mixes_the_same_bits(per_sample: bool) -> None:
    settings = MixSettings(42, 0.8, 0.5, 0.0, 10, per_sample)
    images = torch.randn(128, 3, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last)
    labels, tables = torch.randint(0, 10, (128,)), MixTables.of(42, torch.linspace(0, 1, 65536, dtype=torch.float64))
    for step in range(10):
        given = [images, labels, torch.tensor([1]), torch.tensor([step])]
        ours, target = triton.mix_batch(*(t.cuda() for t in given), settings, tables.to(torch.device("cuda")))
        expected, wanted = reference.mix_batch(*given, settings, tables)
        assert torch.equal(ours.cpu(), expected)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(target, wanted, strict=True))
