"""Every Triton kernel in the interpreter, where no GPU is needed: against torch, numba, the CPU kernels and float64."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import session_seed

ROOT = Path(__file__).parents[2]
AT_LEAST = {"philox": 4, "augment": 30, "flat": 150, "batch_norm": 60}  # comparisons, so that none is lost unseen


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the interpreter's process found, by suite."""
    # A process of its own: Triton decides when a kernel is defined whether to interpret it.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpret", str(session_seed(request.config))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("suite", AT_LEAST)
def test_interpreted_kernels_equal_their_references(told: dict[str, Any], suite: str) -> None:
    found = told[suite]
    assert isinstance(found, list), found
    assert len(found) >= AT_LEAST[suite]
    assert [row for row in found if not row[1] <= row[2]] == []
