"""The gpu-marked tests reach what they compare, on a device that computes nothing.

A wrong name, or a tensor that stayed on the CPU, in a test that has no GPU to run on would show on the first GPU only.
"""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.nullgpu.build import CACHE
from tests.nullgpu.harness import ROOT, child_environment

SCRIPT = """
import sys
import pytest
from tests.nullgpu import nullops
nullops.install()
sys.exit(pytest.main(sys.argv[1:]))
"""
# DALI asks the driver for more than the null device has; and what was launched no profiler of torch tells.
LEFT_OUT = "not dali and not native_order and not ledger"


@pytest.mark.nullgpu
@pytest.mark.timeout(1800)
def test_every_gpu_test_fails_by_its_comparison_alone(null_device: Path, tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    report = tmp_path / "report.xml"
    words = ["-q", "-m", "gpu", "-k", LEFT_OUT, "-p", "no:xdist", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-c", SCRIPT, *words, *map(str, files)]
    variables = child_environment(tmp_path, CACHE, True)
    done = subprocess.run(command, cwd=ROOT, env=variables, timeout=1700, capture_output=True, text=True)
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) > 60
    wrong = {
        case.get("name"): message
        for case in cases
        for kind in ("failure", "error")
        for fault in case.iter(kind)
        if not (message := fault.get("message", "")).lower().startswith("assert")
    }
    assert wrong == {}, done.stdout[-10_000:]
