"""Flat parameters: a model's parameters, gradients and optimizer state in a few contiguous fp32 buffers.

Modules keep working on views, so that an update, a norm or an all-reduce is one call over flat memory and a
checkpoint is one tensor per buffer. Tensors are ordered by role, so that "convolution weights only" or "weights
only" is a prefix of the buffer and needs no mask: convolution weights, linear weights, other weights (BatchNorm),
everything else (biases).

A convolution that computes at a rounded-up width (`fastcifar.models.aligned`) has its weight's padding here, between
the channels: the model is handed the padded weight as a view instead of padding it in every pass. The padding is zero
and stays so, because its gradient is zero: padded channels are zero on both sides.

Gradients are collected, not accumulated in place: with ``p.grad = None`` before a backward pass autograd hands over the
tensors that it has computed, and one ``torch._foreach_copy_`` gathers them all into the flat buffer. Accumulating into
views costs one launch for each parameter (882 a step for the PyramidNet, against 14).
"""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from fastcifar.models.aligned import AlignedConv2d

ALIGNMENT = 32  # floats: 128 bytes, a whole cache line and a whole vector load on every device


class Segment(NamedTuple):
    """Where one tensor lies in a flat buffer; ``offset`` and ``size`` (its padding included) in elements."""

    name: str
    offset: int
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padded: tuple[int, ...] | None = None

    @property
    def outputs(self) -> int:
        """The first dimension as it lies in memory."""
        return (self.padded or self.shape)[0]

    def view(self, buffer: Tensor) -> Tensor:
        """Return this tensor's view (its own shape and strides) of a flat buffer."""
        return buffer[self.offset : self.offset + self.size].as_strided(self.shape, self.stride)

    def padded_view(self, buffer: Tensor) -> Tensor:
        """Return the same with its padding, where it has some: all of the segment."""
        return buffer[self.offset : self.offset + self.size].as_strided(self.padded or self.shape, self.stride)


class FlatParameters:
    """Flat buffers under a model; it moves the model's tensors into them once, when it is made.

    The views are set only then: rebinding ``p.data`` later would break a captured CUDA graph. In-place changes,
    ``load_state_dict`` and ``to(memory_format=...)`` of tensors that already have that format leave them alone;
    `check` finds out.

    Attributes:
        weights: float32 (n,), all trained parameters.
        grads: float32 (n,), their gradients, after `collect_gradients`.
        stats: float32 (m,), every other floating-point entry of the state dict (BatchNorm running statistics,
            frozen parameters).
        buffers: the flat buffers by name, with those that `add` made (momentum, ema, saved, ...).
        working_copy: the low-precision copy of the weights below ``matrix_end``, or None; see `add_working_copy`.
        segments: where each parameter lies in the buffers of n elements.
        stat_segments: where each statistic lies in those of m elements.
        conv_end: elements below are convolution weights.
        matrix_end: elements below are convolution and linear weights.
        weight_end: elements below belong to parameters called ``weight``, the scope of the ASAM authors.
        norm_biases: names of the biases of BatchNorm layers, for which some recipes have a learning rate of its own.
    """

    def __init__(self, model: nn.Module):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        stats = {n: t for n, t in _state(model).items() if n not in parameters and t.is_floating_point()}
        _require_float32(parameters | stats)
        roles = _roles(model)
        self.norm_biases = frozenset(
            f"{path}.bias" for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
        )
        # A stable sort: within a role the model's own order stays, and with it checkpoints.
        ordered = sorted(parameters, key=lambda name: roles.get(name, 3))
        self.segments = _lay_out({name: parameters[name] for name in ordered}, _padded_shapes(model))
        self.stat_segments = _lay_out(stats, {})
        self.conv_end, self.matrix_end, self.weight_end = (
            _end([s for s in self.segments if roles.get(s.name, 3) <= role]) for role in range(3)
        )
        device = next(iter(parameters.values())).device
        self.weights = torch.zeros(_end(self.segments), device=device)
        self.grads = torch.zeros_like(self.weights)
        self.stats = torch.zeros(_end(self.stat_segments), device=device)
        self.buffers = {"weights": self.weights, "stats": self.stats}
        self.working_copy: Tensor | None = None
        self._tensors = parameters | stats
        # What autograd leaves gradients on: the parameters, or the working copies that stand for them.
        self._leaves: list[Tensor] = [parameters[segment.name] for segment in self.segments]
        # Made once: there are hundreds of them, and each costs the host some microseconds.
        self._grad_views = [segment.view(self.grads) for segment in self.segments]
        self._model = model
        self._bind()

    def _bind(self) -> None:
        """Move the model's tensors into the buffers and make them views."""
        for segments, buffer in ((self.segments, self.weights), (self.stat_segments, self.stats)):
            for segment in segments:
                view = segment.view(buffer)
                view.copy_(self._tensors[segment.name].data)
                # `.data`, not a new Parameter: optimizers, hooks and tied weights keep what they hold.
                self._tensors[segment.name].data = view

    def add(self, name: str, like: str = "weights", dtype: torch.dtype = torch.float32) -> Tensor:
        """Make (or return) the buffer ``name``: zeros of the size of the buffer ``like``."""
        if name not in self.buffers:
            self.buffers[name] = torch.zeros_like(self.buffers[like], dtype=dtype)
        return self.buffers[name]

    def add_steps(self, name: str) -> Tensor:
        """Make (or return) the buffer ``name``: a count of steps, int64 (1,), which is state like every buffer."""
        if name not in self.buffers:
            self.buffers[name] = torch.zeros(1, dtype=torch.int64, device=self.weights.device)
        return self.buffers[name]

    def add_working_copy(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Make the low-precision copy of convolution and linear weights; return its views by parameter name.

        The views stand for the parameters in the forward pass, so that autocast has nothing left to cast, and receive
        the gradients, in their own dtype: the values that autocast would have cast to fp32. Padded ones (see `Segment`)
        have their padded shape, for which the layer has nothing left to pad. The SAM ascent step and the
        optimizer step rewrite the copy along with the weights. It is no state.
        """
        self.working_copy = torch.zeros(self.matrix_end, dtype=dtype, device=self.weights.device)
        self.cast()
        copied = [s for s in self.segments if s.offset < self.matrix_end]
        views = {s.name: s.padded_view(self.working_copy).requires_grad_() for s in copied}
        self._leaves = [views.get(s.name, self._tensors[s.name]) for s in self.segments]
        self._grad_views = [s.padded_view(self.grads) if s.name in views else s.view(self.grads) for s in self.segments]
        return views

    def clear_gradients(self) -> None:
        """Let go of all gradients before a step's (first) backward pass, so that autograd assigns instead of adding."""
        for leaf in self._leaves:
            leaf.grad = None

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Gather autograd's gradients into `grads`, and let go of them. A parameter without one counts as zero."""
        alike: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
        for leaf, view in zip(self._leaves, self._grad_views, strict=True):
            if leaf.grad is None:
                # It took no part in this step, such as a layer that stochastic depth left out.
                view.zero_()
                continue
            # The foreach copy is one launch only for tensors of one dtype (a working copy's gradients are bf16), each
            # of which lies in memory as its view does (where there is no working copy, a padded weight's does not).
            views, grads = alike.setdefault((leaf.grad.dtype, leaf.grad.stride() == view.stride()), ([], []))
            views.append(view)
            grads.append(leaf.grad)
        for views, grads in alike.values():
            torch._foreach_copy_(views, grads)
        self.clear_gradients()

    def cast(self) -> None:
        """Write the present weights into the working_copy, where there is one."""
        if self.working_copy is not None:
            self.working_copy.copy_(self.weights[: self.matrix_end])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the model's own parameters by name, in the buffers' order; their memory is that of `weights`."""
        own = dict(self._model.named_parameters())
        return {segment.name: own[segment.name] for segment in self.segments}

    def named(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the views of any buffer of n elements by parameter name (to read momentum or EMA per tensor)."""
        return {segment.name: segment.view(buffer) for segment in self.segments}

    def check(self) -> None:
        """Make sure that the model still works on the flat parameters' memory.

        Raises:
            RuntimeError: a parameter or statistic was moved; the message names it.
        """
        for segments, buffer in ((self.segments, self.weights), (self.stat_segments, self.stats)):
            current = _state(self._model)
            for s in segments:
                if current[s.name].data_ptr() != buffer.data_ptr() + 4 * s.offset:
                    raise RuntimeError(f"{s.name} left the flat parameters: change it in place, do not replace it")

    def state_dict(self) -> dict[str, Tensor]:
        """Return one tensor per buffer (not copies). Gradients are no state: every step computes them."""
        return dict(self.buffers)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the buffers of `state_dict` back, in place.

        Raises:
            ValueError: a buffer is missing or has another size (the state belongs to another model or recipe).
        """
        for name, buffer in self.buffers.items():
            if name not in state or state[name].shape != buffer.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"flat buffer {name}: expected {tuple(buffer.shape)}, found {found}")
            buffer.copy_(state[name])
        self.cast()

    def __reduce__(self) -> NoReturn:
        raise TypeError("FlatParameters cannot be pickled or copied (views would come apart); save its state_dict()")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.__reduce__()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict's own tensors (not detached copies), each shared tensor once."""
    seen: set[int] = set()
    state = model.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if not (id(t) in seen or seen.add(id(t)))}  # type: ignore[func-returns-value]


def _require_float32(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}; flat parameters are float32 (autocast does the rest)")


def _roles(model: nn.Module) -> dict[str, int]:
    """Return 0 for convolution weights, 1 for linear weights, 2 for other weights; all else is missing."""
    roles = {}
    for path, module in model.named_modules():
        role = 0 if isinstance(module, nn.Conv2d) else 1 if isinstance(module, nn.Linear) else 2
        if isinstance(getattr(module, "weight", None), Tensor):
            roles[f"{path}.weight" if path else "weight"] = role
    return roles


def _padded_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes at which convolutions compute whose weights are narrower, by parameter name."""
    modules = model.named_modules()
    return {f"{path}.weight": m.padded_shape for path, m in modules if isinstance(m, AlignedConv2d) and m.is_padded}


def _lay_out(tensors: dict[str, Tensor], padded: dict[str, tuple[int, ...]]) -> list[Segment]:
    """Place tensors one after the other, each on a multiple of the alignment."""
    segments, offset = [], 0
    for name, tensor in tensors.items():
        # Channels-last weights keep their strides; a slice of something larger is laid out afresh.
        dense = tensor if _dense(tensor) else torch.empty(tensor.shape, device="meta")
        if name in padded:
            dense = torch.empty(padded[name], device="meta", memory_format=torch.channels_last)
        size = dense.numel()
        segments.append(Segment(name, offset, size, tuple(tensor.shape), tuple(dense.stride()), padded.get(name)))
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return segments


def _dense(tensor: Tensor) -> bool:
    """Tell whether the tensor covers its memory without holes or overlaps, in whatever order of dimensions."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _end(segments: list[Segment]) -> int:
    """Return the first aligned element after the last segment."""
    return max((s.offset + -(-s.size // ALIGNMENT) * ALIGNMENT for s in segments), default=0)
