"""CutMix and Mixup: against the published arithmetic and their laws (fixed seeds; 99.99% bounds)."""

import numpy as np
import pytest
import torch
from scipy import stats

from fastcifar.augment.mix import beta_quantiles, build_mix
from fastcifar.config.schema import MixConfig
from fastcifar.kernels.mix.reference import box_mask
from fastcifar.kernels.philox import Stream, philox

CL = torch.channels_last


def mix_of(name, epochs=10, steps=50, seed=3, **options):
    return build_mix(MixConfig(name=name, **options), seed=seed, epochs=epochs, steps_per_epoch=steps)


def batch(size=16, height=32, width=32):
    return torch.randn(size, 3, height, width).to(memory_format=CL), torch.randint(0, 10, (size,))


def lambdas(mix, count, size=4):
    images, labels = batch(size, 32, 32)
    steps = mix.settings.steps_per_epoch
    lam = [mix(images, labels, k // steps, k % steps)[1].lam for k in range(count)]
    return torch.stack(lam).numpy()


def published_box(lam, cy, cx, height, width):
    """The box of the CutMix authors, from their lambda and centre: rows and columns, and the share that stays."""
    ratio = np.sqrt(1 - lam)
    cut_h, cut_w = int(height * ratio), int(width * ratio)
    y1, y2 = np.clip([cy - cut_h // 2, cy + cut_h // 2], 0, height)
    x1, x2 = np.clip([cx - cut_w // 2, cx + cut_w // 2], 0, width)
    return y1, y2, x1, x2, 1 - (y2 - y1) * (x2 - x1) / (height * width)


@pytest.mark.parametrize("step", range(8))
def test_cutmix_is_the_published_one(step):
    images, labels = batch(16, 24, 40)
    mixed, target = mix_of("cutmix")(images, labels, 4, step)
    word = int(philox(3, torch.tensor([step]), 4, 0, Stream.MIX)[2])
    row, column = (int(w) for w in philox(3, torch.tensor([step]), 4, 1, Stream.MIX)[:2])
    lam = ((word >> 16) + 0.5) / 65536
    y1, y2, x1, x2, kept = published_box(lam, row * 24 >> 32, column * 40 >> 32, 24, 40)
    partner = partner_of(mixed, images, target)
    expected = images.clone()
    expected[:, :, y1:y2, x1:x2] = images[partner][:, :, y1:y2, x1:x2]
    assert torch.equal(mixed, expected)
    assert float(target.lam) == pytest.approx(kept, abs=1e-7)
    assert torch.equal(target.labels_b, labels[partner])


def partner_of(mixed, images, target):
    """Which image each was mixed with, by the draws."""
    size = len(images)
    step = next(s for s in range(8) if torch.equal(mix_of("cutmix")(images, target.labels_a, 4, s)[0], mixed))
    order = philox(3, step * size + torch.arange(size), 4, 2, Stream.MIX)[0]
    return torch.tensor(sorted(range(size), key=lambda i: (int(order[i]) >> 1, i)))


def test_mixup_is_the_published_one():
    images, _ = batch(16)
    labels = torch.arange(16)
    mixed, target = mix_of("mixup", alpha=0.4)(images, labels, 1, 2)
    assert sorted(target.labels_b.tolist()) == list(range(16))
    expected = target.lam * images + (1 - target.lam) * images[target.labels_b]
    torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lambda_follows_beta(alpha):
    lam = lambdas(mix_of("mixup", alpha=alpha), 500)
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    assert torch.all(beta_quantiles(alpha).diff() >= 0)


def test_lambdas_of_epochs_and_steps_are_independent():
    lam = lambdas(mix_of("mixup"), 500).reshape(10, 50)
    assert abs(np.corrcoef(lam[:, :-1].ravel(), lam[:, 1:].ravel())[0, 1]) < 3.89 / np.sqrt(490)
    assert abs(np.corrcoef(lam[:-1].ravel(), lam[1:].ravel())[0, 1]) < 3.89 / np.sqrt(450)


def test_probability_and_switch():
    mix = mix_of("cutmix_or_mixup", p=0.6, switch=0.3)
    images, labels = batch(4)
    kinds = []
    for k in range(500):
        mixed, target = mix(images, labels, k // 50, k % 50)
        changed = (mixed != images).any(1)
        whole = changed.any((1, 2)) & (target.labels_b != labels)
        partial = (~changed).any()
        kinds.append(0 if target.lam == 1 else 1 if partial and whole.any() else 2)
    mixed_share = np.mean(np.array(kinds) > 0)
    assert abs(mixed_share - 0.6) < 3.89 * np.sqrt(0.24 / 500) + 0.02  # a box can miss the image's pixels


def test_start_is_a_fraction_of_the_run():
    mix = mix_of("mixup", start=0.75, epochs=4, steps=10)
    images, labels = batch(4)
    on = [[float(mix(images, labels, e, s)[1].lam) != 1 for s in range(10)] for e in range(4)]
    assert on == [[False] * 10] * 3 + [[True] * 10]


def test_before_the_start_nothing_changes():
    images, labels = batch(8)
    mixed, target = mix_of("cutmix_or_mixup", start=1.0)(images, labels, 0, 0)
    assert torch.equal(mixed, images)
    assert float(target.lam) == 1


@pytest.mark.parametrize("name", ["cutmix", "mixup"])
def test_per_sample(name):
    images, _ = batch(64)
    labels = torch.arange(64)
    mixed, target = mix_of(name, per_sample=True)(images, labels, 0, 0)
    assert target.lam.shape == (64,)
    assert len(target.lam.unique()) > 32
    other = images[target.labels_b]
    if name == "cutmix":
        own = (mixed == images).all(1)
        differs = target.labels_b != labels  # a sample may be its own partner
        assert torch.equal(own.float().mean((1, 2))[differs], target.lam[differs])
        assert torch.equal(mixed, torch.where(own[:, None], images, other))
    else:
        lam = target.lam[:, None, None, None]
        torch.testing.assert_close(mixed, lam * images + (1 - lam) * other, rtol=1e-6, atol=1e-6)


def test_partners_are_uniform():
    mix = mix_of("mixup", epochs=10, steps=60)
    images, labels = torch.zeros(8, 3, 2, 2), torch.arange(8)
    pairs = [mix(images, labels, k // 60, k % 60)[1].labels_b * 8 + labels for k in range(600)]
    counts = np.bincount(torch.cat(pairs).numpy(), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("name", ["cutmix", "mixup", "cutmix_or_mixup"])
def test_tensors_for_numbers_and_the_layout(name):
    images, labels = batch(8)
    images = images.bfloat16()
    mix = mix_of(name)
    mixed, target = mix(images, labels, 2, 7)
    again, target_again = mix(images, labels, torch.tensor(2), torch.tensor([7]))
    assert torch.equal(mixed, again)
    assert torch.equal(target.lam, target_again.lam)
    assert mixed.dtype == torch.bfloat16
    assert mixed.is_contiguous(memory_format=CL)
    assert target.lam.dtype == torch.float32
    assert target.lam.shape == ()


def test_box_of_a_whole_lambda_is_empty():
    one, middle = torch.tensor([1.0], dtype=torch.float64), torch.tensor([16])
    assert not box_mask(one, middle, middle, 32, 32).any()


def test_no_table_no_mixing():
    assert build_mix(None, seed=0, epochs=1, steps_per_epoch=1) is None
