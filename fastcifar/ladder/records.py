"""Records: what was measured of a row, one folder ``<date>-<row>-<hardware>`` each, with what it was measured by.

``record.json`` holds the row, the published metrics, one result per seed, the means and the p-value. Beside it, each
seed has its log (``metrics.jsonl``, one line per epoch), its resolved ``recipe.toml`` and its ``environment.json`` in
``seed-<n>/``; what a record lacks of these it names as absent. `tools.records` writes records from run directories,
`tools.tables` and ``fastcifar recipes`` read them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastcifar.analysis.statistics import p_value
from fastcifar.errors import UserError
from fastcifar.ladder.metrics import Metrics, metrics_of
from fastcifar.locations import records_folder
from fastcifar.run_records import Count, Percent, Published, Seconds
from fastcifar.text import slug

NAME = "record.json"
FILES = ("metrics.jsonl", "recipe.toml", "environment.json")
"""What a seed's folder holds: its log, its resolved recipe and its environment, as the run directory has them."""


class Strict(BaseModel):
    """Frozen values of the right kinds; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SeedResult(Strict):
    """What one seed came to.

    Attributes:
        seed: of the run.
        last, best, selected: accuracies in percent, as in a run's summary.
        epochs_done, epochs: how far it got.
        complete: whether that is the end.
        training_s: seconds of training.
        images_per_s: training speed.
        date: day of its end, UTC, as ``2026-01-31``.
        git: the clean revision that it ran on.
        tta: of the last epoch with test-time augmentation, in percent; None where the recipe has none.
        precision: ``engine.precision``, or what "auto" stood for; None where the run does not say.
        absent: which of `FILES` the record does not have.
    """

    seed: Count
    last: Percent | None
    best: Percent | None
    selected: Percent | None
    epochs_done: Count
    epochs: Count
    complete: bool
    training_s: Seconds | None
    images_per_s: Seconds | None
    date: str
    git: str = Field(pattern=r"^[0-9a-f]{7,40}$")
    tta: Percent | None = None
    precision: str | None = None
    absent: list[str] = []

    @property
    def rank(self) -> tuple[bool, int, str]:
        """What decides which of two results of one seed counts: how far it got, then its date.

        Complete ones differ by their dates alone, for a recipe may have been given fewer epochs.
        """
        return self.complete, 0 if self.complete else self.epochs_done, self.date


class MeanRow(Strict):
    """A mean over seeds, in percent."""

    mean: Percent
    standard_error: Seconds | None
    n: Count


class Record(Strict):
    """``record.json``: one row on one kind of hardware.

    Attributes:
        row: the recipe's name.
        hardware: as `fastcifar.environment.describe` names it.
        date: day of the newest seed.
        published: what was published for the row, or None.
        seeds: one result each.
        last, best, selected: means over the seeds that got furthest.
        p_value: of ``best`` against the published best; None where there is no test.
        test: which test that is, or why there is none.
    """

    row: str
    hardware: str
    date: str
    published: Published | None
    seeds: list[SeedResult] = Field(min_length=1)
    last: MeanRow | None
    best: MeanRow | None
    selected: MeanRow | None
    p_value: float | None = Field(ge=0, le=1)
    test: str

    @property
    def folder_name(self) -> str:
        """The name of its folder."""
        return f"{self.date}-{self.row}-{slug(self.hardware)}"

    def seed_row(self, seed: SeedResult) -> dict[str, Any]:
        """Return one of its seeds as `fastcifar.ladder.metrics.metrics_of` takes them."""
        return {"id": self.row, "hardware": self.hardware, **seed.model_dump(exclude={"absent"})}


def record_of(row: str, hardware: str, published: dict[str, Any] | None, seeds: Iterable[SeedResult]) -> Record:
    """Return the record of a row's seeds, with its means and its test.

    Args:
        row: the recipe's name.
        hardware: that all of them ran on.
        published: ``best`` and ``last`` in percent, or None.
        seeds: at least one.
    """
    seeds = sorted(seeds, key=lambda seed: seed.seed)
    metrics = metrics_of([seed.model_dump() | {"hardware": hardware} for seed in seeds])
    assert metrics is not None
    p, test = tested(metrics, published)
    return Record.model_validate({
        "row": row, "hardware": hardware, "date": max(seed.date for seed in seeds), "published": published,
        "seeds": [seed.model_dump() for seed in seeds], "p_value": p, "test": test,
        **{which: mean.row() if (mean := getattr(metrics, which)) else None for which in ("last", "best", "selected")},
    })  # fmt: skip


def tested(metrics: Metrics, published: dict[str, Any] | None) -> tuple[float | None, str]:
    """Return the p-value of the seeds' best against the published best, and which test it is or why there is none."""
    if published is None:
        return None, "nothing published: no test"
    if not metrics.complete:
        return None, "not trained to the end: no test"
    values = metrics.best_by_seed
    p = p_value(values, published["best"])
    if p is None:
        return None, f"n = {len(values)}: no test"
    return p, f"two-sided t-test of the published best as one more run of ours, n = {len(values)}"


def read_records(folder: Path | None = None) -> list[Record]:
    """Return the records in a folder, oldest first; the shipped ones where none is named, none where there is none.

    Raises:
        UserError: a record is damaged.
    """
    return [read_record(path) for path in sorted((folder or records_folder()).glob(f"*/{NAME}"))]


def read_record(path: Path) -> Record:
    """Return one record.

    Raises:
        UserError: it is damaged, or its folder bears another name.
    """
    try:
        record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a record ({error}); restore it from git") from None
    if path.parent.name != record.folder_name:
        raise UserError(f"{path.parent}: is the record {record.folder_name}; rename the folder to that")
    return record


def result_rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return one object per row, hardware and seed: of several records of it, that of the highest rank."""
    best: dict[tuple[str, str, int], tuple[Record, SeedResult]] = {}
    for record in records:
        for seed in record.seeds:
            key = record.row, record.hardware, seed.seed
            _, held = best.get(key, (record, seed))
            if seed.rank >= held.rank:
                best[key] = record, seed
    return [record.seed_row(seed) for record, seed in best.values()]
