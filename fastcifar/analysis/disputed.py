"""What CIFAR-10's test set says about itself: the 54 labels that human annotators dispute.

Northcutt, Athalye and Mueller ("Pervasive Label Errors in Test Sets Destabilize Machine Learning Benchmarks", NeurIPS
2021, labelerrors.com) let five people look at each of 275 doubtful test images. ``disputed_cifar10.json`` holds the 54
whose given label fewer than three of them chose, with their votes and the source. No model of ours had a part in it.
"""

import json
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from fastcifar.analysis.statistics import binomial_error

TEST_IMAGES = 10_000
MAJORITY = 3


@cache
def disputed_labels() -> dict[str, Any]:
    """Return the file: ``source``, ``paper``, ``rule``, and ``rows`` as dicts by its ``columns``."""
    found = json.loads(resources.files("fastcifar.analysis").joinpath("disputed_cifar10.json").read_text("utf-8"))
    return {**found, "rows": [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]}


def applies(source: str, labels: np.ndarray) -> bool:
    """Whether these are the labels of CIFAR-10's whole test set, in its own order.

    Args:
        source: the data set's name.
        labels: int64 (N,).
    """
    rows = disputed_labels()["rows"]
    return (
        source == "cifar10"
        and len(labels) == TEST_IMAGES
        and all(int(labels[entry["row"]]) == entry["given"] for entry in rows)
    )


def about_the_test_set(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the accuracy with and without the disputed images, in percent, and what the model says of each of them.

    Args:
        logits: float (10000, 10), on CIFAR-10's whole test set.
        labels: int64 (10000,); see `applies`.
    """
    entries = disputed_labels()["rows"]
    rows = np.array([entry["row"] for entry in entries])
    right = logits.argmax(1) == labels
    kept = np.ones(len(labels), bool)
    kept[rows] = False
    correctable = [entry for entry in entries if entry["votes_other"] >= MAJORITY]
    return {
        **{key: disputed_labels()[key] for key in ("source", "paper", "rule")},
        "images": len(rows),
        "accuracy": 100 * float(right.mean()),
        "accuracy_without": 100 * float(right[kept].mean()),
        "standard_error_without": binomial_error(100 * float(right[kept].mean()), int(kept.sum())),
        "mistakes": int((~right).sum()),
        "mistakes_disputed": int((~right[rows]).sum()),
        "correctable": len(correctable),
        "as_annotators": sum(int(logits[entry["row"]].argmax()) == entry["other"] for entry in correctable),
        "votes": entries,
    }
