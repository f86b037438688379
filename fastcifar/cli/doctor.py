"""``fastcifar doctor``: what works here, what is missing, and the exact fix."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fastcifar.console import answers, out
from fastcifar.locations import install_command

Check = dict[str, str]
WORKS, MISSING, BROKEN = "works", "missing", "broken"
STYLES = {WORKS: "green", MISSING: "yellow", BROKEN: "red"}
FFCV_SYSTEM = "sudo apt-get install pkg-config libopencv-dev libturbojpeg0-dev"
# Each import happens in a process of its own: ffcv sets the number of threads of its process to 1, a damaged package
# can end its process, and all of them together then take as long as the slowest.
PROBES = {
    "torch": """import torch
from fastcifar.device import auto_precision
here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(f'{torch.__version__}, trains in {auto_precision(here)} here (engine.precision = "auto")')
if torch.cuda.is_available():
    of = torch.cuda.get_device_properties(0)
    torch.ones(8, device='cuda').sum().item()
    print(f'{of.name}, {of.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}')""",
    "triton": "import triton; print(triton.__version__)",
    "numba": "import numba; numba.njit(lambda x: x + 1)(1); print(numba.__version__)",
    "ffcv": "import importlib.metadata, ffcv.loader, ffcv.writer; print(importlib.metadata.version('ffcv'))",
    "dali": "import nvidia.dali; print(nvidia.dali.__version__)",
}
REASONS = {
    "torch": "the training itself",
    "triton": "GPU kernels; not used on a CPU",
    "numba": "augmentation on the CPU",
    "ffcv": 'optional: data.loader.name = "ffcv"',
    "dali": 'optional: data.loader.name = "dali"',
}


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object to stdout")] = False,
    data: Annotated[Path | None, typer.Option(help="where the data is, as for `fastcifar run`")] = None,
) -> None:
    """Say what works here, what is missing or broken, and the exact fix. Optional things may be missing."""
    checks = diagnose(data)
    if json_:
        out({"checks": checks})
    show(checks, json_)


def diagnose(data: Path | None = None) -> list[Check]:
    """Return one ``{"name", "status", "detail", "fix"}`` per thing; status is works, missing or broken."""
    running = {name: _start(code) for name, code in PROBES.items()}
    found = {name: _finish(process) for name, process in running.items()}
    packages = [_package(name, *result) for name, result in found.items()]
    return [_python(), *packages, _gpu(*found["torch"]), _compiler(), _data(data)]


def show(checks: list[Check], json_: bool = False) -> None:
    """Print the checks for people, to stderr where JSON goes to stdout."""
    to = answers(json_)
    for check in checks:
        style = STYLES[check["status"]]
        to.print(Text.assemble((f"{check['status']:8}", style), f"{check['name']:10}{check['detail']}"), soft_wrap=True)
        if check["fix"]:
            to.print(f"        {'':10}fix: {check['fix']}", markup=False, soft_wrap=True)


def _check(name: str, status: str, detail: str, fix: str = "") -> Check:
    return {"name": name, "status": status, "detail": detail, "fix": fix}


def _start(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Return exit status, the lines of stdout and the last line of stderr."""
    stdout, stderr = process.communicate()
    return process.returncode, stdout.splitlines(), (stderr.strip().splitlines() or [""])[-1]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return _check("python", WORKS, f"{version} at {sys.executable}")


def _package(name: str, status: int, lines: list[str], stderr: str) -> Check:
    if lines and (status == 0 or name == "torch"):
        return _check(name, WORKS, lines[0])
    absent = "ModuleNotFoundError" in stderr and f"'{'nvidia' if name == 'dali' else name}" in stderr
    what = f"({REASONS[name]})" if absent else f"{stderr} ({REASONS[name]})"
    return _check(name, MISSING if absent else BROKEN, what, _cure(name))


def _cure(name: str) -> str:
    """Return the command that installs a package, with ffcv's system packages where they are missing."""
    again = install_command(name if name in ("ffcv", "dali") else "")
    if name == "ffcv" and not _has_ffcv_system():
        return f"{FFCV_SYSTEM} && {again}"
    return again


def _has_ffcv_system() -> bool:
    found = shutil.which("pkg-config")
    return bool(found) and subprocess.run([str(found), "--exists", "opencv4", "libturbojpeg"]).returncode == 0


def _gpu(status: int, lines: list[str], stderr: str) -> Check:
    """Judge the GPU from the torch probe: a second line names it, after a first computation on it."""
    if status == 0 and len(lines) > 1:
        return _check("gpu", WORKS, lines[1])
    if not shutil.which("nvidia-smi"):
        return _check("gpu", MISSING, "no NVIDIA driver: everything runs on the CPU, only slower", "use a GPU machine")
    detail = stderr or "there is a driver, but torch sees no GPU"
    return _check("gpu", BROKEN, detail, "nvidia-smi shows the driver's version; torch here needs one for CUDA 13")


def _compiler() -> Check:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found:
        return _check("c++", WORKS, f"{found} (builds ffcv; torch.compile uses it on a GPU machine)")
    return _check("c++", MISSING, "no C++ compiler: no ffcv, no compiled model", "sudo apt-get install g++")


def _data(data: Path | None) -> Check:
    from fastcifar.data.store import Store, locate
    from fastcifar.errors import UserError

    try:
        found: Any = locate("cifar10", data)
    except UserError as error:
        return _check("data", MISSING, str(error).splitlines()[0], "fastcifar data fetch")
    kind = f"a {found.format} store at {found.root}" if isinstance(found, Store) else f"CIFAR-10 at {found.path}"
    return _check("data", WORKS, kind)
