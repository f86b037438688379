"""The GPU path of small recipes, in every test run: compile, capture, replay, evaluate, checkpoint, resume; failures.

What is asserted is structure; no kernel runs. `make nullgpu` does the same for every recipe.
"""

from pathlib import Path

import pytest

from tests.nullgpu.checks import (
    assert_clean,
    assert_evaluation_is_replayed,
    assert_prepared_before_training,
    assert_steps_are_replayed,
    assert_torch_is_whole_or_stopped,
)
from tests.nullgpu.harness import Job, on_null_device
from tests.nullgpu.report import Report
from tests.nullgpu.test_ledger import CHEAP, COMMITTED, assert_not_grown

LENET = ["ema.decay=0.9", "train.epochs=2", "train.batch_size=30"]  # three whole batches and one of ten
ALL_OPTIONS = [
    "engine.mode=graph", "engine.precision=fp16", "ema.decay=0.9", "mix={name='cutmix'}", "train.grad_clip=1.0",
    "model.depth=8", "model.alpha=8",
]  # fmt: skip
EAGER = ["engine.mode=graph"]
# Dropout, whose seed and offset a graph reads from the generator that it was captured with.
DRAWING = [*EAGER, "model={name='wide_resnet',depth=10,widen=1,dropout=0.2}", "train.epochs=2", "train.batch_size=30"]
SEEDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def found(null_device: Path, folder: Path) -> dict[str, Report]:
    jobs = {
        "ledger": Job("steps", {"recipe": CHEAP, "changes": []}),
        "lenet5": Job("run", {"recipe": "smoke/lenet5", "out": str(folder / "run"), "changes": LENET, "resume": True}),
        "seeds": Job(
            "seeds", {"recipe": "smoke/lenet5", "out": str(folder / "seeds"), "changes": DRAWING, "count": SEEDS}
        ),
        "all options": Job("steps", {"recipe": "smoke/pyramid-asam", "changes": ALL_OPTIONS}),
        "out of memory": Job("out_of_memory", {"recipe": "smoke/lenet5", "changes": EAGER, "spare_bytes": 1 << 20}),
        "failed capture": Job(
            "failed_capture", {"recipe": "smoke/lenet5", "changes": EAGER}
        ),  # last: it may break torch
    }
    reports = on_null_device(list(jobs.values()), folder / "child", deadline_s=500)
    return dict(zip(jobs, reports, strict=True))


@pytest.mark.skipif(CHEAP not in COMMITTED, reason=f"{CHEAP} is not in the ledger")
def test_a_cheap_step_has_no_more_launches_than_committed(found: dict[str, Report]) -> None:
    assert_not_grown(CHEAP, found["ledger"])


def test_a_recipe_is_compiled_captured_and_replayed(found: dict[str, Report]) -> None:
    report = found["lenet5"]
    assert report.facts["summary"]["mode"] == "compile+graph"
    assert_clean(report)
    assert_steps_are_replayed(report)
    assert_evaluation_is_replayed(report)


def test_each_shape_is_captured_once_in_each_process(found: dict[str, Report]) -> None:
    assert [rows for rows, _ in found["lenet5"].captures()] == [30, 10, 30, 10]
    assert [region.rows for region in found["lenet5"].of("step")] == [30, 30, 30, 10] * 2


def test_raw_and_averaged_weights_are_evaluated(found: dict[str, Report]) -> None:
    assert [region.rows for region in found["lenet5"].of("evaluation")] == [30] * 4


def test_a_resumed_run_has_both_epochs(found: dict[str, Report]) -> None:
    summary = found["lenet5"].facts["summary"]
    assert (summary["status"], summary["epochs_done"], summary["loader"]) == ("finished", 2, "resident")


def test_nothing_is_compiled_while_training_is_timed(found: dict[str, Report]) -> None:
    assert_prepared_before_training(found["lenet5"])


def test_seeds_side_by_side_are_replayed_on_streams_of_their_own(found: dict[str, Report]) -> None:
    report = found["seeds"]
    assert_clean(report)
    assert_steps_are_replayed(report)
    assert_evaluation_is_replayed(report)
    steps = report.of("step")[: SEEDS * 8]  # two epochs of four batches each; after them comes the run alone
    assert [step.rows for step in steps] == ([30] * SEEDS * 3 + [10] * SEEDS) * 2
    in_turn = [stream for step in steps for stream in step.streams]
    assert len(set(in_turn[:SEEDS])) == SEEDS
    assert in_turn == in_turn[:SEEDS] * 8
    captures = dict.fromkeys(in_turn, 0)
    for _, capture in [*report.captures()[: SEEDS * 2], *report.captures("evaluation")[:SEEDS]]:
        captures[capture.stream] += 1
    assert set(captures.values()) == {3}, "a graph was captured on another stream than it is replayed on"


def test_seeds_side_by_side_share_the_images_and_no_random_numbers(found: dict[str, Report]) -> None:
    assert len({images for _, images, *_ in found["seeds"].facts["together"]}) == 1
    assert_draws_as_alone(found["seeds"])


def assert_draws_as_alone(report: Report) -> None:
    """Check that a seed among others took from its generator, step by step, what it takes alone."""
    together, alone = report.facts["together"], report.facts["alone"]
    own = [drawn for seed, _, *drawn in together if seed == alone[0][0]]
    assert own == [drawn for _, _, *drawn in alone]
    assert len({tuple(drawn) for drawn in own}) == 8, "nothing was drawn"


def test_a_step_with_all_options_is_captured_without_compilation(found: dict[str, Report]) -> None:
    """ASAM, fp16 with a loss scaler, clipping, CutMix, ShakeDrop, SGD and EMA in one graph."""
    report = found["all options"]
    assert report.facts["mode"] == "graph"
    assert_clean(report)
    assert_steps_are_replayed(report)
    (_, capture), *_ = report.captures()
    assert capture.kinds()["generated"] == 0
    assert capture.library["convolution"] == 2 * 7  # two passes of a net of depth 8


def test_a_failed_capture_leaves_torch_whole_or_stops(found: dict[str, Report]) -> None:
    assert_torch_is_whole_or_stopped(found["failed capture"])


def test_out_of_memory_is_called_that(found: dict[str, Report]) -> None:
    facts = found["out of memory"].facts
    assert found["out of memory"].error is None
    assert "memory" in facts["ended"].lower()
    assert "captured" not in str(facts["fallback"])
