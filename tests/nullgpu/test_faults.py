"""The checks can fail: faults that the project once had are put back, and each is found by what `make test` asserts."""

from pathlib import Path

import pytest

from tests.nullgpu.checks import assert_clean, assert_prepared_before_training, assert_torch_is_whole_or_stopped
from tests.nullgpu.harness import Job, on_null_device
from tests.nullgpu.report import Report
from tests.nullgpu.test_small import DRAWING, SEEDS, assert_draws_as_alone

pytestmark = [pytest.mark.nullgpu, pytest.mark.timeout(1800)]

GRAPH = "engine.mode=graph"
SHORT = ["model.depth=8", "model.alpha=8", "train.batch_size=8"]


@pytest.fixture(scope="module")
def found(null_device: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Reports by fault, all of one process; what breaks torch comes last."""
    folder = tmp_path_factory.mktemp("faults")
    odd = {"recipe": "smoke/lenet5", "out": str(folder / "run"), "changes": [GRAPH, "train.batch_size=30"]}
    spoilt = {
        "wide indices": ("steps", {"recipe": "smoke/pyramid-shakedrop", "changes": SHORT, "evaluate": False}),
        "odd batch": ("run", odd),
        "one generator": ("seeds", {**odd, "out": str(folder / "seeds"), "changes": DRAWING, "count": SEEDS}),
        "failed capture": ("failed_capture", {"recipe": "smoke/lenet5", "changes": [GRAPH]}),
    }
    jobs = [
        Job("with_fault", {"fault": fault, "scenario": scenario, "arguments": arguments})
        for fault, (scenario, arguments) in spoilt.items()
    ]
    return dict(zip(spoilt, on_null_device(jobs, folder / "child", deadline_s=1700), strict=True))


def test_random_words_inside_the_compiled_model_are_found(found: dict[str, Report]) -> None:
    report = found["wide indices"]
    with pytest.raises(AssertionError, match="out of range for type int32"):
        assert_clean(report)
    assert report.facts["mode"] == "graph"  # it goes on, uncompiled, and says so


def test_a_capture_that_fails_and_goes_on_is_found(found: dict[str, Report]) -> None:
    report = found["failed capture"]
    assert report.facts["fallback"]
    with pytest.raises(AssertionError):
        assert_torch_is_whole_or_stopped(report)
    # Both halves of torch are broken: the generator still captures, and the allocator never reuses memory.
    assert "graph capture" in report.facts["dropout"]
    assert report.facts["grown_bytes"] >= 200_000_000


def test_a_shape_that_is_prepared_in_training_time_is_found(found: dict[str, Report]) -> None:
    report = found["odd batch"]
    assert_clean(report)
    with pytest.raises(AssertionError, match="training_s"):
        assert_prepared_before_training(report)


def test_seeds_that_draw_from_one_generator_are_found(found: dict[str, Report]) -> None:
    report = found["one generator"]
    assert_clean(report)
    with pytest.raises(AssertionError):
        assert_draws_as_alone(report)
