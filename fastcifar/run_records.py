"""What the JSON files of a run directory may hold: kinds and ranges, checked before anything is used.

Unknown keys pass, so that a run of a slightly newer version can be read.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastcifar.errors import UserError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Weights = Literal["raw", "ema"]


class Record(BaseModel):
    """Values are never coerced, but for whole numbers where a float is wanted."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Metrics(Record):
    """Accuracy in percent and mean cross entropy in nats."""

    accuracy: Percent
    loss: Finite


class EpochMetrics(Metrics):
    """The metrics of one epoch, and how it was chosen."""

    epoch: Count
    protocol: str = ""
    holdout_accuracy: Percent | None = None


class TtaMetrics(Metrics):
    """The metrics under test-time augmentation."""

    kind: str


class Clocks(Record):
    """Seconds by name."""

    total_s: Seconds
    training_s: Seconds
    compilation_s: Seconds


class Member(Record):
    """A run that a combination combined, with how far it had come, and its own accuracies."""

    name: str
    run: str
    status: Literal["finished", "stopped"] = "finished"
    epochs_done: Count = 0
    epochs: Count = 0
    recipe_differs: list[str] | None = None
    last: Percent | None = None
    best: Percent | None = None
    selected: Percent | None = None
    tta: Percent | None = None


class Published(Record):
    """What was published, in percent."""

    best: Percent
    last: Percent | None = None


class Summary(Record):
    """``summary.json``."""

    format: Annotated[int, Field(ge=1)]
    name: str
    status: Literal["finished", "stopped"]
    epochs: Count
    epochs_done: Count
    seed: Count
    weights: Weights
    clocks: Clocks
    stage: str = ""
    last: EpochMetrics | None
    best: EpochMetrics | None = None
    selected: EpochMetrics | None = None
    tta: TtaMetrics | None = None
    published: Published | None = None
    images: Count = 0
    images_per_s: Seconds | None = None
    loader: str | None = None
    git: str | None = None
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    image_px: Annotated[int, Field(ge=1, le=1 << 16)] = 32
    members: Annotated[list[Member], Field(min_length=1)] | None = None
    combined: dict[str, dict[str, Any]] | None = None
    how: str | None = None
    source: str | None = None


class EpochRow(Record):
    """One line of ``metrics.jsonl``."""

    epoch: Annotated[int, Field(ge=1, le=2**53)]
    lr: Finite
    train_loss: Finite
    train_accuracy: Percent
    images: Count
    seconds: Seconds
    training_s: Seconds
    images_per_s: Seconds
    test: dict[Weights, Metrics] = {}
    holdout: dict[Weights, Metrics] = {}


class Resumption(Record):
    """Where a run went on in another environment than before: after so many epochs."""

    epochs_done: Count
    hardware: str | None = None
    git: str | None = None
    packages: dict[str, str] = {}


class Environment(Record):
    """``environment.json``: where a run began and, in ``resumed``, where it went on, if that was another place."""

    hardware: str | None = None
    packages: dict[str, str] = {}
    git: str | None = None
    precision: Literal["bf16", "fp32"] | None = None
    epoch_order: Literal["random", "block"] | None = None
    resumed: list[Resumption] = []


class Partial(Record):
    """How far a run is within an epoch.

    Attributes:
        steps: finished steps of the epoch.
        sizes: the samples of each finished step.
        before: the clocks at the epoch's start.
    """

    steps: Annotated[int, Field(ge=1, le=2**53)]
    sizes: list[Count]
    before: Clocks


class State(Record):
    """``state.json`` of a checkpoint: the plain values of `fastcifar.train.results.Progress`.

    Attributes:
        recipe: the hash of the run's ``recipe.toml``.
        weights: the hashes of the best and the selected weights; an earlier version wrote none.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    recipe: str
    epochs_done: Count
    images: Count
    timed_images: Seconds
    last: EpochMetrics | None
    best: EpochMetrics | None
    selected: EpochMetrics | None
    clocks: Clocks
    partial: Partial | None = None
    weights: dict[Literal["best", "selected"], str] = {}


def flat(table: dict[str, Any], separator: str) -> dict[str, Any]:
    """Return the values of nested tables by their joined keys, lists as they are."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= {f"{key}{separator}{below}": v for below, v in flat(value, separator).items()}
        else:
            found[key] = value
    return found


def flat_metrics(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of ``metrics.jsonl`` by key, such as ``test/ema/accuracy``, without its epoch."""
    numbers = {key: value for key, value in flat(row, "/").items() if key != "epoch"}
    return {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}


def parse_json(data: bytes, path: Path) -> Any:
    """Read JSON text of UTF-8, without NaN and infinities.

    Raises:
        UserError: it is none.
    """
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); train the run again") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def checked(kind: type[Record], value: Any, path: Path, where: str = "") -> dict[str, Any]:
    """Return ``value`` where it is of that kind.

    Args:
        kind: the model.
        value: what was read.
        path: the file, for the message.
        where: more of the place, such as a line.

    Raises:
        UserError: the message names the file, the key and what is wrong.
    """
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UserError(
            f"{path}: {where}{key[:200]}: {first['msg'][:200]}; the file is damaged, train the run again"
        ) from None
    return value
