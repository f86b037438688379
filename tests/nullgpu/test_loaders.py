"""The streaming loaders on the null device: side streams, page-locked memory, and captures while they work.

DALI's GPU pipeline is a library of its own that needs a real driver; it cannot run here.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.nullgpu.checks import assert_clean, assert_steps_are_replayed
from tests.nullgpu.harness import Job, on_null_device

pytestmark = [pytest.mark.nullgpu, pytest.mark.timeout(1800)]

NEEDS = {"torchvision": "torchvision", "ffcv": "ffcv"}


@pytest.mark.parametrize("loader", NEEDS)
def test_a_streaming_loader_feeds_a_captured_step(null_device: Path, tmp_path: Path, loader: str) -> None:
    if find_spec(NEEDS[loader]) is None:
        pytest.skip(f"{NEEDS[loader]} is not installed")
    changes = ["train.epochs=2", "train.batch_size=30", f"data.loader.name={loader}", "data.loader.workers=1"]
    out = str(tmp_path / "run")
    job = Job("run", {"recipe": "smoke/lenet5", "out": out, "changes": changes, "resume": True})
    (report,) = on_null_device([job], tmp_path / "child", deadline_s=1700)
    assert_clean(report)
    assert_steps_are_replayed(report)
    assert report.facts["summary"]["loader"] == loader
    assert report.facts["mode"] == "compile+graph"
    steps = report.of("step")
    assert [region.rows for region in steps] == [30, 30, 30, 10] * 2
    assert report.pinned_copies >= 3 * len(steps)  # images, labels and indices of each batch
