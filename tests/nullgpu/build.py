"""Compile the null device with ``cc``, once for each content, safely for test workers that start together."""

import hashlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

SOURCE = Path(__file__).with_name("nullgpu.c")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "nullgpu"
LIBRARY = "libcuda.so.1"
FLAGS = ("-std=gnu11", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}")
CUDA_MAJOR = "13"


def missing() -> str | None:
    """Return why the null device cannot run here, or None where it can.

    It imports nothing large, because every test run asks.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the null device is for Linux on x86_64"
    if shutil.which("cc") is None:
        return "the null device needs a C compiler named cc"
    if not any(name.startswith("nvidia-cuda-runtime") for name in _distributions()):
        return "the null device needs a torch that is built for CUDA"
    if not _runtime_is_known():
        return f"the null device speaks the binary interface of CUDA {CUDA_MAJOR}, and this torch another"
    return None


def _distributions() -> list[str]:
    requirements = metadata.requires("torch") or []
    return [word.split(";")[0].strip().lower() for word in requirements] + _bundled_runtime()


def _bundled_runtime() -> list[str]:
    """Return a stand-in name where torch lists no runtime of its own but the folder of one is installed."""
    return ["nvidia-cuda-runtime"] if _runtime_folders() else []


def _runtime_folders() -> list[Path]:
    torch_folder = Path(str(metadata.distribution("torch").locate_file("torch")))
    return [*(torch_folder.parent / "nvidia").glob("cu*/lib"), *torch_folder.glob("lib/libcudart*")]


def _runtime_is_known() -> bool:
    torch_folder = Path(str(metadata.distribution("torch").locate_file("torch")))
    return any((torch_folder.parent / "nvidia" / f"cu{CUDA_MAJOR}" / "lib").glob(f"libcudart.so.{CUDA_MAJOR}*"))


def build(cache: Path = CACHE) -> Path:
    """Return the folder that holds the compiled ``libcuda.so.1``, compiling it where the source is new.

    The folder is named by the content and the flags. Each process compiles into a file of its own and renames it, so
    that whoever is second replaces the library by an equal one and nobody ever loads half of it.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its message is on stderr.
    """
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = cache / digest
    if not (folder / LIBRARY).exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"{LIBRARY}.{os.getpid()}"
        subprocess.run(["cc", *FLAGS, "-o", str(own), str(SOURCE), "-ldl", "-lpthread"], check=True, timeout=120)
        own.replace(folder / LIBRARY)
    return folder
