"""On the GPU machine: put the parts of gpu-pack/ together, install the wheels that are missing, unpack the data.

    python tools/gpu_unpack.py

Everything that is complete so far is unpacked, so that it can be called after each part; nothing is fetched.
"""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "gpu-pack"
READY = PACK / "ready"
RECORDS = 10_000  # images in one file of the binary release


def main() -> None:
    """Join, install, unpack; say what is still missing."""
    missing = join()
    install([path for folder in ("0-wheels", "2-optional") for path in sorted((READY / folder).glob("*.whl"))])
    if not (READY / "cifar-10-batches-bin").exists() and not any(name.startswith("1-data") for name in missing):
        unpack_data(READY / "1-data", READY / "cifar-10-batches-bin")
    print(f"gpu-pack: {len(missing)} files wait for further parts" if missing else "gpu-pack: complete")


def join() -> list[str]:
    """Write each file whose pieces are all here, checked by its SHA-256; return the names of the others."""
    names = {name for listed in PACK.glob("part-*/files.json") for name in json.loads(listed.read_text())}
    pieces: dict[str, list[dict]] = {name: [] for name in sorted(names)}
    for manifest in sorted(PACK.glob("part-*/manifest.json")):
        for piece in json.loads(manifest.read_text()):
            pieces.setdefault(piece["file"], []).append({**piece, "path": manifest.parent / piece["piece"]})
    return [name for name, found in pieces.items() if not write_file(READY / name, found)]


def write_file(target: Path, pieces: list[dict]) -> bool:
    """Put one file together; False when pieces are missing."""
    if not pieces:  # all of it is in parts that were here before, or are still to come
        return target.exists()
    if target.exists() and target.stat().st_size == pieces[0]["bytes"]:
        return True
    data = b"".join(piece["path"].read_bytes() for piece in sorted(pieces, key=lambda p: p["offset"]))
    if len(data) < pieces[0]["bytes"]:
        return False
    if hashlib.sha256(data).hexdigest() != pieces[0]["sha256"]:
        sys.exit(f"gpu-pack: {target.name} is damaged; carry its parts again")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return True


def install(wheels: list[Path]) -> None:
    """Install the wheels whose distribution is missing, then this clone itself, once what builds it is there."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--break-system-packages"]
    wanted = [str(path) for path in wheels if not present(path)]
    if wanted:
        subprocess.run([*pip, *wanted], check=True)
    # In a call of its own: pip asks the build's back end before it installs anything.
    if not present(Path("fastcifar-0-.whl")) and present(Path("hatchling-0-.whl")):
        subprocess.run([*pip, "--no-build-isolation", "--editable", str(ROOT)], check=True)


def present(wheel: Path) -> bool:
    """Return whether a wheel's distribution is installed; OpenCV may be there under another name."""
    name = re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
    if name == "opencv-python":
        return importlib.util.find_spec("cv2") is not None
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def unpack_data(source: Path, target: Path) -> None:
    """Write the binary release (label byte, then the R, G and B planes) from the strips."""
    if not source.is_dir():
        return
    import numpy as np
    from PIL import Image

    partial = target.with_name("partial")
    partial.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        images = np.concatenate([np.asarray(Image.open(path)) for path in sorted(source.glob(f"{split}-*.webp"))])
        planes = images.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).reshape(-1, 3072)
        records = np.concatenate([np.load(source / f"{split}-labels.npy")[:, None], planes], axis=1)
        for k in range(len(records) // RECORDS):
            name = f"data_batch_{k + 1}.bin" if split == "train" else "test_batch.bin"
            (partial / name).write_bytes(records[k * RECORDS : (k + 1) * RECORDS].tobytes())
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (partial / "batches.meta.txt").write_text("\n".join(names) + "\n")
    partial.rename(target)


if __name__ == "__main__":
    main()
