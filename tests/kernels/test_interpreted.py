"""Every Triton kernel in the interpreter, where no GPU is needed: against torch, numba, the CPU kernels and float64."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import session_seed
from tests.forked import CONTEXT

AT_LEAST = {"philox": 4, "augment": 30, "flat": 150, "batch_norm": 60}  # comparisons, so that none is lost unseen


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the interpreter's process found, by suite."""
    # A process of its own: Triton decides when a kernel is defined whether to interpret it.
    path = tmp_path_factory.mktemp("interpreter") / "told.json"
    process = CONTEXT.Process(target=_interpret, args=(session_seed(request.config), str(path)))
    process.start()
    process.join(580)
    process.kill()  # where it has not ended
    process.join()
    assert process.exitcode == 0  # a traceback is on stderr
    return json.loads(path.read_text())


def _interpret(seed: int, path: str) -> None:
    """Execute the suites in a fork, which has imported torch and, as asserted, none of what is decided here."""
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.kernels.interpret import main

    Path(path).write_text(json.dumps(main(seed)))


@pytest.mark.parametrize("suite", AT_LEAST)
def test_interpreted_kernels_equal_their_references(told: dict[str, Any], suite: str) -> None:
    found = told[suite]
    assert isinstance(found, list), found
    assert len(found) >= AT_LEAST[suite]
    assert [row for row in found if not row[1] <= row[2]] == []
