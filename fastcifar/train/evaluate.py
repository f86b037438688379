"""Evaluation: logits of a whole split; every metric is computed from them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.augment.augment import Augment, AugmentBySize
from fastcifar.data.batch import Share
from fastcifar.data.pixels import Images, as_tensor
from fastcifar.errors import root_cause
from fastcifar.train.cuda_graph import GraphedStep, capturing
from fastcifar.train.execution import Forward, compile_model, first_wait, out_of_memory_explained
from fastcifar.train.precision import Precision
from fastcifar.train.ranks import ALONE, Ranks
from fastcifar.train.tta import tta_logits

# Test sets are small and looked at in every epoch: a split is kept on a GPU while it takes no more than this. Larger
# ones are sent batch by batch, and so is every split where the device is the host: its images are read where they lie.
RESIDENT_BYTES = 1 << 30


@dataclass(frozen=True)
class Metrics:
    """What one pass over a split gives.

    Attributes:
        logits: float32 (N, classes), on the CPU.
        accuracy: percent, 0..100.
        loss: mean cross entropy in nats, without label smoothing.
    """

    logits: np.ndarray
    accuracy: float
    loss: float

    def row(self) -> dict[str, float]:
        """Return the metrics without the logits."""
        return {"accuracy": self.accuracy, "loss": self.loss}


def metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Compute accuracy and loss from logits (N, classes) and labels int64 (N,), both on one device."""
    logits = logits.float()
    right = (logits.argmax(1) == labels).sum().item()
    loss = F.cross_entropy(logits, labels).item()
    return Metrics(logits.cpu().numpy(), 100.0 * right / len(labels), loss)


class Evaluator:
    """A model in evaluation mode as a function of uint8 images, at the weights that it has at the moment.

    On a GPU it is compiled, and one batch size is captured as a CUDA graph, which raw and averaged weights share
    because they are swapped in place. Smaller batches then go through padded; each image's logits depend on it alone.

    Args:
        model: the model.
        augment: its ``plain`` normalizes a batch.
        precision: as in training.
        device: where to evaluate.
        batch_size: images a forward pass, B.
        mode: what the training step does: "eager", "compile", "graph" or "compile+graph".
        ranks: those that divide the batches of an evaluation among them.

    Attributes:
        fallback: why less is done than ``mode`` says, or None.
    """

    def __init__(
        self, model: nn.Module, augment: Augment | AugmentBySize, precision: Precision, device: torch.device,
        batch_size: int, mode: str, ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.device, self.batch_size = model, device, batch_size
        self._augment, self._precision, self._ranks = augment, precision, ranks
        self._forward: Forward = compile_model(model) if "compile" in mode else model
        self._wanted = "graph" in mode and device.type == "cuda"
        self._graphs: dict[str, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by kind of test-time augmentation
        self.fallback: str | None = None

    @torch.no_grad()
    def warm_up(self, image_shape: tuple[int, ...], kinds: Iterable[str] = ("none",)) -> None:
        """Compile, and capture where that is wanted.

        Args:
            image_shape: of the uint8 images, (H, W, C).
            kinds: of test-time augmentation that will be asked for.
        """
        self._input = torch.zeros((self.batch_size, *image_shape), dtype=torch.uint8, device=self.device)
        was_training = self.model.training
        self.model.eval()
        with out_of_memory_explained():
            self._rehearse()
            for kind in kinds if self._wanted else ():
                self._capture(kind)
        self.model.train(was_training)

    def _rehearse(self) -> None:
        """Run the model once, without compilation where the compiler fails and the plain model does not."""
        try:
            self.predict(self._input)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._forward is self.model:
                raise
            self._forward = self.model
            self.predict(self._input)
            self.fallback = f"evaluation runs without compilation: {root_cause(error)}"

    def _capture(self, kind: str) -> None:
        waits = GraphedStep.beside(lambda: first_wait(lambda: self.predict(self._input, kind)))
        if waits is not None:
            self.fallback = f"evaluation cannot be captured as a CUDA graph, because it waits for the host: {waits}"
            return
        graph = torch.cuda.CUDAGraph()
        pool = next((captured.pool() for captured, _ in self._graphs.values()), None)
        with capturing(graph, pool):
            output = self.predict(self._input, kind)
        self._graphs[kind] = graph, output

    def predict(self, images: Tensor, tta: str = "none") -> Tensor:
        """Return the logits of uint8 images (B, H, W, C) on the device, operation by operation: float32 (B, K)."""
        with self._precision.autocasting(self.device.type):
            normalized = self._augment.plain(images)
            return tta_logits(self._forward, normalized, tta).float()

    def batch(self, images: Tensor, tta: str = "none") -> Tensor:
        """Return the logits of at most B images, uint8 (b, H, W, C) on any device: float32 (b, K)."""
        if tta not in self._graphs:
            return self.predict(images.to(self.device, non_blocking=True), tta)
        graph, output = self._graphs[tta]
        # The rest of the input keeps old images; nobody reads their logits.
        self._input[: len(images)].copy_(images, non_blocking=True)
        graph.replay()
        # A copy: the next replay writes over the graph's own output.
        return output[: len(images)].clone()

    @torch.no_grad()
    def logits(self, images: Tensor | Images, tta: str = "none") -> Tensor:
        """Return the logits of all images, uint8 (N, H, W, C): float32 (N, K) on the device, in order.

        Ranks take whole batches in turn, so that each image goes through in the company that it has on one device.

        Args:
            images: on any device, or in a store, from which each batch is read when it is its turn.
            tta: test-time augmentation, see `fastcifar.train.tta`.
        """
        was_training = self.model.training
        self.model.eval()
        rank, world, size = self._ranks.place.rank, self._ranks.world, self.batch_size
        starts = range(rank * size, len(images), world * size)
        # Whole batches, because a batch of another size may round differently.
        own = [self.batch(as_tensor(images[start : start + size]), tta) for start in starts]
        if world > 1:
            own = self._of_all_ranks(own, images, rank)
        self.model.train(was_training)
        return torch.cat(own)

    def _of_all_ranks(self, own: list[Tensor], images: Tensor | Images, rank: int) -> list[Tensor]:
        """Return every batch's logits, in order, from those of each rank's batches."""
        size, world = self.batch_size, self._ranks.world
        classes = (own[0] if own else self.batch(as_tensor(images[:1]))).shape[1]
        # The ranks take turns in rounds; one row of a round's table for each rank.
        rounds = -(-len(images) // (size * world))
        table = torch.zeros(rounds, size, classes, device=self.device)
        for row, logits in zip(table, own, strict=False):
            row[: len(logits)] = logits
        whole = self._ranks.assemble(table[None], Share(rank, world))
        return [whole.transpose(0, 1).reshape(-1, classes)[: len(images)]]


class EvaluationSet:
    """Images to evaluate on, normalized on the fly and never augmented.

    Args:
        images: uint8 (N, H, W, C), on any device or in a store.
        labels: int64 (N,).
        evaluator: the model.
    """

    def __init__(self, images: Tensor | Images, labels: np.ndarray, evaluator: Evaluator) -> None:
        self._evaluator, self._images = evaluator, images
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(evaluator.device)

    def __len__(self) -> int:
        return len(self.labels)

    def metrics(self, tta: str = "none") -> Metrics:
        """Return logits, accuracy and loss of the model, at its present weights, on this set."""
        return metrics(self._evaluator.logits(self._images, tta), self.labels)
