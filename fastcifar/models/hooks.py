"""What a model may ask of the training run: four optional methods, found by name on the model and its submodules.

A model that needs none of them is a plain `torch.nn.Module`. Each hook is a protocol of its own:

- `FitsImages`: compute something from training images before the first step (the whitening layer of the speed nets);
- `FollowsEpochs`: change with the epoch (a layer that stops learning);
- `StopsLearning`: have the optimizer leave parameters alone after some epochs;
- `Draws`: draw reproducible random numbers in the forward pass (ShakeDrop).
"""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from fastcifar.data.batch import Share


@runtime_checkable
class FitsImages(Protocol):
    """A module that is fitted to training images once, before the first step of a new run.

    Attributes:
        images_to_fit: how many images it wants.
    """

    images_to_fit: int

    def fit_images(self, images: Tensor) -> None:
        """Take float32 (N, C, H, W), normalized as in training, N at most ``images_to_fit``, on any device."""
        ...


@runtime_checkable
class FollowsEpochs(Protocol):
    """A module that changes with the epoch. Change tensors in place: a captured CUDA graph keeps their addresses."""

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for an epoch, counted from 0."""
        ...


class Learning(NamedTuple):
    """How long a parameter learns.

    Attributes:
        epochs: it changes in the first so many epochs, 0 or more, and never after.
        fade: whether its learning rate falls linearly from its peak to 0 within them, whatever the run's schedule is.
    """

    epochs: int
    fade: bool = False


@runtime_checkable
class StopsLearning(Protocol):
    """A module with parameters that learn in the first epochs only.

    Stopping the gradient is not enough, because weight decay and what is left in the momentum go on moving a parameter;
    `fastcifar.train.freeze` holds it where it is.
    """

    def learning_epochs(self) -> dict[str, Learning]:
        """Return how long some of its parameters learn, by their names in this module; the others always do."""
        ...


@runtime_checkable
class Draws(Protocol):
    """A module whose forward pass draws random numbers from the run's own counter, so that a resume repeats them.

    What it draws for each sample should depend on the sample's place in the global batch, so that ranks do not draw the
    same: `take_share` sets ``share`` on it.
    """

    def bind_counter(self, counter: Tensor, seed: int) -> None:
        """Draw from (seed, counter) from now on; the step adds 1 to ``counter`` before each forward pass.

        Args:
            counter: int64 (1,) on the model's device, values in 0..2**32-1; to be read in each forward pass.
            seed: the run's seed, 0..2**64-1.
        """
        ...


def images_to_fit(model: nn.Module) -> int:
    """Return how many training images the model's modules want to see before the first step."""
    return max((m.images_to_fit for m in model.modules() if isinstance(m, FitsImages)), default=0)


def fit_images(model: nn.Module, images: Tensor) -> None:
    """Hand normalized training images, float32 (N, C, H, W), to every module that wants them."""
    for module in model.modules():
        if isinstance(module, FitsImages):
            module.fit_images(images)


def begin_epoch(model: nn.Module, epoch: int) -> None:
    """Tell every module that follows epochs that one begins, counted from 0."""
    for module in model.modules():
        if isinstance(module, FollowsEpochs):
            module.begin_epoch(epoch)


def learning_epochs(model: nn.Module) -> dict[str, Learning]:
    """Return how long parameters learn that do not learn always, by their names in the model."""
    return {
        f"{path}.{name}" if path else name: learning
        for path, module in model.named_modules()
        if isinstance(module, StopsLearning)
        for name, learning in module.learning_epochs().items()
    }


def bind_counter(model: nn.Module, counter: Tensor, seed: int) -> None:
    """Let every module that draws do so from a counter that the training step owns; call it on the final device.

    The step adds 1 to ``counter`` before each forward pass: the second pass of a SAM step thereby draws new numbers, as
    published. A model without such modules is left alone.
    """
    for module in model.modules():
        if isinstance(module, Draws):
            module.bind_counter(counter, seed)


def take_share(model: nn.Module, share: Share | None) -> None:
    """Tell every module that draws where in the global batch this rank's samples lie; None where they are all of it."""
    if share is not None:
        for module in model.modules():
            if isinstance(module, Draws):
                vars(module)["share"] = share  # not by setattr, which looks for tensors and modules each time
