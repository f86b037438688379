"""A whole step captured as a CUDA graph: some thousand launches become one."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch

from fastcifar.data.batch import Batch
from fastcifar.errors import UserError, root_cause

T = TypeVar("T")


class Captured(NamedTuple):
    """A graph and the batch whose memory it reads."""

    graph: torch.cuda.CUDAGraph
    batch: Batch


class GraphedStep:
    """Captures ``run(batch)`` once for each shape of batch and phase of the run, and replays it.

    A resident set (more images than rows) is read in place; whatever else a batch brings is copied into the graph's own
    input. All graphs share one private memory pool, since they never run at once.

    Args:
        run: one step, without any wait for the host.
        phase: what else than the batch decides which kernels a step launches, now.
    """

    def __init__(self, run: Callable[[Batch], None], phase: Callable[[], Hashable] = lambda: None):
        self._run, self._phase = run, phase
        self._captured: dict[Hashable, Captured] = {}

    def knows(self, batch: Batch) -> bool:
        """Tell whether a graph for batches of this shape has been captured in this phase."""
        return self._key(batch) in self._captured

    def capture(self, batch: Batch) -> None:
        """Capture the step for batches of this shape; the step must have run before, see `beside`.

        Raises:
            UserError: the capture failed. torch cannot be used for training afterwards: its generator and allocator
                are still in capture mode.
        """
        images, rows, labels, indices = batch.tensors()
        # The graph reads fixed addresses: the resident set has one, a streamed batch gets one here.
        images = images if batch.resident else images.clone()
        own = Batch(images, rows.clone(), labels.clone(), indices.clone(), batch.share)
        graph, pool = torch.cuda.CUDAGraph(), next((c.graph.pool() for c in self._captured.values()), None)
        try:
            with capturing(graph, pool):
                self._run(own)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UserError(
                f'capturing the step as a CUDA graph failed: {root_cause(error)}; set engine.mode = "compile" to train '
                "without a graph"
            ) from error
        self._captured[self._key(batch)] = Captured(graph, own)

    def replay(self, batch: Batch) -> None:
        """Run the captured step on a batch whose shape is known."""
        captured = self._captured[self._key(batch)]
        for own, given in zip(captured.batch.tensors(), batch.tensors(), strict=True):
            # The resident images are the very same tensor; only rows, labels and indices change.
            if own is not given:
                own.copy_(given, non_blocking=True)
        captured.graph.replay()

    def _key(self, batch: Batch) -> Hashable:
        return self._phase(), _shape(batch)

    @staticmethod
    def beside(work: Callable[[], T]) -> T:
        """Do work on a stream of its own, as CUDA graphs want it before a capture, and return its result."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = work()
        torch.cuda.current_stream().wait_stream(side)
        return result


def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> torch.cuda.graph:
    """Return a context in which what is launched becomes the graph.

    In place of the default stream torch captures one of its own, the same each time. Any other is captured itself:
    graphs captured on one stream share its cuBLAS workspace, and those of runs side by side are replayed at once.
    """
    own, default = torch.cuda.current_stream(), torch.cuda.default_stream()
    # thread_local: the threads of a loader may allocate memory and copy to the GPU meanwhile.
    return torch.cuda.graph(
        graph, pool=pool, stream=None if own == default else own, capture_error_mode="thread_local"
    )


def _shape(batch: Batch) -> Hashable:
    """Return what a graph is captured for; where the batch lies in the global one is built into it too."""
    # Of two resident sets (progressive resizing) each needs a graph of its own.
    address = batch.images.data_ptr() if batch.resident else None
    return tuple(batch.images.shape), len(batch.rows), address, batch.share
