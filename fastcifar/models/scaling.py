"""What dividing a batch among devices costs and gains, on paper: every time here is predicted, never measured.

A step of N devices is the step of one device at an N-th of the batch (`fastcifar.models.gpu_prediction`, from the
ledger of launches), and an all-reduce of the flat gradient for each pass that needs one. Nothing is assumed to overlap:
the all-reduce comes after the backward pass, one call over one buffer. An all-reduce of S bytes over N devices takes

    2 (N - 1) / N * S / bandwidth + latency

(NVIDIA, nccl-tests, doc/PERFORMANCE.md), with the bandwidth of the slowest link on the way: NVLink within a machine,
the network beyond. `LINKS` holds every number that is assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastcifar.config.schema import Recipe
from fastcifar.models.budget import images_to_train, steps_per_epoch
from fastcifar.models.cost import known_cost
from fastcifar.models.gpu_prediction import Card, predict_epoch

PER_MACHINE = 8
"""GPUs of a DGX H100 or an HGX board of eight."""
PREDICTED = "predicted, never measured"


class Link(NamedTuple):
    """A way between GPUs.

    Attributes:
        name: as people call it.
        gbs: peak in one direction, in 1e9 bytes/s for each GPU.
        share: of the peak that large all-reduces reach; a guess.
        latency_s: seconds of an all-reduce of nothing; a guess.
        source: where the peak is from.
    """

    name: str
    gbs: float
    share: float
    latency_s: float
    source: str


# NVLink 4: 18 links of 50 GB/s both ways together, 900 GB/s, half of it in each direction. ConnectX-7: one port of NDR,
# 400 Gb/s, which is 50 GB/s in each direction; a DGX H100 has eight of them, one for each GPU.
LINKS = {
    "nvlink": Link("NVLink 4", 450.0, 0.75, 15e-6, "NVIDIA H100 data sheet: 900 GB/s in both directions"),
    "network": Link("400 Gb/s InfiniBand, a port for each GPU", 50.0 * PER_MACHINE, 0.75, 40e-6,
                    "NVIDIA ConnectX-7 manual: one NDR port; DGX H100 user guide: eight of them"),
    "single": Link("400 Gb/s InfiniBand, one port a machine", 50.0, 0.75, 40e-6, "NVIDIA ConnectX-7 manual"),
}  # fmt: skip


@dataclass(frozen=True)
class Division:
    """How a recipe's step is divided among devices, without any prediction.

    Attributes:
        devices: N.
        largest: samples of the largest part of a full batch.
        smallest: samples of the smallest.
        all_reduces: of the flat gradient in a step: one for each pass, but none for a rank's own ascent step.
        gradient_bytes: of one of them.
        mixing_bytes: of the augmented images that the ranks put together in a step, for CutMix and Mixup.
    """

    devices: int
    largest: int
    smallest: int
    all_reduces: int
    gradient_bytes: int
    mixing_bytes: int

    def lines(self, recipe: Recipe) -> list[str]:
        """Return it in words."""
        each = f"{self.largest:,}" if self.largest == self.smallest else f"{self.smallest:,} or {self.largest:,}"
        found = [
            f"{each} of a batch's {recipe.train.batch_size:,} images on each of {self.devices}; "
            f"{self.all_reduces} all-reduce{'s' * (self.all_reduces > 1)} of {self.gradient_bytes / 1e6:.1f} MB a step"
        ]
        if self.mixing_bytes:
            found.append(f"{self.mixing_bytes / 1e6:.2f} MB of augmented images, put together for the mixing")
        if recipe.engine.batch_norm == "local":
            found.append(f'BatchNorm, where there is any, sees {each} images (engine.batch_norm = "sync": all)')
        return found


def divide(recipe: Recipe, devices: int, parameters: int) -> Division:
    """Return how a recipe's step is divided.

    Args:
        recipe: the run.
        devices: how many, 1 or more.
        parameters: of its model.
    """
    size, passes = recipe.train.batch_size, 2 if recipe.asam else 1
    alone = recipe.asam is not None and recipe.asam.norm == "rank"
    wide = 2 if recipe.engine.gpu_precision in ("bf16", "fp16") else 4
    mixing = size * 3 * 32 * 32 * wide if recipe.mix and devices > 1 else 0
    reduced = 0 if devices == 1 else passes - alone
    return Division(devices, -(-size // devices), size // devices, reduced, 4 * parameters, mixing)


@dataclass(frozen=True)
class StepPrediction:
    """A step's predicted seconds on N devices.

    Attributes:
        devices: N.
        batch: samples on each of them, the largest part.
        compute_s: the step of one device at that batch.
        communication_s: its all-reduces.
        images_per_s: of all devices together.
    """

    devices: int
    batch: int
    compute_s: float
    communication_s: float
    images_per_s: float

    @property
    def step_s(self) -> float:
        """Both, one after the other."""
        return self.compute_s + self.communication_s


def all_reduce_s(nbytes: float, devices: int, network: str = "network") -> float:
    """Return the predicted seconds of one all-reduce.

    Args:
        nbytes: of the buffer.
        devices: how many GPUs; more than `PER_MACHINE` are on several machines.
        network: which of `LINKS` is between machines.
    """
    if devices == 1:
        return 0.0
    links = [LINKS["nvlink"], *([LINKS[network]] if devices > PER_MACHINE else [])]
    slowest = min(link.gbs * link.share for link in links) * 1e9
    return 2 * (devices - 1) / devices * nbytes / slowest + sum(link.latency_s for link in links)


def predict_step(
    recipe: Recipe, devices: int, card: Card, ledger: Mapping[str, dict[str, Any]], network: str = "network"
) -> StepPrediction:
    """Return a step's predicted seconds.

    Args:
        recipe: the run; its batch is divided.
        devices: how many.
        card: the GPU.
        ledger: launches, from `fastcifar.models.gpu_prediction.read_ledger`.
        network: which of `LINKS` is between machines.
    """
    cost = known_cost(recipe.model)
    division = divide(recipe, devices, cost.parameters)
    own = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": division.largest})})
    epoch = predict_epoch(own, card, dict(ledger), cost)
    compute_s = (epoch.epoch_s - epoch.evaluation_s) / steps_per_epoch(own, images_to_train(own))
    reduces = division.all_reduces * all_reduce_s(division.gradient_bytes, devices, network)
    mixing = all_reduce_s(division.mixing_bytes, devices, network) if division.mixing_bytes else 0.0
    step_s = compute_s + reduces + mixing
    return StepPrediction(devices, division.largest, compute_s, reduces + mixing, recipe.train.batch_size / step_s)
