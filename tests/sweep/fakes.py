"""A sweep whose trials take no time: run directories and the study are real, training is not."""

import math

from fastcifar.run_directory import RunDirectory
from tests.ladder.fakes import epoch_row, summary

EPOCHS = 4
FIXED = ["data.holdout=20", f"train.epochs={EPOCHS}"]
LR = "optimizer.lr=log(0.001, 0.1)"
SCALE = 0.01  # the learning rate that is best on the holdout; the worst one is best on the test set


class FakeRuns:
    """Executes a trial's run epoch by epoch without training: its accuracies follow from the learning rate alone."""

    def __init__(self, before_epoch=lambda job, epoch: None):
        self.trained, self.before_epoch = [], before_epoch

    def __call__(self, job, deadline, progress):
        run = RunDirectory.open(job.folder) if RunDirectory.exists(job.folder) else RunDirectory.create(
            job.folder, job.recipe, {"hardware": "none", "git": "0000000000"}
        )
        for epoch in range(len(run.metrics()) + 1, job.recipe.train.epochs + 1):
            self.before_epoch(job, epoch)
            good = holdout(job.recipe.optimizer.lr) + epoch
            row = epoch_row(epoch, {"raw": {"accuracy": 99 - good, "loss": 1.0}})
            run.append_epoch(row | {"holdout": {"raw": {"accuracy": good, "loss": 1.0}}})
            self.trained.append((job.row, epoch))
            progress(f"epoch {epoch}")
        run.write_summary(summary(job, run))


def holdout(lr):
    return 60 - 20 * abs(math.log10(lr / SCALE))
