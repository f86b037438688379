"""What trackers have read back is what ``metrics.jsonl`` says: each epoch once, over resumed runs too."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import fastcifar
from fastcifar import track
from fastcifar.errors import UserError
from fastcifar.run_records import flat_metrics
from tests.train.tiny import TABLE

# Of the trackers' packages about themselves and each other.
pytestmark = pytest.mark.filterwarnings("default")
EPOCHS = 3


def run_twice(out: Path, name: str) -> fastcifar.RunDirectory:
    """Train, stop, go on; and go on once more, to the end."""
    recipe = fastcifar.Recipe.model_validate(TABLE | {"track": [name], "train": {"epochs": EPOCHS, "batch_size": 50}})
    fastcifar.train(recipe, out=out, stop_after=1, quiet=True)
    return fastcifar.train(resume=out, quiet=True)


def expected(run: fastcifar.RunDirectory) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in run.metrics():
        for key, value in flat_metrics(row).items():
            found.setdefault(key, {})[row["epoch"]] = value
    assert {"train_loss", "lr", "test/raw/accuracy", "images_per_s"} <= set(found)
    return found


def test_tensorboard(tmp_path):
    run = run_twice(tmp_path / "run", "tensorboard")
    assert read_tensorboard(run) == {
        key: {epoch: pytest.approx(value, rel=1e-6) for epoch, value in of.items()} for key, of in expected(run).items()
    }


def read_tensorboard(run: fastcifar.RunDirectory) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    scalars = {key: events.Scalars(key) for key in events.Tags()["scalars"]}
    assert all(len({e.step for e in of}) == len(of) for of in scalars.values()), "an epoch twice"
    return {key: {event.step: event.value for event in of} for key, of in scalars.items()}


def test_what_a_killed_run_had_not_handed_over_is_handed_over_later(tmp_path):
    run = run_twice(tmp_path / "run", "tensorboard")
    for file in (run.folder / "tensorboard").iterdir():
        file.unlink()
    (run.folder / "track" / "tensorboard.json").write_text('{"id": "tensorboard", "epoch": 0}')
    tracker = track.make_trackers(["tensorboard"])[0]
    tracker.on_run_begin(run, run.recipe)
    tracker.on_run_end(run, run.summary)
    assert sorted(read_tensorboard(run)["train_loss"]) == [1, 2, 3]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = run_twice(tmp_path / "run", "wandb")
    found: dict[str, dict[int, float]] = {}
    for file in sorted((run.folder / "track").rglob("*.wandb")):
        read_wandb(file, found)
    assert found == expected(run)


def read_wandb(file: Path, found: dict[str, dict[int, float]]) -> None:
    """Read an offline run: protocol buffers in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = (1 << 15) - at % (1 << 15)
        if left < 7:  # no header fits into the rest of a block
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                add_history(record.history, found)


def add_history(history: Any, found: dict[str, dict[int, float]]) -> None:
    for item in history.item:
        key = "/".join(item.nested_key) or item.key
        if not key.startswith("_"):
            found.setdefault(key, {})[history.step.num] = json.loads(item.value_json)


def test_mlflow_in_a_local_file(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = run_twice(tmp_path / "run", "mlflow")
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("fastcifar").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["model/name"] == "lenet5"
    keys = expected(run)
    history = {key: {m.step: m.value for m in client.get_metric_history(found.info.run_id, key)} for key in keys}
    assert history == keys


def test_trackio_in_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = run_twice(tmp_path / "run", "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (kept,) = [json.loads((run.folder / "track" / "trackio.json").read_text())["id"]]
    logs = SQLiteStorage.get_logs("fastcifar", kept)
    keys = expected(run)
    assert {key: {log["step"]: log[key] for log in logs} for key in keys} == keys


def test_a_missing_package_is_one_message_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'track: "wandb" is not installed.*\[wandb\]'):
        fastcifar.train(fastcifar.Recipe.model_validate(TABLE | {"track": ["wandb"]}), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_tracker_that_fails_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    from fastcifar.track.tensorboard_tracker import TensorBoard

    def broken(self, values, epoch):
        raise OSError("no connection")

    monkeypatch.setattr(TensorBoard, "log", broken)
    run = run_twice(tmp_path / "run", "tensorboard")
    assert run.finished
    assert capsys.readouterr().err.count("no connection; training goes on without it") == 2  # once in each process


def test_an_unknown_tracker_is_refused():
    with pytest.raises(UserError, match="tensorboard, wandb, mlflow, trackio"):
        fastcifar.load_recipe("smoke", set={"track": ["tensorbord"]})


def test_no_tracker_writes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_twice(tmp_path / "run", "tensorboard")
    assert os.listdir(tmp_path) == ["run"]
