"""What is carried to a GPU machine arrives there as it was, and the pieces of work cover the ladder."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 3 * 2**20


def script(name: str):
    """Load a file of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """Both scripts, with their folders under tmp_path."""
    packing, unpacking = script("gpu_pack"), script("gpu_unpack")
    monkeypatch.setattr(packing, "PACK", tmp_path / "gpu-pack")
    monkeypatch.setattr(unpacking, "PACK", tmp_path / "gpu-pack")
    monkeypatch.setattr(unpacking, "READY", tmp_path / "ready")
    return packing, unpacking


@pytest.fixture
def files(rng, tmp_path) -> list[Path]:
    staging = tmp_path / "staging" / "0-wheels"
    staging.mkdir(parents=True)
    for k, size in enumerate([0, 1, 1000, 2**20, 5 * 2**20 + 3, 2**19, 9 * 2**20]):
        (staging / f"file-{k}").write_bytes(rng.bytes(size))
    return sorted(staging.iterdir())


def test_parts_stay_under_the_limit_and_come_back_whole(pack, files, tmp_path):
    packing, unpacking = pack
    parts = packing.write_parts(files, tmp_path / "staging", LIMIT)
    assert len(parts) > 5
    assert all(sum(f.stat().st_size for f in part.iterdir()) <= LIMIT for part in parts)
    assert unpacking.join() == []
    for path in files:
        assert (tmp_path / "ready" / "0-wheels" / path.name).read_bytes() == path.read_bytes()


def test_a_missing_part_is_waited_for(pack, files, tmp_path):
    packing, unpacking = pack
    parts = packing.write_parts(files, tmp_path / "staging", LIMIT)
    parts[-1].rename(tmp_path / "away")
    assert unpacking.join() == ["0-wheels/file-6"]
    (tmp_path / "away").rename(parts[-1])
    assert unpacking.join() == []


def test_a_part_that_holds_whole_files_alone_is_waited_for_too(pack, files, tmp_path):
    """The pieces that are here do not mention its files."""
    packing, unpacking = pack
    small = [path for path in files if path.stat().st_size <= 2**20]
    _, *others = packing.write_parts(small, tmp_path / "staging", 2**20 + 2**20 + 2000)
    assert others
    for part in others:
        part.rename(tmp_path / part.name)
    assert unpacking.join() == ["0-wheels/file-5"]


def test_the_clone_is_installed_after_what_builds_it(pack, monkeypatch):
    _, unpacking = pack
    calls, there = [], set()
    monkeypatch.setattr(unpacking, "present", lambda wheel: wheel.name.split("-")[0] in there)
    monkeypatch.setattr(unpacking.subprocess, "run", lambda command, check: calls.append(command))
    unpacking.install([Path("numba-1-py3.whl")])
    there.add("hatchling")
    unpacking.install([Path("hatchling-1-py3.whl")])
    assert [command[-1].rpartition("/")[2] for command in calls[:1]] == ["numba-1-py3.whl"]
    assert [command[-2] for command in calls[1:]] == ["--editable"]


def test_a_damaged_part_is_refused(pack, files, tmp_path):
    packing, unpacking = pack
    part = packing.write_parts(files, tmp_path / "staging", LIMIT)[1]
    piece = max((p for p in part.iterdir() if p.suffix != ".json"), key=lambda p: p.stat().st_size)
    piece.write_bytes(b"\0" * piece.stat().st_size)
    with pytest.raises(SystemExit, match="damaged"):
        unpacking.join()


def test_strips_become_the_binary_release_again(rng, pack, tmp_path, monkeypatch):
    _, unpacking = pack
    monkeypatch.setattr(unpacking, "RECORDS", 20)
    source = tmp_path / "data"
    source.mkdir()
    images, labels = {}, {}
    for split, count in (("train", 40), ("test", 20)):
        images[split] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels[split] = rng.integers(0, 10, count, dtype=np.uint8)
        np.save(source / f"{split}-labels.npy", labels[split])
        for first in range(0, count, 10):
            strip = images[split][first : first + 10].reshape(-1, 32, 3)
            Image.fromarray(strip).save(source / f"{split}-{first // 10:03d}.webp", lossless=True)
    unpacking.unpack_data(source, tmp_path / "cifar-10-batches-bin")
    records = np.fromfile(tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin", np.uint8).reshape(20, 3073)
    np.testing.assert_array_equal(records[:, 0], labels["train"][20:])
    np.testing.assert_array_equal(records[:, 1:].reshape(20, 3, 32, 32), images["train"][20:].transpose(0, 3, 1, 2))


def test_the_closure_holds_what_fastcifar_needs_and_not_what_it_does_not():
    packing = script("gpu_pack")
    found = packing.closure(["fastcifar", "pytest"])
    assert {"torch", "numba", "llvmlite", "pydantic", "pydantic-core", "typer", "pluggy"} <= found
    assert "ffcv" not in found
    assert {"ffcv", "nvidia-dali-cuda120"} <= packing.closure(["fastcifar[ffcv,dali]"])
    assert next(packing.pins({"pydantic-core"})).startswith("pydantic-core==")


def test_an_installed_package_is_not_installed_again(pack):
    _, unpacking = pack
    assert unpacking.present(Path("numba-0.1-cp312-cp312-linux_x86_64.whl"))
    assert not unpacking.present(Path("no_such_thing-1-py3-none-any.whl"))


def test_the_pieces_cover_the_ladder_and_the_suite():
    from fnmatch import fnmatchcase

    from fastcifar.cli.bench import NAMES
    from fastcifar.ladder.rows import catalogue, ladder_rows

    gpu = script("gpu")
    patterns = [pattern for piece in gpu.PIECES for pattern in piece.rows]
    assert all(any(fnmatchcase(row, pattern) for pattern in patterns) for row in ladder_rows())
    assert all(any(fnmatchcase(name, pattern) for name in catalogue()) for pattern in patterns)
    full = {name for piece in gpu.PIECES if not piece.quick for name in piece.benchmarks}
    assert full == set(NAMES)


def test_every_piece_is_asked_for_in_a_rehearsal_with_rows_that_exist(monkeypatch):
    from fastcifar.ladder.rows import choose

    monkeypatch.setenv("FASTCIFAR_GPU_REHEARSAL", "1")
    gpu = script("gpu")
    for piece in gpu.PIECES:
        for command in gpu.commands(piece, 9.0):
            rows = [command[k + 1] for k, word in enumerate(command) if word == "--only"]
            assert not rows or choose(rows)


def test_a_manifest_names_each_piece_once(pack, files, tmp_path):
    packing, _ = pack
    for part in packing.write_parts(files, tmp_path / "staging", LIMIT):
        pieces = json.loads((part / "manifest.json").read_text())
        assert sorted(p["piece"] for p in pieces) == sorted(p.name for p in part.iterdir() if p.suffix != ".json")
