"""``benchmarks/step.py``: what the loops are given that ours is compared with."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastcifar import device
from fastcifar.config import load_recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import published  # noqa: E402
import step  # noqa: E402


@pytest.mark.parametrize(("precision", "images"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_bare_loop_has_the_precision_of_our_step(monkeypatch, precision, images):
    monkeypatch.setattr(device, "auto_precision", lambda where: precision)
    monkeypatch.setattr(step, "device", lambda: torch.device("cpu"))
    given = step.synthetic(2 * step.BATCH)
    bare, ours = (side(load_recipe("lenet5"), *given) for side in (step.Bare, step.Ours))
    seen = []
    forward = bare.forward
    bare.forward = lambda x: seen.append((x.dtype, torch.is_autocast_enabled("cpu"))) or forward(x)
    bare.take(1)
    assert seen == [(images, precision == "bf16")]
    assert ours.step.inputs(ours.batch())[0].dtype == images
    assert bare.precision == ours.recipe.engine.precision == precision


def test_batches_that_lie_ready_are_taken_before_the_clock_starts(monkeypatch):
    taken = []

    def timed(work, where):
        taken.append("clock")
        work()
        return 1.0

    class Ours:
        def __init__(self, *given):
            self.step = SimpleNamespace(execution=SimpleNamespace(mode="eager", fallback=None))

        def take(self, count):
            taken.append("ours")

    def theirs(*given):
        return SimpleNamespace(ahead=8, steps=lambda count: taken.append(count), close=lambda: None)

    monkeypatch.setattr(step, "timed", timed)
    monkeypatch.setattr(step, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(step, "Ours", Ours)
    monkeypatch.setattr(step, "published", theirs)
    monkeypatch.setattr(step, "parts", lambda *given: [])
    step.by_mode("lenet5", *step.synthetic(1), rounds=2, steps=20)
    assert taken == 3 * ["clock", "ours", 8, "clock", 20]  # the first round is the warm-up


@pytest.mark.parametrize(("workers", "ahead"), [(4, 8), (0, 0)])
def test_each_worker_of_the_published_loop_has_two_batches_ready(workers, ahead):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores
        loop = published.PublishedLoop(
            torch.nn.Linear(1, 1), *step.synthetic(1), device=torch.device("cpu"), augment="none", optimizer="sgd",
            lr=0.1, workers=workers,
        )  # fmt: skip
    assert loop.ahead == ahead
