"""``fastcifar doctor``: what works, what is missing, and the fix."""

import json
import sys

import pytest

from fastcifar.cli import doctor

PROBES = {name: f"print('{name}-1.0')" for name in doctor.PROBES}


@pytest.fixture
def probes(monkeypatch, tmp_path):
    """Stand-ins for the imports, which a test may change; no data in sight."""
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    probes = dict(PROBES)
    monkeypatch.setattr(doctor, "PROBES", probes)
    return probes


def by_name() -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in doctor.diagnose()}


def test_everything_is_named(probes):
    checks = by_name()
    assert set(checks) == {"python", "torch", "gpu", "triton", "numba", "ffcv", "dali", "c++", "data"}
    assert checks["ffcv"] == {"name": "ffcv", "status": "works", "detail": "ffcv-1.0", "fix": ""}
    assert checks["data"]["status"] == "missing"
    assert checks["data"]["fix"] == "fastcifar data fetch"


@pytest.mark.parametrize(("name", "module"), [("ffcv", "ffcv"), ("dali", "nvidia"), ("triton", "triton")])
def test_a_missing_package_has_a_cure(probes, name, module):
    probes[name] = f"raise ModuleNotFoundError(\"No module named '{module}'\")"
    check = by_name()[name]
    assert check["status"] == "missing"
    assert "make environment" in check["fix"]


def test_a_package_that_crashes_is_broken_and_the_doctor_goes_on(probes):
    probes["dali"] = "import os, sys; print('bad library', file=sys.stderr, flush=True); os.abort()"
    check = by_name()["dali"]
    assert check["status"] == "broken"
    assert "bad library" in check["detail"]


def test_ffcv_without_its_system_packages_names_them(probes, monkeypatch):
    monkeypatch.setattr(doctor, "_has_ffcv_system", lambda: False)
    probes["ffcv"] = "raise ImportError('libopencv_core.so: cannot open shared object file')"
    check = by_name()["ffcv"]
    assert check["status"] == "broken"
    assert check["fix"].startswith("sudo apt-get install pkg-config libopencv-dev libturbojpeg0-dev && ")


def test_a_gpu_is_named_by_torch(probes):
    probes["torch"] = "print('2.11.0'); print('NVIDIA H200, 139 GiB, CUDA 13.0')"
    assert by_name()["gpu"]["detail"] == "NVIDIA H200, 139 GiB, CUDA 13.0"


def test_torch_works_where_only_the_gpu_does_not(probes, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor, "_has_ffcv_system", lambda: True)
    probes["torch"] = "print('2.11.0', flush=True); raise RuntimeError('CUDA driver is too old')"
    checks = by_name()
    assert checks["torch"]["status"] == "works"
    assert checks["gpu"]["status"] == "broken"
    assert "too old" in checks["gpu"]["detail"]


def test_the_thread_count_of_this_process_stays(probes):
    import torch

    probes["ffcv"] = "import torch; torch.set_num_threads(1); print('ffcv-1.0')"
    before, imported = torch.get_num_threads(), set(sys.modules)
    doctor.diagnose()
    assert torch.get_num_threads() == before
    assert not {"ffcv", "nvidia.dali"} & (set(sys.modules) - imported)


def test_json_goes_to_stdout_and_the_rest_to_stderr(probes, capfd):
    doctor.doctor(json_=True)
    printed = capfd.readouterr()
    assert {check["name"] for check in json.loads(printed.out)["checks"]} >= {"torch", "data"}
    assert "fix: fastcifar data fetch" in printed.err
