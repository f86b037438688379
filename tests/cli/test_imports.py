"""What a command imports before it knows that its arguments are good: nothing that takes long."""

import json
import subprocess
import sys

import pytest

from tests.command import fastcifar

HEAVY = {"torch", "torchvision", "numpy", "numba", "scipy", "sklearn", "matplotlib", "triton", "PIL"}

# The whole in a process of its own: this one has imported everything already.
SCRIPT = """
import json, sys
from fastcifar.cli.main import main
sys.argv = ["fastcifar", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    status = end.code or 0
print("|" + json.dumps([status, sorted(sys.modules)]))
"""


def imported(*words: str) -> tuple[int, set[str]]:
    """Return a command's exit status and what it imported."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, timeout=300)
    assert "|" in done.stdout, done.stderr
    status, names = json.loads(done.stdout.rsplit("|", 1)[1])
    return status, set(names)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--help"], 0),
        (["recipes"], 0),
        (["report", "nowhere"], 2),
        (["export", "nowhere", "m.pt"], 2),
        (["export", "nowhere", "m.onnx"], 2),
        (["compare", "nowhere", "nowhere-2"], 2),
    ],
    ids=str,
)
def test_a_quick_answer_imports_nothing_heavy(words, expected):
    status, names = imported(*words)
    assert status == expected
    assert not names & HEAVY


def test_voting_imports_neither_scipy_nor_scikit_learn():
    script = "import sys, fastcifar.analysis.combine; sys.exit(len({'scipy', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_models_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path))
    assert fastcifar("models", "lenet5", cwd=tmp_path).returncode == 0  # here, where torch is imported already
    status, names = imported("models", "lenet5")
    assert status == 0
    assert not names & HEAVY
