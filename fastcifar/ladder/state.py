"""What became of each row so far, read from the run directories alone, so that nothing can disagree with them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcifar.analysis.statistics import Difference, Mean, difference
from fastcifar.config import CombineRecipe, Recipe
from fastcifar.errors import UserError
from fastcifar.ladder.metrics import Metrics, metrics_of
from fastcifar.ladder.rows import Job, catalogue
from fastcifar.run_directory import RunDirectory

DONE, RUNNING, CUT, FAILED, BLOCKED, WAITING = "done", "running", "cut", "failed", "blocked", "waiting"


@dataclass(frozen=True)
class Note:
    """What this execution knows about a job beyond its directory: it runs, it failed, or it waits for a failed one."""

    state: str
    message: str = ""


def stored_state(job: Job) -> str:
    """Return ``done``, ``cut`` (there is something to resume) or ``waiting``.

    Raises:
        UserError: the directory holds a run of other settings, or is damaged.
    """
    if not RunDirectory.exists(job.folder):
        return WAITING
    run = RunDirectory.open(job.folder)
    if _settings(run.recipe) != _settings(job.recipe):
        raise UserError(
            f"{job.folder}: holds a run of other settings than {job.row} has now; move it away, or choose another --out"
        )
    return DONE if run.finished else CUT


def _settings(recipe: Recipe | CombineRecipe) -> dict[str, Any]:
    """Return what decides a run's result: the recipe without its texts and published metrics."""
    return recipe.model_dump(exclude={"name", "title", "stage", "published", "target"})


def job_record(job: Job, note: Note | None = None) -> dict[str, Any]:
    """Return one job as it goes into ``ladder.json``."""
    try:
        state, found = stored_state(job), _measured(job)
        message = ""
    except UserError as error:
        state, found, message = FAILED, {}, str(error)
    if note and state != DONE:
        state, message = note.state, note.message
    return {"seed": job.seed, "state": state, "message": message, "run": str(job.folder), **_EMPTY, **found}


_EMPTY: dict[str, Any] = dict.fromkeys(
    ("last", "best", "selected", "tta", "training_s", "total_s", "images_per_s", "hardware", "date", "git")
) | {"epochs_done": 0, "epochs": 0, "complete": False}


def _measured(job: Job) -> dict[str, Any]:
    """Return the metrics in a run directory: its summary's, or its metrics' where it has not ended."""
    if not RunDirectory.exists(job.folder):
        return {}
    run = RunDirectory.open(job.folder)
    if run.has_summary:
        return result_row(run)
    rows = run.metrics()
    return {"epochs_done": len(rows), "epochs": _epochs(job)}


def _epochs(job: Job) -> int:
    train = getattr(job.recipe, "train", None)
    return train.epochs if train else 0


def result_row(run: RunDirectory) -> dict[str, Any]:
    """Return a run's results in the form of the ladder's results file; accuracies in percent."""
    summary = run.summary
    accuracies = {which: (summary.get(which) or {}).get("accuracy") for which in ("last", "best", "selected", "tta")}
    ended = time.gmtime(run.ended_at)
    return {
        **accuracies,
        "epochs_done": summary["epochs_done"],
        "epochs": summary["epochs"],
        "hardware": run.environment.get("hardware"),
        "date": time.strftime("%Y-%m-%d", ended),
        "training_s": summary["clocks"]["training_s"],
        "total_s": summary["clocks"]["total_s"],
        "images_per_s": summary["images_per_s"],
        "git": summary.get("git"),
        "complete": summary["status"] == "finished",
    }


@dataclass(frozen=True)
class Row:
    """One row of the table: a recipe over its seeds.

    Attributes:
        name, title, stage: of the recipe.
        state: the worst status of its seeds.
        message: what went wrong, or how far the running seeds are.
        published_best, published_last: in percent, where published.
        metrics: over the seeds that have results, None where none has.
        seeds: one record per seed, as in ``ladder.json``.
    """

    name: str
    title: str
    stage: str
    state: str
    message: str
    published_best: float | None
    published_last: float | None
    metrics: Metrics | None
    seeds: list[dict[str, Any]]

    @property
    def best(self) -> Mean | None:
        """Ours, at the best epochs on the test set."""
        return self.metrics.best if self.metrics else None

    @property
    def last(self) -> Mean | None:
        """Ours, at the last epochs."""
        return self.metrics.last if self.metrics else None

    @property
    def difference_best(self) -> Difference | None:
        """Best minus published best, once the row is complete."""
        return difference(self.best, self.published_best) if self._complete else None

    @property
    def difference_last(self) -> Difference | None:
        """Last minus published last, once the row is complete."""
        return difference(self.last, self.published_last) if self._complete else None

    @property
    def _complete(self) -> bool:
        return self.metrics is not None and self.metrics.complete

    @property
    def wall_clock_s(self) -> float | None:
        """Seconds of all seeds together."""
        known = [seed["total_s"] for seed in self.seeds if seed["total_s"] is not None]
        return sum(known) if known else None


# The worst status of a row's seeds is the row's.
_WORST_FIRST = (RUNNING, FAILED, BLOCKED, CUT, WAITING, DONE)


class Ledger:
    """All jobs with what is known of them; done ones are read from their directories once.

    Attributes:
        jobs: in the order to run them.
        notes: by run directory, what only this execution of the ladder knows.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self.notes: dict[Path, Note] = {}
        self._done: dict[Path, dict[str, Any]] = {}

    def is_done(self, folder: Path) -> bool:
        """Whether the job of that run directory is finished."""
        job = next(job for job in self.jobs if job.folder == folder)
        return self._record(job)["state"] == DONE

    def table(self, others: Sequence[Job] = ()) -> list[Row]:
        """Return the table of all jobs, and of others, one row per recipe, in the ladder's order."""
        by_row: dict[str, list[Job]] = {}
        for job in {job.folder: job for job in (*others, *self.jobs)}.values():
            by_row.setdefault(job.row, []).append(job)
        in_order = [name for name in catalogue() if name in by_row]
        return [self._row(name, sorted(by_row[name], key=lambda job: job.seed)) for name in in_order]

    def _record(self, job: Job) -> dict[str, Any]:
        if job.folder in self._done:
            return self._done[job.folder]
        record = job_record(job, self.notes.get(job.folder))
        if record["state"] == DONE:
            self._done[job.folder] = record
        return record

    def _row(self, name: str, jobs: list[Job]) -> Row:
        return _row(name, jobs[0].recipe, [self._record(job) for job in jobs])


def _row(name: str, recipe: Recipe | CombineRecipe, seeds: list[dict[str, Any]]) -> Row:
    published = recipe.published
    worst = min(seeds, key=lambda seed: _WORST_FIRST.index(seed["state"]))
    return Row(
        name=name,
        title=recipe.title,
        stage=recipe.stage,
        state=worst["state"],
        message=_running_in_words(seeds) or worst["message"],
        published_best=published.best if published else None,
        published_last=published.last if published else None,
        metrics=metrics_of([seed for seed in seeds if seed["last"] is not None]),
        seeds=seeds,
    )


def _running_in_words(seeds: list[dict[str, Any]]) -> str:
    """Return how far the running seeds are, one after the other."""
    return "; ".join(seed["message"] for seed in seeds if seed["state"] == RUNNING and seed["message"])


def content(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the table as plain values, as ``ladder.json`` holds it."""
    return {"format": 1, "rows": [_row_json(row) for row in rows]}


def _row_json(row: Row) -> dict[str, Any]:
    metrics = row.metrics
    return {
        "name": row.name,
        "title": row.title,
        "stage": row.stage,
        "state": row.state,
        "message": row.message,
        "published": {"best": row.published_best, "last": row.published_last},
        "best": _mean_json(row.best),
        "last": _mean_json(row.last),
        "selected": _mean_json(metrics.selected if metrics else None),
        "difference_best": _difference_json(row.difference_best),
        "difference_last": _difference_json(row.difference_last),
        "complete": bool(metrics and metrics.complete),
        "wall_clock_s": row.wall_clock_s,
        "images_per_s": metrics.images_per_s if metrics else None,
        "seeds": row.seeds,
    }


def _mean_json(value: Mean | None) -> dict[str, Any] | None:
    return value.row() if value else None


def _difference_json(value: Difference | None) -> dict[str, Any] | None:
    return {"points": value.points, "standard_error": value.error} if value else None
