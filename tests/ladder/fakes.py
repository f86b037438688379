"""A ladder whose rows take no time: run directories are real, training is not."""

import hashlib

from fastcifar.config import CombineRecipe
from fastcifar.run_directory import RunDirectory


class FakeRows:
    """Executes jobs as a runner does: epoch by epoch, resumable, with results that depend on row and seed only.

    Attributes:
        trained: epochs that were executed, as (row, seed, epoch).
        before_epoch: called before each of them; may raise, as an interrupt does.
        bad: rows that fail, with the exception to fail with.
    """

    def __init__(self, before_epoch=lambda job, epoch: None, bad=None):
        self.trained, self.before_epoch, self.bad = [], before_epoch, bad or {}

    def __call__(self, job, deadline, progress):
        if job.row in self.bad:
            raise self.bad[job.row]
        run = self._open(job)
        epochs = 1 if isinstance(job.recipe, CombineRecipe) else min(job.recipe.train.epochs, 3)
        for epoch in range(len(run.metrics()) + 1, epochs + 1):
            self.before_epoch(job, epoch)
            run.append_epoch(epoch_row(epoch, {"raw": {"accuracy": accuracy(job, epoch), "loss": 1.0}}))
            self.trained.append((job.row, job.seed, epoch))
            progress(f"epoch {epoch}")
        self.before_epoch(job, epochs + 1)
        run.write_summary(summary(job, run))

    @staticmethod
    def _open(job):
        if (job.folder / "recipe.toml").is_file():
            return RunDirectory.open(job.folder)
        return RunDirectory.create(job.folder, job.recipe, {"hardware": "none", "git": "0000000000"})


def epoch_row(epoch, test):
    """Return a line of ``metrics.jsonl``."""
    seconds = {"seconds": 1.0, "training_s": 1.0, "images_per_s": 100.0}
    return {"epoch": epoch, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 50.0, "images": 100, "test": test} | seconds


def accuracy(job, epoch):
    """Return a made-up accuracy in percent."""
    digest = hashlib.sha256(f"{job.row} {job.seed} {epoch}".encode()).digest()
    return 90 + digest[0] / 100


def summary(job, run):
    rows = [{"epoch": row["epoch"], "accuracy": row["test"]["raw"]["accuracy"], "loss": 1.0} for row in run.metrics()]
    return {
        "name": job.recipe.name, "status": "finished", "epochs": len(rows), "epochs_done": len(rows), "weights": "raw",
        "last": rows[-1], "best": max(rows, key=lambda row: row["accuracy"]), "selected": None, "seed": job.seed,
        "clocks": {"total_s": 2.0, "training_s": 1.0, "compilation_s": 0.0}, "images_per_s": 1000.0,
        "git": "0000000000",
    }  # fmt: skip


class Quiet:
    """A view that remembers what it was told."""

    def __init__(self):
        self.said, self.tables = [], []

    def update(self, rows):
        self.tables.append(rows)

    def say(self, text):
        self.said.append(text)


def stop_early(run, epochs):
    """Turn a finished fake run into one that was cut after so many epochs."""
    run.commit(run.metrics_file(run.metrics()[:epochs]), remove=["summary.json"])
