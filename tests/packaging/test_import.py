"""``import fastcifar`` is silent and light, and says which version it is."""

import subprocess
import sys
from importlib import metadata

import fastcifar

HEAVY = ("torch", "numpy", "numba", "typer", "pydantic", "rich")
CODE = f"import sys, fastcifar; print([name for name in {HEAVY} if name in sys.modules], fastcifar.__version__)"


def test_importing_warns_of_nothing_and_loads_nothing_heavy(tmp_path):
    command = [sys.executable, "-W", "error", "-c", CODE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"[] {fastcifar.__version__}\n"


def test_the_installed_version_is_the_packages_own():
    assert metadata.version("fastcifar") == fastcifar.__version__
