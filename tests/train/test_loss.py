"""The loss against torch's own cross entropy, and mixed labels against soft targets."""

import pytest
import torch
import torch.nn.functional as F

from fastcifar.config.schema import LossConfig
from fastcifar.errors import UserError
from fastcifar.train.loss import class_weights, cross_entropy, divisors

CPU = torch.device("cpu")


def draw(seed: int, batch: int = 13, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    a, b = torch.randint(0, classes, (2, batch), generator=generator)
    return logits, a, b


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lam", [0.3, None])
def test_equals_torch(smoothing: float, weighted: bool, lam: float | None) -> None:
    logits, a, b = draw(0)
    weights = torch.rand(10, dtype=torch.float64) + 0.1 if weighted else None
    config = LossConfig(label_smoothing=smoothing)
    losses = [F.cross_entropy(logits, y, weight=weights, label_smoothing=smoothing) for y in (a, b)]
    if lam is None:
        target, expected = a, losses[0]
    else:
        target, expected = (a, b, torch.tensor(lam, dtype=torch.float64)), lam * losses[0] + (1 - lam) * losses[1]
    torch.testing.assert_close(cross_entropy(logits, target, config, weights=weights), expected)
    # In micro-batches of 5, 5 and 3 samples, each divided by what the whole batch is divided by.
    divide, total = divisors(target, weights), 0
    for part in torch.arange(13).split(5):
        piece = target[part] if lam is None else (a[part], b[part], target[2])
        total = total + cross_entropy(logits[part], piece, config, weights=weights, divide=divide)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_whose_labels_all_have_no_weight_has_a_loss_of_zero(mixed: bool, smoothing: float) -> None:
    logits, a, _ = draw(4)
    weights = torch.ones(10, dtype=torch.float64)
    weights[3] = 0
    config = LossConfig(label_smoothing=smoothing, class_weights=weights.tolist())
    plain = F.cross_entropy(logits, a, weight=weights, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, a, config, weights=weights), plain)
    none, logits = torch.full_like(a, 3), logits.requires_grad_()
    target = (none, none, torch.tensor(0.3)) if mixed else none
    loss = cross_entropy(logits, target, config, weights=weights)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_lambda_per_sample_equals_soft_targets() -> None:
    logits, a, b = draw(1)
    lam = torch.rand(13, dtype=torch.float64)
    soft = lam[:, None] * F.one_hot(a, 10) + (1 - lam)[:, None] * F.one_hot(b, 10)
    expected = F.cross_entropy(logits, soft, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, (a, b, lam), LossConfig(label_smoothing=0.1)), expected)


def test_low_precision_logits_are_computed_in_float32() -> None:
    logits, a, _ = draw(2)
    low = logits.bfloat16()
    loss = cross_entropy(low, a, LossConfig())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(low.float(), a))


def test_class_weights_must_fit_the_classes() -> None:
    assert class_weights(LossConfig(), 10, CPU) is None
    assert class_weights(LossConfig(class_weights=[1.0, 2.0]), 2, CPU).tolist() == [1.0, 2.0]
    with pytest.raises(UserError, match=r"loss\.class_weights: 2 weights for 10 classes"):
        class_weights(LossConfig(class_weights=[1.0, 2.0]), 10, CPU)
