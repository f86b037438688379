"""Architectures that no row of the ladder has, few layers of each: their steps captured uncompiled, and replayed."""

from pathlib import Path

import pytest

from tests.nullgpu.checks import assert_steps_are_replayed
from tests.nullgpu.harness import Job, on_null_device
from tests.nullgpu.report import Report

pytestmark = [pytest.mark.nullgpu, pytest.mark.timeout(1800), pytest.mark.xdist_group("architectures")]

COMMON = ["train.batch_size=24", "train.epochs=2", "engine.mode=graph"]
TRANSFORMER = ["model.dim=32", "model.depth=1", "model.heads=2", "schedule.warmup_epochs=1"]
SHALLOW = {
    "vit": TRANSFORMER,
    "cct": TRANSFORMER,
    "convnextv2": ["model.widths=[8,8,16,16]", "model.depths=[1,1,1,1]", "schedule.warmup_epochs=1"],
    "shake-shake": ["model.depth=8", "model.width=8"],
    "residual-attention92": ["model.depth=56", "model.width=16"],
}


@pytest.fixture(scope="module")
def found(null_device: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    jobs = [
        Job("steps", {"recipe": f"beyond/{name}", "changes": [*COMMON, *changes], "evaluate": False})
        for name, changes in SHALLOW.items()
    ]
    folder = tmp_path_factory.mktemp("architectures") / "child"
    return dict(zip(SHALLOW, on_null_device(jobs, folder, deadline_s=1700), strict=True))


@pytest.mark.parametrize("name", SHALLOW)
def test_an_architecture_is_captured_and_replayed(found: dict[str, Report], name: str) -> None:
    """Gradients of concatenated or flattened outputs are no dense channels-last tensors; what goes forward is."""
    report = found[name]
    assert report.error is None, report.error
    assert (report.facts["mode"], report.facts["fallback"]) == ("graph", None)
    assert report.facts["row"]["nonfinite_step"] is None
    assert report.violations == [], report.violations
    assert [e for e in sorted(report.convolutions) if e.operator == "convolution" and not e.channels_last] == []
    assert_steps_are_replayed(report)
    assert [rows for rows, _ in report.captures()] == [24, 13]
