"""Working through the buffers in blocks changes no bit, wherever the blocks and the scope end."""

import pytest
import torch

from fastcifar.kernels import flat_cpu as plain
from fastcifar.kernels.flat import Ascent, Averages, Descent


def run(adaptive: bool, scaled_end: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    w, g, v, a, saved = (torch.randn(1000) for _ in range(5))
    stats, old, working_copy = torch.randn(30), torch.randn(30), torch.zeros(600, dtype=torch.bfloat16)
    ascent, again = Ascent(2.0, adaptive, 0.01, scaled_end), g.clone()
    partials = torch.tensor([3.0])
    plain.ascend(w, g, saved, partials, ascent, working_copy)
    climbed = w.clone()
    g.copy_(again)
    averages = Averages(0.9, a, stats, old)
    plain.descend(w, g, v, Descent(0.9, True, 5e-4), 0.1, saved=saved, averages=averages, working_copy=working_copy)
    return [climbed, w, g, v, a, saved, old, working_copy]


@pytest.mark.parametrize("scaled_end", [1000, 333, 0])
@pytest.mark.parametrize("adaptive", [True, False])
def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch, adaptive: bool, scaled_end: int) -> None:
    whole = run(adaptive, scaled_end)
    monkeypatch.setattr(plain, "BLOCK", 64)
    for a, b in zip(run(adaptive, scaled_end), whole, strict=True):
        assert torch.equal(a, b)


def test_the_norm_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    w, g = torch.randn(2, 1000).unbind()
    ascent = Ascent(2.0, True, 0.01, 333)
    scale = torch.where(torch.arange(1000) < 333, w.double().abs() + 0.01, 1.0)
    expected = float((scale * g.double()).square().sum())
    for block in (64, 4096):
        monkeypatch.setattr(plain, "BLOCK", block)
        assert float(plain.norm_squared(w, g, ascent).sum()) == pytest.approx(expected, rel=1e-6)
    assert float(plain.norm_squared(w, g)) == pytest.approx(float(g.double().square().sum()), rel=1e-6)
