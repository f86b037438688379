"""What steps share: the parts of a recipe's training step, its state, and where in an epoch it is."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcifar.config.schema import Recipe
from fastcifar.errors import UserError
from fastcifar.kernels.philox import Stream, philox
from fastcifar.kernels.sam import Ascent
from fastcifar.kernels.sgd_ema import Averages
from fastcifar.models import hooks
from fastcifar.models.batch_norm import set_batches_tracked
from fastcifar.train.cursor import DeviceCursor, HostCursor
from fastcifar.train.distillation import Teacher
from fastcifar.train.ema import averaged
from fastcifar.train.flat_parameters import FlatParameters
from fastcifar.train.optimizers import Optimizer
from fastcifar.train.precision import LossScaler, Precision
from fastcifar.train.ranks import ALONE, Ranks
from fastcifar.train.schedule import LearningRate
from fastcifar.train.selection import Selection
from fastcifar.train.user_optimizer import UserOptimizer

SELECT = "select."  # before the names of the state of what selects samples
USER = "optimizer."  # before the names of the state of an optimizer of the user's own


class Phase(NamedTuple):
    """What the host decides before a step; each combination is a CUDA graph of its own.

    Attributes:
        ascending: whether the step makes SAM's ascent step and a second pass.
        proxy_learns: whether the proxy that selects samples takes a step too.
    """

    ascending: bool
    proxy_learns: bool


PLAIN = Phase(ascending=False, proxy_learns=False)


@dataclass(eq=False)
class StepState:
    """The parts of a training step; `fastcifar.train.step.build_step` puts them together.

    Attributes:
        recipe: the whole recipe.
        model: the model, whose parameters are views of ``flat``.
        augment: (Batch, epoch) -> images (B, C, H, W), normalized.
        mix: CutMix or Mixup, (images, labels, epoch, step) -> (images, target), or None.
        flat: weights, gradients and optimizer state in flat buffers.
        forward: what is called as the model: itself, with a working copy of its weights, compiled or not.
        precision: what autocast does.
        rate: (epoch, step) -> learning rate.
        cursor: the epoch, the step in it and the learning rate, on the device.
        optimizer: moves the weights.
        averages: the moving averages of weights and statistics, or None.
        ascent: the settings of SAM's ascent step, or None for plain gradients.
        scaler: fp16's loss scaler, or None.
        class_weights: float32 (K,), or None.
        forward_passes: int64 (1,), the number of forward passes so far: what random layers draw from.
        losses: float32 (steps_per_epoch,), each step's mean loss, at w and on augmented images; during an epoch, this
            rank's part of it.
        correct: float32 (steps_per_epoch,), how many samples it got right; mixed labels count by their shares. During
            an epoch, of this rank's samples.
        phase: what this step does; the host decides it before each step.
        user_optimizer: the optimizer of the user's own that ``optimizer`` steps, which keeps state of its own, or None.
        ranks: those that divide each batch.
        teacher: the trained model that the student learns from, or None.
        selection: what chooses the samples of a batch to train on, or None for all.
    """

    recipe: Recipe
    model: nn.Module
    augment: Any
    mix: Any
    flat: FlatParameters
    forward: Callable[[Tensor], Tensor]
    precision: Precision
    rate: LearningRate
    cursor: HostCursor | DeviceCursor
    optimizer: Optimizer
    averages: Averages | None
    ascent: Ascent | None
    scaler: LossScaler | None
    class_weights: Tensor | None
    forward_passes: Tensor
    losses: Tensor
    correct: Tensor
    user_optimizer: UserOptimizer | None = None
    ranks: Ranks = ALONE
    teacher: Teacher | None = None
    selection: Selection | None = None
    _sizes: list[int] = field(default_factory=list)
    _epoch: int = 0
    phase: Phase = PLAIN

    # ----------------------------------------------------------------------------------------------------------- phases

    def ascends(self) -> bool:
        """Return whether the next step makes SAM's ascent step and a second pass: from ``asam.start`` of the run on."""
        if self.recipe.asam is None:
            return False
        # By steps done, not by the cursor: that lies on the device, and asking it would wait.
        steps = self.cursor.steps_per_epoch
        return self._epoch * steps + len(self._sizes) >= self.recipe.asam.start * self.recipe.train.epochs * steps

    def next_phase(self) -> Phase:
        """Return the phase of the next step."""
        number = self._epoch * self.cursor.steps_per_epoch + len(self._sizes)
        return Phase(self.ascends(), self.selection is not None and self.selection.learns(number))

    def phases(self) -> list[Phase]:
        """Return the phases of this run."""
        asam, selection = self.recipe.asam, self.selection
        ascending = [False] if asam is None else [False, True] if asam.start else [True]
        learning = [False] if selection is None else selection.phases()
        return [Phase(a, b) for a in ascending for b in learning]

    # ----------------------------------------------------------------------------------------------------------- epochs

    def begin_epoch(self, epoch: int) -> float:
        """Go to the start of an epoch (counted from 0) and return its first learning rate.

        It seeds torch's generator from (seed, epoch, rank), so that dropout is the same after a resume, and tells the
        model (`fastcifar.models.hooks.FollowsEpochs`).
        """
        self.flat.check()
        self.model.train()
        hooks.begin_epoch(self.model, epoch)
        if self.selection is not None:
            self.selection.begin_epoch(epoch)
        if self.teacher is not None:
            self.teacher.begin_epoch(epoch)
        # Each epoch afresh: a resume at its start needs no generator state, and ranks drop different units.
        # On a CPU the GPUs' generators are left alone: where there are none, torch would keep the whole stack of calls
        # for each, which takes longer than a step of a small model.
        generators = torch.default_generator if self.losses.device.type == "cpu" else torch
        generators.manual_seed(torch_seed(self.recipe.seed, epoch, self.ranks.place.rank))
        self.cursor.begin(epoch)
        self._epoch, self._sizes = epoch, []
        return self.rate(epoch, 0)

    def end_epoch(self) -> dict[str, Any]:
        """Return the results of the epoch (or of its steps so far): the one host-device synchronization of an epoch.

        Each rank adds its part, and all have the same results, weights and statistics afterwards: BatchNorm's running
        statistics, which with ``engine.batch_norm = "local"`` are those of each rank's samples, become their mean.

        Returns:
            ``loss`` (mean over samples), ``accuracy`` in percent (both of the first passes, on augmented images),
            ``samples``, and ``nonfinite_step``: the number, from 1, of the epoch's first step whose loss was not
            finite, or None. With ``engine.on_nonfinite = "skip"`` the mean is over the other steps.

        Raises:
            UserError: the ranks' weights have come apart.
        """
        self._join_ranks()
        set_batches_tracked(self.model, self.forward_passes)
        sizes = torch.tensor(self._sizes, dtype=torch.float64)
        # Here the host waits, once an epoch. Sums in float64: 400 epochs of curves should not drift by rounding.
        losses = self.losses[: len(sizes)].to("cpu", torch.float64)
        correct = self.correct[: len(sizes)].to("cpu", torch.float64)
        bad = (~torch.isfinite(losses)).nonzero()
        samples = int(sizes.sum())
        if self.recipe.engine.on_nonfinite == "skip":
            sizes, losses = sizes * torch.isfinite(losses), losses.nan_to_num(0.0, 0.0, 0.0)
        return {
            "loss": float((losses * sizes).sum() / max(int(sizes.sum()), 1)),
            "accuracy": float(100 * correct.sum() / max(samples, 1)),
            "samples": samples,
            "nonfinite_step": int(bad[0]) + 1 if len(bad) else None,
        }

    def _join_ranks(self) -> None:
        self.ranks.sum(self.losses)
        self.ranks.sum(self.correct)
        for name, buffer in self.flat.buffers.items():
            if name.startswith("stats"):  # of the weights, and of each average of them
                self.ranks.mean(buffer)
        self.ranks.require_same(self.flat.weights, "the weights")

    def step_losses(self) -> Tensor:
        """Return the loss of each step of this epoch so far: float32 (steps,), a copy on the host."""
        return self.losses[: len(self._sizes)].cpu().clone()

    # ------------------------------------------------------------------------------------------------------------ state

    def position(self) -> tuple[list[int], dict[str, Tensor]]:
        """Return what a bit-identical resume between two steps of an epoch needs beside `state_dict`.

        `end_epoch` must have joined what the ranks have.

        Returns:
            The samples of each step so far, and tensors: ``losses`` and ``correct`` (steps,), each rank's generator
            states.
        """
        steps = len(self._sizes)
        tensors = {"losses": self.losses[:steps], "correct": self.correct[:steps]}
        tensors |= _by_rank("generator", self.ranks.gather(torch.get_rng_state()))
        if self.losses.is_cuda:
            tensors |= _by_rank("cuda_generator", self.ranks.gather(torch.cuda.get_rng_state(self.losses.device)))
        return list(self._sizes), tensors

    def go_to(self, sizes: list[int], tensors: dict[str, Tensor]) -> None:
        """Go on within the epoch that `begin_epoch` has just begun, from a `position`, of any number of ranks.

        A rank that was not there then keeps the generator that `begin_epoch` has seeded.

        Raises:
            UserError: the position does not fit this epoch.
        """
        steps = len(sizes)
        if steps > self.cursor.steps_per_epoch or any(len(tensors.get(k, ())) != steps for k in ("losses", "correct")):
            raise UserError("the checkpoint's place within the epoch does not fit the recipe: it is damaged")
        if self.ranks.first:  # the others add to it at the end of the epoch
            self.losses[:steps].copy_(tensors["losses"])
            self.correct[:steps].copy_(tensors["correct"])
        else:
            self.losses.zero_()
            self.correct.zero_()
        self._sizes = list(sizes)
        for _ in sizes:
            self.cursor.advance()
        host, device = (_name_of(kind, self.ranks.place.rank) for kind in ("generator", "cuda_generator"))
        if host in tensors:
            torch.set_rng_state(tensors[host])
        if device in tensors and self.losses.is_cuda:
            torch.cuda.set_rng_state(tensors[device], self.losses.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a bit-identical resume at an epoch boundary needs: flat names to tensors (not copies)."""
        state = {f"flat.{name}": tensor for name, tensor in self.flat.state_dict().items()}
        state["forward_passes"] = self.forward_passes
        # What is not floating point is in no flat buffer: counters such as num_batches_tracked.
        state |= {f"model.{n}": t for n, t in self.model.state_dict().items() if not t.is_floating_point()}
        if self.selection is not None:
            state |= {f"{SELECT}{name}": tensor for name, tensor in self.selection.tensors().items()}
        if self.scaler is not None:
            state |= {f"scaler.{name}": tensor for name, tensor in self.scaler.tensors().items()}
        if self.user_optimizer is not None:
            state |= {f"{USER}{name}": tensor for name, tensor in self.user_optimizer.tensors().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of `state_dict` back, in place.

        Raises:
            ValueError: a tensor is missing or has another size.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(USER)}
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                raise ValueError(f"{name} is missing or has another size: the state belongs to another recipe")
        for name, tensor in own.items():
            # In place: a captured graph keeps reading the old addresses.
            tensor.copy_(state[name])
        if self.user_optimizer is not None:
            self.user_optimizer.load_tensors({k.removeprefix(USER): v for k, v in state.items() if k.startswith(USER)})
        self.flat.cast()

    def follow_first(self) -> None:
        """Take up the state of rank 0: at the start of a run, and where it has read a checkpoint."""
        if self.ranks.world == 1:
            return
        self.ranks.broadcast(tensor for name, tensor in self.state_dict().items() if not name.startswith(USER))
        if self.user_optimizer is not None:
            state = self.ranks.from_first({k: v.cpu() for k, v in self.user_optimizer.tensors().items()})
            self.user_optimizer.load_tensors(state)
        self.flat.cast()

    def changing(self) -> Iterable[Tensor]:
        """Return every tensor that a step changes and that matters after it: what a warm-up has to put back.

        The state of an optimizer of the user's own comes and goes; its `unchanged` keeps that.
        """
        own = [tensor for name, tensor in self.state_dict().items() if not name.startswith(USER)]
        tensors = [*own, *self.cursor.tensors(), self.losses, self.correct]
        return tensors if self.flat.working_copy is None else [*tensors, self.flat.working_copy]

    def weights(self, which: str) -> AbstractContextManager[None]:
        """Return a context in which the model has its "raw" or averaged ("ema") weights and BatchNorm statistics.

        Raises:
            ValueError: the recipe has no moving average, or there are no such weights.
        """
        if which == "raw":
            return nullcontext()
        if which != "ema":
            raise ValueError(f'"{which}": the weights are "raw" or "ema"')
        if self.averages is None:
            raise ValueError("the recipe has no ema, so there are no averaged weights")
        return averaged(self.flat, self.averages)


def _by_rank(kind: str, states: list[Tensor]) -> dict[str, Tensor]:
    return {_name_of(kind, rank): state for rank, state in enumerate(states)}


def _name_of(kind: str, rank: int) -> str:
    """Return the name of a rank's generator in a checkpoint; rank 0's is that of a run on one device."""
    return f"{kind}.{rank}" if rank else kind


def torch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Return the seed of torch's own generator for an epoch on a rank: 0..2**63-1, a function of the run's seed."""
    words = philox(seed, torch.tensor([rank]), epoch, 0, Stream.TORCH)
    return int(words[0]) | (int(words[1]) >> 1) << 32
