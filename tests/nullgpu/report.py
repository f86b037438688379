"""What one observed job did on the null device: typed, and read from the device's log without torch."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One line of the device's log; see the head of nullgpu.c."""

    kind: str
    thread: int
    capture: int
    name: str
    detail: str


@dataclass
class Work:
    """What was put on streams.

    Attributes:
        launches: kernels, copies and memory sets by short name: Inductor's, the project's own and ATen's.
        library: calls of what nullops.py stands in for (cuDNN, cuBLAS), by operator.
        graphs: numbers of the compiled graphs (see `Graph`) that were called, in order.
    """

    launches: Counter[str] = field(default_factory=Counter)
    library: Counter[str] = field(default_factory=Counter)
    graphs: list[int] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Launches in all, beside the libraries' calls."""
        return self.launches.total()

    def kinds(self) -> Counter[str]:
        """Return the launches by where they come from: ``generated`` (Inductor), ``own`` (Triton), ``aten``, copies."""
        found: Counter[str] = Counter()
        for name, count in self.launches.items():
            found[origin(name)] += count
        return found


@dataclass
class Capture(Work):
    """One capture of a CUDA graph.

    Attributes:
        number: the device's number of it.
        stream: the number of the stream that was captured; 0 is the default one.
        whole: whether it ended well.
        span: the clock that was running, such as ``compilation_s``, or "".
        beside: kernels that were launched meanwhile and not captured, on any thread.
    """

    number: int = 0
    stream: int = 0
    whole: bool = False
    span: str = ""
    beside: int = 0


@dataclass
class Region(Work):
    """One step or one pass of evaluation, as the program called it. Its own `Work` is what was not captured.

    Attributes:
        kind: ``step`` or ``evaluation``; ``capture step`` and ``capture evaluation`` are what is done before them.
        rows: images in it.
        span: the clock that was running at its start, or "".
        captures: the captures that began in it.
        replays: numbers of the captures that were replayed.
        streams: of each replay, the number of its stream.
        syncs: names of the calls by which the host waited for the device.
        pageable: copies between the device and host memory that is not page-locked.
    """

    kind: str = ""
    rows: int = 0
    span: str = ""
    captures: list[Capture] = field(default_factory=list)
    replays: list[int] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    syncs: list[str] = field(default_factory=list)
    pageable: int = 0


class Convolution(NamedTuple):
    """One distinct convolution: its pass, and shape and layout of its tensors, such as ``images=2x3x32x32:nhwc``."""

    operator: str
    tensors: str

    @property
    def channels_last(self) -> bool:
        """Whether all of its tensors are channels-last."""
        return ":nchw" not in self.tensors


@dataclass(frozen=True)
class Graph:
    """One graph that Inductor compiled.

    Attributes:
        backward: whether it is a backward pass.
        generated_bytes: read and written by generated kernels, as Inductor's scheduler counts them.
        library_bytes: the same of calls that Inductor leaves to libraries.
    """

    backward: bool
    generated_bytes: int
    library_bytes: int


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel that was loaded.

    Attributes:
        name: of the function.
        registers: of a thread.
        stack_bytes: local memory of a thread; registers that spill go there.
        target: such as ``sm_90``.
    """

    name: str
    registers: int
    stack_bytes: int
    target: str


@dataclass
class Report:
    """All that was observed of one job.

    Attributes:
        facts: what the scenario itself returned.
        error: the traceback of an exception that left the scenario, or None.
        regions: steps and evaluations in order.
        pinned_copies: copies to the device out of page-locked memory, anywhere in the job.
        violations: what a capture forbids and was tried, anywhere in the job.
        graph_breaks: reasons that torch._dynamo counted, with how often.
        graphs: what Inductor compiled, by number; empty where its cache answered.
        convolutions: the distinct ones.
        kernels: the compiled modules that were loaded.
        peak_bytes: most that torch's allocator had given out at once.
        reserved_bytes: what it held at the end.
        cpu_s: processor seconds of the job, ptxas included.
        caches: hits, misses and refusals of the compilers' caches of whole graphs, as torch counts them.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    regions: list[Region] = field(default_factory=list)
    pinned_copies: int = 0
    violations: list[str] = field(default_factory=list)
    graph_breaks: dict[str, int] = field(default_factory=dict)
    graphs: dict[int, Graph] = field(default_factory=dict)
    convolutions: set[Convolution] = field(default_factory=set)
    kernels: list[Kernel] = field(default_factory=list)
    peak_bytes: int = 0
    reserved_bytes: int = 0
    cpu_s: float = 0.0
    caches: dict[str, int] = field(default_factory=dict)

    def of(self, kind: str) -> list[Region]:
        """Return the regions of a kind."""
        return [region for region in self.regions if region.kind == kind]

    def captures(self, kind: str = "step") -> list[tuple[int, Capture]]:
        """Return the whole captures of a step or an evaluation, each with the number of images in its batch."""
        regions = [region for region in self.regions if region.kind in (kind, f"capture {kind}")]
        return [(region.rows, c) for region in regions for c in region.captures if c.whole]

    def generated_bytes(self, work: Work) -> int | None:
        """Return the bytes that generated kernels move in a capture or region; None where they are not known."""
        if any(number not in self.graphs for number in work.graphs):
            return None
        return sum(self.graphs[number].generated_bytes for number in work.graphs)


# --------------------------------------------------------------------------------------------------- reading the log

_ENQUEUED = {"kernel", "memcpy", "memset", "pageable"}


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a log; a last one that a crash cut off is left out."""
    for text in path.read_text(errors="replace").splitlines():
        parts = text.split("\t")
        if len(parts) == 5 and parts[1].isdigit() and parts[2].isdigit():
            yield Line(parts[0], int(parts[1]), int(parts[2]), parts[3], parts[4])


class LogReader:
    """Sorts the lines of a log into regions and captures."""

    def __init__(self) -> None:
        self.report = Report()
        self._regions: list[Region] = []  # those that the log is in, the innermost last
        self._captures: dict[int, Capture] = {}
        self._span = ""

    def read(self, path: Path) -> Report:
        """Return the report of a log, with the fields that a log can fill."""
        for line in read_lines(path):
            handle = getattr(self, f"_{line.kind}", None)
            if handle is not None:
                handle(line)
            if line.kind in _ENQUEUED:
                self._enqueued(line)
        return self.report

    @property
    def _region(self) -> Region | None:
        return self._regions[-1] if self._regions else None

    def _work(self, line: Line) -> Work | None:
        return self._captures.get(line.capture) or self._region

    def _enqueued(self, line: Line) -> None:
        if line.capture == 0 and line.kind == "kernel":
            for capture in self._captures.values():
                capture.beside += 1
        if (work := self._work(line)) is not None:
            work.launches[short_name(line.name)] += 1
        if line.kind == "memcpy" and line.name == "host to device":
            self.report.pinned_copies += 1
        if line.kind == "pageable" and self._region is not None:
            self._region.pageable += 1

    def _library(self, line: Line) -> None:
        if (work := self._work(line)) is not None:
            work.library[line.name] += 1
        if line.detail:
            self.report.convolutions.add(Convolution(line.name, line.detail))

    def _begin(self, line: Line) -> None:
        self._captures[line.capture] = Capture(number=line.capture, stream=int(line.detail), span=self._span)
        if self._region is not None:
            self._region.captures.append(self._captures[line.capture])

    def _end(self, line: Line) -> None:
        self._captures.pop(line.capture).whole = line.detail == "whole"

    def _replay(self, line: Line) -> None:
        if self._region is not None:
            self._region.replays.append(int(line.detail))
            self._region.streams.append(int(line.name))

    def _sync(self, line: Line) -> None:
        if self._region is not None:
            self._region.syncs.append(line.name)

    def _violation(self, line: Line) -> None:
        self.report.violations.append(f"{line.name} {line.detail}")

    def _mark(self, line: Line) -> None:
        word, _, rest = line.name.partition(" ")
        if word == "region":
            self._regions.append(Region(kind=rest, rows=int(line.detail), span=self._span))
            self.report.regions.append(self._regions[-1])
        elif word == "region-end":
            self._regions.pop()
        elif word == "span":
            self._span = rest
        elif word == "graph":
            work: Work | None = next(reversed(self._captures.values()), None) or self._region
            if work is not None:
                work.graphs.append(int(rest))


# -------------------------------------------------------------------------------------------------------- kernel names


def short_name(name: str) -> str:
    """Return a kernel's name without mangling: ``at::vectorized_elementwise_kernel(FillFunctor)``; others as they are.

    Mangled names are those of torch's own CUDA code, hence ``at::``.
    """
    if not name.startswith("_Z"):
        return name
    words = [word for word in _identifiers(name) if word not in ("at", "native", "cuda", "std", "array", "detail")]
    words = [word for word in words if not word.startswith(("_GLOBAL__", "_INTERNAL"))]
    kernel = next((word for word in words if "kernel" in word.lower()), words[0] if words else name)
    words = [word for word in words if word != kernel and not word.startswith("gpu_kernel")]
    functors = [word for word in words if re.search(r"functor|_cuda$|_impl|Op", word, re.I)]
    return f"at::{kernel}({functors[0]})" if functors else f"at::{kernel}"


def _identifiers(mangled: str) -> Iterator[str]:
    """Yield the identifiers of a mangled name: each is written as its length and then itself.

    A number after L and the letter of a type is a template's integer argument, and no length.
    """
    place = 0
    while (found := re.compile(r"(?<!L[a-z])(?<!\d)\d+").search(mangled, place)) is not None:
        length, start = int(found.group()), found.end()
        word = mangled[start : start + length]
        if 1 < length == len(word) and re.fullmatch(r"[A-Za-z_]\w*", word):
            yield word
            place = start + length
        else:
            place = start


def origin(name: str) -> str:
    """Return where a launch of that short name comes from: ``generated``, ``aten``, ``copy`` or ``own``."""
    if name.startswith("triton_"):
        return "generated"
    if name.startswith("at::"):
        return "aten"
    return "copy" if name == "memset" or " to " in name else "own"
