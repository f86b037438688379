"""The random integers, against the known answers of Random123 and across their three implementations."""

import numpy as np
import pytest
import torch

from fastcifar.kernels.philox import epoch_order, philox, philox_scalar

# philox4x32-10 of Random123's kat_vectors: counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    seed = key[0] | key[1] << 32
    words = philox(seed, torch.tensor([counter[0]]), counter[1], counter[2], counter[3])
    assert [int(w) for w in words] == result
    assert [int(w) for w in philox_scalar(*map(np.uint64, (*key, *counter)))] == result


def test_numba_equals_torch_on_random_counters(rng):
    counters = rng.integers(0, 2**32, (200, 4))
    seed = int(rng.integers(0, 2**63))
    index, epoch, block = (torch.from_numpy(counters[:, i].copy()) for i in range(3))
    words = torch.stack(philox(seed, index, epoch, block, 5)).T.tolist()
    for row, expected in zip(counters, words, strict=True):
        key = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
        assert [int(w) for w in philox_scalar(*key, *map(np.uint64, (*row[:3], 5)))] == expected


def test_epoch_order_is_a_new_permutation_each_epoch():
    first, second = epoch_order(5000, 3, 0), epoch_order(5000, 3, 1)
    assert first.sort().values.tolist() == list(range(5000))
    # A random permutation has one fixed point on average (Poisson): more than 12 has probability below 1e-10.
    assert int((first == second).sum()) <= 12
    assert int((first == torch.arange(5000)).sum()) <= 12
