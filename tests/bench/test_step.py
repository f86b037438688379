"""``benchmarks/step.py``: what the loops are given that ours is compared with."""

import sys
from pathlib import Path

import pytest
import torch

from fastcifar import device
from fastcifar.config import load_recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
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
