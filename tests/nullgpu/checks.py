"""What every step must be on a GPU, asserted of a report."""

from tests.nullgpu.report import Kernel, Report

SPILL_BYTES = 0
"""Local memory that a kernel may use. A kernel that indexes an array of its own is listed in `STACK`, not spilling."""
STACK: dict[str, int] = {}


def assert_clean(report: Report, *, dense_gradients: bool = True) -> None:
    """Check that nothing went wrong anywhere in a job.

    No exception, no fallback, no graph break, nothing that a capture forbids, every convolution channels-last, every
    kernel compiled for sm_90 without spills.

    Args:
        report: of the job.
        dense_gradients: False for a model with concatenated or flattened outputs, whose gradients are no dense
            channels-last tensors: only what goes forward must be channels-last then.
    """
    assert report.error is None, report.error
    for call in report.facts.get("calls", []):
        assert call["status"] == 0, call["stderr"]
    assert report.facts.get("fallback") is None, report.facts["fallback"]
    assert report.facts.get("row", {}).get("nonfinite_step") is None
    assert report.violations == [], report.violations
    assert report.graph_breaks == {}, report.graph_breaks
    operators = ("convolution", "convolution_backward") if dense_gradients else ("convolution",)
    assert [e for e in sorted(report.convolutions) if e.operator in operators and not e.channels_last] == []
    assert {kernel.target for kernel in report.kernels} <= {"sm_90"}
    spilling = [kernel for kernel in report.kernels if spills(kernel)]
    assert spilling == [], spilling


def spills(kernel: Kernel) -> bool:
    """Return whether a kernel uses more local memory than is known to be no spill."""
    return kernel.stack_bytes > STACK.get(kernel.name, SPILL_BYTES)


GENERATOR_FILLS = 2
"""Before each replay of a graph that draws (dropout) torch writes its generator's seed and offset to the device."""


def assert_steps_are_replayed(report: Report) -> None:
    """Check that after its capture a step is one replay: no kernel, no library call, no wait beside it.

    A step that is the first of its shape may have rehearsed it.

    What a replayed step may put on its stream beside the graph: copies of the batch's indices and labels into it, and
    the state of torch's generator.
    """
    assert report.captures(), "no step was captured"
    first = {id(region) for region in report.of("step") if region.library}
    assert len(first) <= len(report.captures()), "more steps ran operation by operation than were captured"
    for region in report.of("step"):
        assert region.replays, f"a step of {region.rows} images was not replayed"
        if id(region) not in first:
            assert region.syncs == []
            assert region.pageable == 0
            fills = sum(count for name, count in region.launches.items() if "FillFunctor" in name)
            assert fills <= GENERATOR_FILLS
            assert sum(region.kinds().values()) - region.kinds()["copy"] == fills
    assert [capture.beside for _, capture in report.captures()] == [0] * len(report.captures())


def assert_evaluation_is_replayed(report: Report) -> None:
    """Check that evaluation was captured, and that a batch of it is one replay with copies around it."""
    assert report.captures("evaluation"), "evaluation was not captured"
    for region in report.of("evaluation"):
        assert region.replays
        assert dict(region.library) == {}
        assert region.kinds()["generated"] == 0


def assert_prepared_before_training(report: Report) -> None:
    """Check that every shape was compiled and captured while the clock ``compilation_s`` ran, not in training time."""
    spans = {capture.span for _, capture in report.captures() + report.captures("evaluation")}
    assert spans == {"compilation_s"}, f"captured while these clocks ran: {spans}"


MOST_GROWN_BYTES = 200_000_000


def assert_torch_is_whole_or_stopped(report: Report) -> None:
    """Check what a step that cannot be captured leaves: one clear message and an end, or a torch that works."""
    facts = report.facts
    assert report.error is None, report.error
    if facts["ended"].startswith("UserError"):
        return
    assert facts["fallback"]
    assert facts["dropout"] == "works"
    assert facts["grown_bytes"] < MOST_GROWN_BYTES
