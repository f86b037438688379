"""Schedules against torch.optim.lr_scheduler."""

from itertools import pairwise

import pytest
import torch

from fastcifar.config.schema import ScheduleConfig
from fastcifar.train.schedule import learning_rate


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_per_epoch_is_torchs(final: float) -> None:
    rate = learning_rate(ScheduleConfig(name="cosine", final=final), 0.1, 20, 391)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1 * final)
    for epoch in range(20):
        assert rate(epoch, 7) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_linear_per_step_is_torchs() -> None:
    rate = learning_rate(ScheduleConfig(name="linear", per="step", final=0.2), 0.5, 3, 7)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=21)
    for step in range(21):
        assert rate(step // 7, step % 7) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_warmup_rises_to_the_peak_and_the_rest_is_the_schedule() -> None:
    rate = learning_rate(ScheduleConfig(name="cosine", warmup_epochs=2.0), 1.0, 10, 5)
    assert [rate(epoch, 0) for epoch in range(3)] == [0.5, 1.0, 1.0]
    per_step = learning_rate(ScheduleConfig(name="cosine", warmup_epochs=2.0, per="step"), 1.0, 10, 5)
    rising = [per_step(i // 5, i % 5) for i in range(10)]
    assert rising == pytest.approx([0.1 * (i + 1) for i in range(10)])
    falling = [per_step(i // 5, i % 5) for i in range(10, 50)]
    assert falling[0] == 1.0
    assert all(a > b for a, b in pairwise(falling))
    assert falling[-1] < 0.01


def test_warmup_from_a_share_is_airbenchs() -> None:
    config = ScheduleConfig(name="linear", per="step", warmup_epochs=14 / 7, warmup_from=0.2)
    rate = learning_rate(config, 3.0, 20, 7)
    warm, total = 14, 140
    for step in range(total):
        share = 0.2 + 0.8 * step / warm if step < warm else (total - step) / (total - warm)
        assert rate(*divmod(step, 7)) == pytest.approx(3.0 * share, rel=1e-9)


def test_constant_and_a_warmup_longer_than_the_run() -> None:
    assert learning_rate(ScheduleConfig(), 0.3, 5, 5)(4, 4) == 0.3
    rate = learning_rate(ScheduleConfig(warmup_epochs=100.0), 1.0, 5, 5)
    assert rate(4, 0) == pytest.approx(0.05)
