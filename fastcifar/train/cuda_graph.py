"""A whole step captured as a CUDA graph: some thousand launches become one."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcifar.data.batch import Batch

WARMUP_RUNS = 3


class Captured(NamedTuple):
    """A graph and the batch whose memory it reads."""

    graph: torch.cuda.CUDAGraph
    batch: Batch


class Capturer:
    """Captures ``run(batch, kind)`` once for each kind and shape, and replays it.

    A resident set (more images than rows) is read in place; whatever else a batch brings is copied into the graph's
    own input. Capturing leaves no trace in the training state.

    Args:
        run: one step, without any wait for the host.
        state: returns all tensors that a step changes and that matter afterwards.
    """

    def __init__(self, run: Callable[[Batch, int], None], state: Callable[[], list[Tensor]]):
        self._run, self._state = run, state
        self._captured: dict[Hashable, Captured] = {}

    def __call__(self, batch: Batch, kind: int) -> None:
        """Replay the step for this batch, capturing it first where it is new.

        Raises:
            RuntimeError: something in the step cannot be captured; the state is as before.
        """
        resident = len(batch.images) != len(batch.rows)
        key = (kind, tuple(batch.images.shape), len(batch.rows), batch.images.data_ptr() if resident else None)
        if key not in self._captured:
            self._captured[key] = self._capture(batch, kind, resident)
        captured = self._captured[key]
        for own, given in zip(captured.batch, batch, strict=True):
            if own is not given:
                own.copy_(given, non_blocking=True)
        captured.graph.replay()

    def _capture(self, batch: Batch, kind: int, resident: bool) -> Captured:
        """Run the step a few times beside the main stream, capture it, and put the state back."""
        own = Batch(batch.images if resident else batch.images.clone(), *(t.clone() for t in batch[1:]))
        graph = torch.cuda.CUDAGraph()
        with untouched(self._state()):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP_RUNS):
                    self._run(own, kind)
            torch.cuda.current_stream().wait_stream(side)
            # Threads of a loader may talk to the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool(), capture_error_mode="thread_local"):
                self._run(own, kind)
        return Captured(graph, own)

    def _pool(self) -> Any:
        """Return the memory pool of the first graph: graphs that never run at once can share it."""
        return next(iter(self._captured.values())).graph.pool() if self._captured else None


@contextmanager
def untouched(state: list[Tensor]) -> Iterator[None]:
    """Put tensors and the GPU's generator back to what they were before the block, in place."""
    before, generator = [tensor.clone() for tensor in state], torch.cuda.get_rng_state()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        with torch.no_grad():
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)
        torch.cuda.set_rng_state(generator)
