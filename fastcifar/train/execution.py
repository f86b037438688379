"""How a step is executed: eagerly, with a compiled model, or as a captured CUDA graph; the results are the same.

`Execution` decides when the first batch of each shape arrives (`warm_up`), before the training clock runs:

1. It runs the step a few times with the compiled model. Where the compiler fails and the plain model does not, the
   step goes on without compilation.
2. For a CUDA graph, these runs must not wait for the host anywhere, which torch itself checks. Where they do, the step
   is not captured at all: a capture that fails in the middle leaves torch's generator and allocator in capture mode,
   and nothing can put them right in this process.
3. It captures. Should that fail all the same, the run stops.

Whatever is less than the recipe asks for is kept in `Execution.fallback`, with its root cause, and is an error with
``engine.strict``, or with FASTCIFAR_STRICT=1 in the environment, as benchmarks and ``make gpu`` have it. None of this
leaves a trace in the training state.
"""

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastcifar.config.schema import EngineConfig
from fastcifar.data.batch import Batch
from fastcifar.data.store import cache_folder
from fastcifar.errors import UserError, root_cause
from fastcifar.kernels import batch_norm
from fastcifar.train.cuda_graph import GraphedStep
from fastcifar.train.flat_parameters import FlatParameters

if TYPE_CHECKING:
    from fastcifar.train.step import Step

WARM_UP_RUNS = 3  # cuDNN chooses its algorithms, and Triton compiles, in the first; the allocator settles in the next
MOST_MODELS, MOST_COMPILATIONS = 200, 100_000
Forward = Callable[[Tensor], Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])


class Execution:
    """Executes a step's `execute`; see the module's text.

    Attributes:
        compiled: whether the model is compiled.
        graph: the captured step, or None.
        fallback: why that is less than the recipe asks for, or None.
        warm: whether a shape has been warmed up in this process.
    """

    def __init__(self, step: "Step"):
        self._step, self._plain, self.warm = step, (step.forward, step.score), False
        device = step.losses.device
        own = step.user_optimizer is not None
        self.compiled, captured, self.fallback = choose_mode(step.recipe.engine, device, own)
        self.graph = GraphedStep(step.execute, lambda: step.phase) if captured else None
        if self.compiled:
            # The loss is a graph of its own, outside autocast.
            step.forward, step.score = compile_model(step.forward), compile_model(step.score)
            self._compile_others(compile_model)
        if self.fallback and is_strict(step.recipe.engine):
            raise UserError(f"{self.fallback} (engine.strict)")

    @property
    def mode(self) -> str:
        """What is done: "eager", "compile", "graph" or "compile+graph"."""
        parts = ["compile"] * self.compiled + ["graph"] * (self.graph is not None)
        return "+".join(parts) or "eager"

    def __call__(self, batch: Batch) -> None:
        """Train on one batch; a shape that `warm_up` has not seen is captured first."""
        if self.graph is not None and not self.graph.knows(batch):
            self.warm_up([batch])
        if self.graph is not None:
            self.graph.replay(batch)
        else:
            self._step.execute(batch)

    def warm_up(self, batches: Iterable[Batch]) -> None:
        """Compile, and capture where that is wanted, for batches of these shapes; trains on none of them.

        Raises:
            UserError: out of memory, a capture that failed, or, with ``engine.strict``, any fallback.
        """
        # A graph keeps the mode of its capture, and a builder of the user's own may leave a model in evaluation mode.
        self._step.model.train()
        # Every shape and every phase: none may be met first while the training clock runs.
        for phase, batch in itertools.product(self._step.phases(), list(batches)):
            own, self._step.phase = self._step.user_optimizer, phase
            with preserved(self._step.changing()) as put_back, own.unchanged() if own else nullcontext(), (
                out_of_memory_explained()
            ):
                self._rehearse(batch, put_back)
                if self.graph is not None:
                    self.graph.capture(batch)
        self._step.phase = self._step.next_phase()
        self.warm = True

    def _compile_others(self, by: Callable[[nn.Module], Forward] | None) -> None:
        """Compile the models beside the one that is trained, or execute them plainly."""
        for other in (self._step.teacher, self._step.selection):
            if other is not None:
                other.compile(by)

    def _rehearse(self, batch: Batch, put_back: Callable[[], None]) -> None:
        """Run the step without capturing it, giving up what does not work."""
        try:
            self._run(batch, put_back)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not self.compiled:
                raise
            # Whose error is it? The plain model tells: where it fails too, the model is wrong, not the compiler.
            self.compiled, (self._step.forward, self._step.score) = False, self._plain
            self._compile_others(None)
            put_back()
            self._run(batch, put_back)  # an error of the model itself, not of the compiler, is raised here
            self._fall_back(f"the model cannot be compiled and runs without compilation: {root_cause(error)}")

    def _run(self, batch: Batch, put_back: Callable[[], None]) -> None:
        if self.graph is None:
            self._step.execute(batch)
            return
        for _ in range(WARM_UP_RUNS):
            self.graph.beside(lambda: self._step.execute(batch))
            # Each is the same step: an epoch, or what is left of a run, may have fewer than these, and its tables too.
            put_back()
        # Asked before the capture, not found out by it: a failed capture cannot be undone.
        waits = self.graph.beside(lambda: first_wait(lambda: self._step.execute(batch)))
        if waits is not None:
            self.graph = None
            self._fall_back(f"the step cannot be captured as a CUDA graph, because it waits for the host: {waits}")

    def _fall_back(self, reason: str) -> None:
        self.fallback = reason if self.fallback is None else f"{self.fallback}; {reason}"
        if is_strict(self._step.recipe.engine):
            raise UserError(f"{reason} (engine.strict); set engine.mode to what works here: {self.mode}")


def is_strict(config: EngineConfig) -> bool:
    """Return whether a fallback is an error: by the recipe, or for every recipe of this process.

    A variable rather than a change of the recipe, so that a run is recorded as of the recipe that it is of.
    """
    return config.strict or os.environ.get("FASTCIFAR_STRICT") == "1"


def choose_mode(
    config: EngineConfig, device: torch.device, user_optimizer: bool = False
) -> tuple[bool, bool, str | None]:
    """Return whether to compile, whether to capture, and why that is less than the recipe asks for, or None.

    ``auto`` compiles and captures on a GPU; on a CPU torch.compile costs minutes and wins nothing. The step of an
    optimizer of the user's own may do anything, so it is not captured.
    """
    on_gpu = device.type == "cuda"
    if user_optimizer and on_gpu and config.mode in ("auto", "graph"):
        return config.mode == "auto", False, "an optimizer by import path is not captured as a CUDA graph"
    if config.mode == "auto":
        return on_gpu, on_gpu, None
    if config.mode == "graph" and not on_gpu:
        return False, False, 'engine.mode = "graph" needs a CUDA device; the step runs eagerly'
    return config.mode == "compile", config.mode == "graph", None


class WorkingCopyModel(nn.Module):
    """A model that reads its convolution and linear weights from their bf16 or fp16 working copy."""

    def __init__(self, model: nn.Module, flat: FlatParameters, dtype: torch.dtype):
        super().__init__()
        self.model, self._copies = model, flat.add_working_copy(dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return functional_call(self.model, self._copies, (images,))


def model_forward(model: nn.Module, flat: FlatParameters, working_copy: torch.dtype | None) -> Forward:
    """Return a callable (B, C, H, W) -> (B, K): the model, reading a working copy of this dtype unless it is None."""
    return model if working_copy is None else WorkingCopyModel(model, flat, working_copy)


def compile_model(forward: Function) -> Function:
    """Let torch.compile make few kernels out of many; it happens at the first call for each shape.

    What is compiled is kept on disk, in the folders ``inductor`` and ``triton`` of our cache, unless
    ``TORCHINDUCTOR_CACHE_DIR`` and ``TRITON_CACHE_DIR`` name others: the next run of the recipe starts in seconds.
    """
    for variable, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(cache_folder() / folder))
    # Whether fp32 may be rounded to tf32 is the recipe's decision, not something to be reminded of.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    batch_norm.allow_in_graph()
    # One process may train many models, whose working copies share one function: from the ninth on, torch would go on
    # without compilation, and say so in a log only.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_MODELS)
    # That one counts models of the past too: a benchmark of a hundred runs of three image sizes needs hundreds.
    limit = max(torch._dynamo.config.accumulated_recompile_limit, MOST_COMPILATIONS)
    torch._dynamo.config.accumulated_recompile_limit = limit
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Static shapes: there are two or three in a run, and kernels for a known size are faster.
    return cast(Function, torch.compile(forward, dynamic=False))


@contextmanager
def preserved(state: Iterable[Tensor]) -> Iterator[Callable[[], None]]:
    """Put tensors and torch's generators back to what they were before the block, in place.

    Yields:
        What does so at once, for a block that wants it in between too.
    """
    # Copies, because a captured graph has the addresses of the tensors themselves.
    before, host = [(tensor, tensor.clone()) for tensor in state], torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def put_back() -> None:
        with torch.no_grad():
            for tensor, old in before:
                tensor.copy_(old)
        torch.set_rng_state(host)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    yield put_back
    put_back()


def first_wait(run: Callable[[], Any]) -> str | None:
    """Return where ``run`` first waits for the host, in torch's words, or None where it does not."""
    _on_wait("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return root_cause(error)
    finally:
        _on_wait("default")
    return None


def _on_wait(reaction: str) -> None:
    """Choose what torch does where the host waits: "error" or "default"."""
    with warnings.catch_warnings():
        # torch warns that this mode is a prototype, which means nothing to a user.
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode(reaction)


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Say what to lower when the device's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({root_cause(error)}): lower train.batch_size, or set train.accumulate = 2 or more, "
            "which sends each batch through the model in parts"
        ) from None
