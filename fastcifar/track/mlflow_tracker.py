"""MLflow: a run of the experiment ``fastcifar``, where MLFLOW_TRACKING_URI says, else in ``./mlruns.db``."""

import os
from typing import Any

from fastcifar.config import Recipe
from fastcifar.run_directory import RunDirectory
from fastcifar.run_records import flat
from fastcifar.track import Tracker

LONGEST_PARAMETER = 500
MOST_PARAMETERS = 100  # in one call


class MLflow(Tracker):
    """Logs through a client of its own, so that another run that is active in the process is left alone."""

    name = "mlflow"
    _client: Any = None
    _id = ""

    def begin(self, run: RunDirectory, recipe: Recipe, known: str | None, done: int) -> str:
        """Open the run, or go on with it."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlruns.db"))
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self._id = known
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastcifar")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=run.folder.name).info.run_id
        told = flat(recipe.model_dump(mode="json"), "/")
        parameters = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in told.items()]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + MOST_PARAMETERS])
        return self._id

    def log(self, values: dict[str, float], epoch: int) -> None:
        """Log an epoch, its time being now."""
        import time

        from mlflow.entities import Metric

        now = int(1e3 * time.time())
        self._client.log_batch(self._id, metrics=[Metric(key, value, now, epoch) for key, value in values.items()])

    def end(self, finished: bool) -> None:
        """Say how the run ended; one that may go on is "KILLED" until then."""
        if self._client is not None:
            self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


def make() -> MLflow:
    """Return the tracker."""
    return MLflow()
