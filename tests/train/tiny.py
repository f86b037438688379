"""A run of a second or two on synthetic images, and how to compare two of them."""

from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.config import Recipe
from fastcifar.run_directory import RunDirectory

TABLE: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "synthetic", "subset": 200, "test_subset": 100, "loader": {"name": "resident"}},
    "model": {"name": "lenet5"},
    "augment": ["crop(4)", "flip"],
    "optimizer": {"name": "adam", "lr": 1e-3},
    "schedule": {"name": "cosine"},
    "train": {"epochs": 4, "batch_size": 32},
    "engine": {"device": "cpu"},
}

CLOCKS = {"seconds", "training_s", "images_per_s"}


def recipe(**changes: Any) -> Recipe:
    """Return the tiny recipe with whole tables replaced."""
    return Recipe.model_validate(TABLE | changes)


def assert_same_run(one: Path, other: Path) -> None:
    """Check that two runs have the same weights, logits and metrics to the bit; only clocks may differ."""
    for name in ("last", "best"):
        file = f"weights/{name}.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()
    a, b = RunDirectory.open(one), RunDirectory.open(other)
    assert sorted(a.logits_keys()) == sorted(b.logits_keys())
    for key in a.logits_keys():
        np.testing.assert_array_equal(a.logits(key), b.logits(key))
    strip = [[{k: v for k, v in row.items() if k not in CLOCKS} for row in run.metrics()] for run in (a, b)]
    assert strip[0] == strip[1]
    for key in ("last", "best", "selected", "status", "epochs_done", "images"):
        assert a.summary[key] == b.summary[key]
