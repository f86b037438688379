"""The decisions: what they depend on, and their distributions.

The statistical tests have fixed seeds, so they cannot fail by chance; each bound is the law's 99.99% quantile.
"""

import numba
import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomErasing

from fastcifar.augment.augment import build_augment
from fastcifar.config.operations import Erase, parse_op
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch
from fastcifar.errors import UserError
from fastcifar.kernels.augment.decisions import ERASE_PLACES, build_program, decide_batch, erase_shapes
from fastcifar.kernels.augment.policy import CIFAR10_POLICY, GATE_BITS, P0, autoaugment_rows

COUNT = 200_000
ALL = ["crop(4)", "flip", "rotate(15)", "autoaugment", "cutout(16, p=0.5, holes=2)", "randaugment", "trivialaugment"]


def decisions(ops, epoch=0, seed=1, count=COUNT):
    program = build_program([parse_op(op) for op in ops], 32, 32)
    return program, decide_batch(program, np.arange(count), epoch, seed)


def picks(program, chosen, slot):
    """Which choice of its slot each sample took: -1 where the gate stayed shut."""
    return np.where(chosen[:, slot] > 0, chosen[:, slot] - program.slots[slot, 0], -1)


def assert_uniform(values, choices):
    counts = np.bincount(values, minlength=choices)
    assert len(counts) == choices
    assert stats.chisquare(counts).pvalue > 1e-4


def assert_share(hits, p):
    assert abs(hits.mean() - p) <= 3.89 * np.sqrt(p * (1 - p) / len(hits)) + 2.0**-GATE_BITS


def test_crop_offsets_flip_and_angle():
    program, chosen = decisions(ALL[:3])
    assert_uniform(picks(program, chosen, 0), 81)
    assert_share(chosen[:, 1] > 0, 0.5)
    assert_uniform(picks(program, chosen, 2), 4096)


def test_sub_policies_signs_and_gates():
    program, chosen = decisions(["autoaugment"])
    for position in (0, 1):
        gates = np.array(autoaugment_rows(position, 32, 32))[:, 1] / (1 << GATE_BITS)
        taken = picks(program, chosen, position)
        expected = np.append(gates, 100 - gates.sum()) / 100 * COUNT
        counts = np.bincount(np.where(taken < 0, 100, taken), minlength=101)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-4
    both = chosen[(chosen > 0).all(1)] - program.slots[:, 0]
    np.testing.assert_array_equal(both[:, 0], both[:, 1])  # one sub-policy and one pair of signs for both


def test_gates_of_the_two_operations_are_independent():
    _, chosen = decisions(["autoaugment"])
    open_ = chosen > 0
    joint = sum(first[1] * second[1] for first, second in CIFAR10_POLICY) / 25
    assert_share(open_.all(1), joint)


def test_cutout_holes_share_a_gate_and_differ_in_place():
    program, chosen = decisions(["cutout(16, p=0.3, holes=2)"])
    open_ = chosen > 0
    assert_share(open_[:, 0], 0.3)
    np.testing.assert_array_equal(open_[:, 0], open_[:, 1])
    for hole in (0, 1):
        assert_uniform(picks(program, chosen, hole)[open_[:, hole]], 1024)
    same = picks(program, chosen, 0) == picks(program, chosen, 1)
    assert_share(same[open_[:, 0]], 1 / 1024)


def test_erase_draws_rectangles_as_torchvision_does():
    """Mean height, width and area within five standard errors, and one pixel in fifty for the shapes' finite number."""
    program, chosen = decisions(["erase(0.4)"])
    open_ = chosen[:, 0] > 0
    assert_share(open_, 0.4)
    assert_uniform(picks(program, chosen, 0)[open_] // ERASE_PLACES, len(erase_shapes(Erase(p=0.4), 32, 32)))
    top, left, bottom, right = program.table[chosen[open_, 0]][:, P0 : P0 + 4].T
    ours = np.stack([bottom - top, right - left, (bottom - top) * (right - left), top + bottom, left + right])
    torch.manual_seed(1)
    image, draw = torch.zeros(3, 32, 32), RandomErasing.get_params
    theirs = np.array([draw(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(3000)]).T
    i, j, h, w = theirs
    expected = np.stack([h, w, h * w, 2 * i + h, 2 * j + w])
    errors = expected.std(1) / np.sqrt(expected.shape[1])
    np.testing.assert_array_less(np.abs(ours.mean(1) - expected.mean(1)), 5 * errors + expected.mean(1) / 50)


def test_randaugment_and_trivialaugment_are_uniform():
    program, chosen = decisions(["randaugment(2)", "trivialaugment"])
    assert_uniform(picks(program, chosen, 0), 28)
    assert_uniform(picks(program, chosen, 0) * 28 + picks(program, chosen, 1), 784)
    assert_uniform(picks(program, chosen, 2), 868)


def test_epochs_seeds_and_neighbours_are_uncorrelated():
    _, now = decisions(["crop(4)", "rotate(15)"])
    next_epoch = decisions(["crop(4)", "rotate(15)"], epoch=1)[1]
    other_seed = decisions(["crop(4)", "rotate(15)"], seed=2)[1]
    bound = 3.89 / np.sqrt(COUNT)
    for other in (next_epoch, other_seed, np.roll(now, 1, 0)):
        for a in (0, 1):
            for b in (0, 1):
                assert abs(np.corrcoef(now[:, a], other[:, b])[0, 1]) < bound
    assert abs(np.corrcoef(now[:, 0], now[:, 1])[0, 1]) < bound


def test_adding_an_operation_changes_no_other():
    alone = {op: decisions([op], count=500) for op in ALL}
    program, together = decisions(ALL[::-1], count=500)
    slot = 0
    for op in ALL[::-1]:
        own_program, own = alone[op]
        for s in range(len(own_program.slots)):
            np.testing.assert_array_equal(picks(own_program, own, s), picks(program, together, slot + s))
        slot += len(own_program.slots)


def test_alternating_flips_turn_every_sample_in_every_second_epoch():
    even, odd, later = (decisions(["flip(0.3, alternate=true)"], epoch=e)[1][:, 0] > 0 for e in (0, 1, 6))
    assert_share(even, 0.3)
    np.testing.assert_array_equal(odd, ~even)
    np.testing.assert_array_equal(later, even)
    other_seed = decisions(["flip(0.3, alternate=true)"], seed=2)[1][:, 0] > 0
    assert abs(np.corrcoef(even, other_seed)[0, 1]) < 3.89 / np.sqrt(COUNT)
    np.testing.assert_array_equal(even, decisions(["flip(0.3)"])[1][:, 0] > 0)  # epoch 0 is the plain flip's


def test_alternating_leaves_the_other_draws_alone():
    others = ["crop(4)", "rotate(15)", "autoaugment", "cutout(16, p=0.5)"]
    program, alone = decisions(others, epoch=3, count=500)
    mixed_program, mixed = decisions([*others[:2], "flip(alternate=true)", *others[2:]], epoch=3, count=500)
    kept = [slot for slot in range(mixed.shape[1]) if slot != 2]
    for own, there in enumerate(kept):
        np.testing.assert_array_equal(picks(program, alone, own), picks(mixed_program, mixed, there))


def test_whole_squares_are_uniform_and_reflection_draws_like_black():
    program, chosen = decisions(["crop(2, pad='reflect')", "cutout(12, inside=true)"])
    assert_uniform(picks(program, chosen, 1), 21 * 21)
    np.testing.assert_array_equal(picks(program, chosen, 0), picks(*decisions(["crop(2)"]), 0))
    corners = program.table[chosen[:, 1], 2:6]
    assert (corners[:, 2:] - corners[:, :2] == 12).all()
    assert corners.min() == 0
    assert corners.max() == 32


@pytest.mark.parametrize("op", ["crop(9, pad='reflect')", "cutout(10, inside=true)"])
def test_images_too_small_for_an_operation_are_refused(op):
    with pytest.raises(UserError, match=r"needs images of 10 px or more, these have 9 x 17"):
        build_program([parse_op(op)], 9, 17)


def test_two_of_a_kind_draw_apart():
    program, chosen = decisions(["crop(4)", "crop(4)"])
    assert_uniform(picks(program, chosen, 0) * 81 + picks(program, chosen, 1), 81 * 81)


def test_draw_numbers_stay():
    """A change of these numbers breaks every saved run."""
    _, chosen = decisions(["crop(4)", "flip", "rotate(15)", "autoaugment", "cutout(16)"], epoch=3, seed=42, count=4)
    assert chosen.tolist() == [
        [55, 0, 747, 4249, 4349, 5191],
        [21, 0, 2149, 0, 4362, 5319],
        [65, 82, 2760, 4219, 0, 4646],
        [11, 82, 1915, 4264, 0, 4813],
    ]


def augment_of(ops, seed=5, **options):
    config = AugmentConfig(ops=ops, **options)
    return build_augment(
        config, mean=[0.5] * 3, std=[0.5] * 3, image_shape=(32, 32, 3), seed=seed, device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )  # fmt: skip


def test_a_sample_depends_on_its_index_alone():
    images = torch.randint(0, 256, (200, 32, 32, 3), dtype=torch.uint8)
    augment = augment_of(ALL)
    index = torch.arange(200) + 4_000_000_000  # above 2**31: the index is unsigned
    whole = augment(Batch(images, torch.arange(200), index, index), 2)
    some = torch.randperm(200)[:37]
    part = augment(Batch(images, some, index[some], index[some]), torch.tensor([2]))
    assert torch.equal(part, whole[some])
    moved = augment(Batch(images[some], torch.arange(37), index[some], index[some]), 2)
    assert torch.equal(moved, part)


def test_threads_change_nothing_and_are_left_alone():
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8)
    rows = torch.arange(64)
    batch, augment = Batch(images, rows, rows, rows), augment_of(ALL)
    before = numba.get_num_threads(), torch.get_num_threads()
    many = augment(batch, 0)
    assert (numba.get_num_threads(), torch.get_num_threads()) == before
    numba.set_num_threads(1)
    try:
        assert torch.equal(augment(batch, 0), many)
    finally:
        numba.set_num_threads(before[0])


def test_the_loaders_own_transforms_leave_normalization():
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    rows = torch.arange(5)
    augment = augment_of(["crop", "flip"], where="loader")
    assert torch.equal(augment(Batch(images, rows, rows, rows), 0), augment.plain(images))


def test_evaluation_does_not_see_the_last_decisions():
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8)
    rows, augment = torch.arange(64), augment_of(ALL)
    before = augment.plain(images)
    augment(Batch(images, rows, rows, rows), 0)
    assert torch.equal(augment.plain(images), before)


def test_an_empty_batch_and_no_operations():
    empty = torch.zeros((0, 32, 32, 3), dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    assert augment_of(["crop", "autoaugment"])(Batch(empty, none, none, none), 0).shape == (0, 3, 32, 32)
    images, rows = torch.full((2, 32, 32, 3), 255, dtype=torch.uint8), torch.arange(2)
    assert (augment_of([])(Batch(images, rows, rows, rows), 0) == 1).all()


def test_other_channels_are_refused():
    with pytest.raises(UserError, match="3 channels"):
        build_augment(
            AugmentConfig(), mean=[0.5], std=[0.5], image_shape=(32, 32, 1), seed=0, device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip
