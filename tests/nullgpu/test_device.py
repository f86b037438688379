"""The null device itself: it sees what a capture forbids, what cannot be compiled, and who is to blame for a launch."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.nullgpu.build import LIBRARY, build
from tests.nullgpu.conftest import group_of
from tests.nullgpu.harness import ChildFailed, Job, on_null_device
from tests.nullgpu.report import Convolution, LogReader, Report, origin, short_name

# What is tried in a capture, and what the device says of it; "" for what is allowed.
RULES = {
    "kernels": "",
    "fork and join": "",
    "loader on another thread": "",
    "item": "cudaStreamSynchronize on a captured stream",
    "synchronize": "cudaDeviceSynchronize while a stream is captured",
    "wait for uncaptured work": "cudaStreamWaitEvent for work that is not captured",
    "fork": "cudaStreamEndCapture a forked stream was not joined",
}


@pytest.fixture(scope="module")
def child(null_device: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Report], str]:
    """Reports by name, all of one process, and what is said of its end.

    What breaks torch comes last; after it only a job that there is not, which leaves the reports before it.
    """
    jobs = {"memory": Job("memory"), "indices": Job("compile_wide_indices"), "graph break": Job("graph_break")}
    jobs |= {case: Job("capture_rule", {"case": case}) for case in RULES}
    folder = tmp_path_factory.mktemp("device")
    with pytest.raises(ChildFailed) as failed:
        on_null_device([*jobs.values(), Job("no_such_scenario")], folder, deadline_s=400)
    paths = [folder / f"report-{number}.pickle" for number in range(len(jobs))]
    assert all(path.exists() for path in paths), str(failed.value)
    return {name: pickle.loads(path.read_bytes()) for name, path in zip(jobs, paths, strict=True)}, str(failed.value)


@pytest.fixture(scope="module")
def found(child: tuple[dict[str, Report], str]) -> dict[str, Report]:
    return child[0]


def test_torch_sees_a_gpu_with_memory(found: dict[str, Report]) -> None:
    facts = found["memory"].facts
    assert facts["name"].startswith("NVIDIA H100")
    assert facts["capability"] == (9, 0)
    assert facts["pinned"] == [True, False]
    assert (facts["total"], facts["taken"]) == (80 << 30, 1 << 28)
    assert facts["back"] == [0.0] * 4  # nothing was computed: whatever comes back is zero


@pytest.mark.parametrize("case", RULES)
def test_a_capture_forbids_what_cuda_forbids(found: dict[str, Report], case: str) -> None:
    report = found[case]
    assert report.error is None
    assert report.violations == ([RULES[case]] if RULES[case] else [])
    assert bool(report.facts["refused"]) == bool(RULES[case])


def test_wide_index_constants_do_not_compile(found: dict[str, Report]) -> None:
    """An integer constant above 2**31 in the index arithmetic of a compiled model compiles on a CPU, not on a GPU."""
    assert "out of range for type int32" in str(found["indices"].error)


def test_graph_breaks_are_counted(found: dict[str, Report]) -> None:
    report = found["graph break"]
    assert (report.error, sum(report.graph_breaks.values())) == (None, 1)
    assert {kernel.target for kernel in report.kernels} == {"sm_90"}
    assert all(kernel.registers > 0 for kernel in report.kernels)


def test_a_process_that_hangs_is_ended(null_device: Path, tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="no end after 0 s"):
        on_null_device([Job("memory")], tmp_path / "child", deadline_s=0.01)


def test_an_unknown_job_fails_with_its_reason(child: tuple[dict[str, Report], str]) -> None:
    _, said = child
    assert "failed (1)" in said
    assert "no_such_scenario" in said


def test_what_shares_its_reports_is_one_group() -> None:
    wrn, other = (f"tests/nullgpu/test_recipes.py::test_it[wrn: smoke/{name}]" for name in ("wrn-200", "wrn-sgd"))
    assert group_of(wrn) == group_of(other) != group_of("tests/nullgpu/test_recipes.py::test_it[aug: smoke/aug-none]")
    assert group_of("tests/nullgpu/test_faults.py::test_a") == group_of("tests/nullgpu/test_faults.py::test_b[x]")
    ledger = {group_of(f"tests/nullgpu/test_ledger.py::test_a[{name}]") for name in ("lenet5", "wrn-200")}
    assert len(ledger) == 2


def test_it_is_compiled_once(null_device: Path, tmp_path: Path) -> None:
    first = build(tmp_path) / LIBRARY
    made = first.stat().st_mtime_ns
    assert build(tmp_path) / LIBRARY == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [LIBRARY]


# ------------------------------------------------------------------------------------- reading a log, without a device


def read(tmp_path: Path, *lines: str) -> Report:
    path = tmp_path / "log.tsv"
    path.write_text("".join(f"{line}\n" for line in lines))
    return LogReader().read(path)


def line(kind: str, name: str = "", detail: Any = "", capture: int = 0) -> str:
    return f"{kind}\t1\t{capture}\t{name}\t{detail}"


def test_work_is_counted_where_it_belongs(tmp_path: Path) -> None:
    report = read(
        tmp_path,
        line("kernel", "before"), line("mark", "span training_s"), line("mark", "region step", 32),
        line("kernel", "warm_kernel"), line("begin", "capture", 5, 3), line("kernel", "triton_a", capture=3),
        line("mark", "graph 7"), line("kernel", "beside_kernel"), line("memset", "memset", capture=3),
        line("library", "convolution", "images=1x1x1x1:nchw", capture=3), line("end", "", "whole", 3),
        line("replay", "5", 3), line("pageable", "device to host", 4), line("sync", "cudaStreamSynchronize"),
        line("mark", "region-end"), line("sync", "after"), "kernel\t1\t0\tcut o",
    )  # fmt: skip
    (region,), ((rows, capture),) = report.regions, report.captures()
    assert (region.kind, region.rows, region.span, rows) == ("step", 32, "training_s", 32)
    assert (region.replays, region.syncs, region.pageable) == ([3], ["cudaStreamSynchronize"], 1)
    assert (region.streams, capture.stream) == ([5], 5)
    assert dict(region.launches) == {"warm_kernel": 1, "beside_kernel": 1, "device to host": 1}
    assert dict(capture.launches) == {"triton_a": 1, "memset": 1}
    assert (dict(capture.library), capture.graphs, capture.beside) == ({"convolution": 1}, [7], 1)
    assert not Convolution("convolution", "images=1x1x1x1:nchw").channels_last
    assert report.convolutions == {Convolution("convolution", "images=1x1x1x1:nchw")}


def test_a_spoilt_capture_is_none(tmp_path: Path) -> None:
    lines = (line("mark", "region step", 1), line("begin", "capture", 5, 1), line("violation", "cudaMalloc", "no", 1))
    report = read(tmp_path, *lines, line("end", "", "spoilt", 1), line("mark", "region-end"))
    assert report.captures() == []
    assert report.violations == ["cudaMalloc no"]


def test_kernel_names_say_where_they_come_from() -> None:
    fill = "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEESt5arrayIPcLm1EEEEviT0_T1_"
    assert short_name(fill) == "at::vectorized_elementwise_kernel(FillFunctor)"
    copy = (
        "_ZN2at6native18elementwise_kernelILi128ELi4EZNS0_22gpu_kernel_impl_nocastIZZZNS0_23direct_copy_kernel_cudaERNS"
    )
    assert short_name(copy) == "at::elementwise_kernel(direct_copy_kernel_cuda)"
    names = ("triton_poi_fused_add_0", "augment_kernel", "memset", "device to host", short_name(fill))
    assert [origin(name) for name in names] == ["generated", "own", "copy", "copy", "aten"]
