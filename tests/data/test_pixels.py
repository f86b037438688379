"""Splits that may be larger than memory: read where they lie, written a few MiB at a time, never gathered whole."""

import os
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastcifar.data import pixels
from fastcifar.data import store as stores
from fastcifar.data.formats import Split
from fastcifar.data.pixels import Pieces, StoredImages, choose, chunks
from fastcifar.data.sources import ImageFiles, find_source
from fastcifar.data.store import FORMATS, Store, convert, verify
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from fastcifar.train.run import train
from tests.train.tiny import recipe

# Of stores that were written from arrays in memory, before conversions streamed.
CONTENT = "1cccd537a0863fb7"
WRITTEN = {
    "raw": {"test_images.npy": "956b89bcd3557706", "test_labels.npy": "2ffc279ac7fb2af8",
            "train_images.npy": "254bc31e9c31f12d", "train_labels.npy": "5fd2fcc1c38b3c56"},
    "ffcv": {"test.beton": "4880da790ad67c49", "train.beton": "80c8c374c2cfa0b7"},
    "dali": {"test-00000.idx": "639e31fd94df5363", "test-00000.tar": "0b984b3ca66eaa85",
             "train-00000.idx": "e09dbf799da26404", "train-00000.tar": "8026a0e673b2f615",
             "train-00001.idx": "607a17a32491c170", "train-00001.tar": "fdc40c829320263a",
             "train-00002.idx": "616a2aeb0e102cb8", "train-00002.tar": "f1d61c23d3c54c2d",
             "train-00003.idx": "cb8ed02712699cc6", "train-00003.tar": "443a23dbbdb0a4c7"},
}  # fmt: skip


@pytest.fixture
def small_parts(monkeypatch):
    """Pages, shards and chunks of a few images."""
    monkeypatch.setattr("fastcifar.data.formats.ffcv.PAGE_BYTES", 1 << 16)
    monkeypatch.setattr("fastcifar.data.formats.dali.SHARD_SAMPLES", 32)
    monkeypatch.setattr(pixels, "CHUNK_BYTES", 10_000)


def stored(folder: Path, to: str, splits: dict[str, Split]) -> Store:
    data = stores.DataSet(splits, list("abcde"), {"kind": "folder"}, [])
    return stores._write(data, to, folder / to, stores.no_progress)[0]


@pytest.mark.parametrize("to", FORMATS)
def test_streamed_stores_are_the_bytes_that_they_always_were(small_parts, tmp_path, to):
    splits = {}
    for name, count in (("train", 101), ("test", 7)):
        images = (np.arange(count * 17 * 23 * 3).reshape(count, 17, 23, 3) * 7 % 251).astype(np.uint8)
        splits[name] = Split(images, np.arange(count) % 5)
    manifest = stored(tmp_path, to, splits).manifest
    assert manifest.content.startswith(CONTENT)
    assert {name: file.sha256[:16] for name, file in manifest.files.items()} == WRITTEN[to]
    verify(tmp_path / to)


class Drawn(StoredImages):
    """Images that exist only while somebody looks at them."""

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        return np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (len(rows), *self.shape[1:])).copy()


@pytest.mark.parametrize("to", FORMATS)
def test_a_conversion_holds_only_a_part(tmp_path, monkeypatch, to):
    monkeypatch.setattr("fastcifar.data.formats.ffcv.PAGE_BYTES", 1 << 18)
    monkeypatch.setattr(pixels, "CHUNK_BYTES", 1 << 18)
    images = Drawn((3_000, 64, 64, 3))  # 35 MiB
    splits = {"train": Split(images, np.arange(3_000) % 5), "test": Split(Drawn((2, 64, 64, 3)), np.arange(2))}
    tracemalloc.start()
    try:
        store = stored(tmp_path, to, splits)
        again, _ = convert(store, "raw", tmp_path / "again")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20
    read = again.split("train").images
    assert read[2_999].max() == read[2_999].min() == 2_999 % 256


@pytest.mark.parametrize("to", ["ffcv", "dali", "folder"])
def test_stored_images_are_indexed_as_an_array_is(rng, small_parts, tmp_path, to):
    true = rng.integers(0, 256, (101, 17, 23, 3), np.uint8)
    if to == "folder":
        for split in ("train", "test"):
            (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(true[0]).save(tmp_path / "test/a/0.png")
        for row, image in enumerate(true):
            Image.fromarray(image).save(tmp_path / f"train/a/{row:03d}.png")
        images = stores.read_source(find_source(tmp_path, "folder"), stores.no_progress).splits["train"].images
    else:
        test = Split(true[:1], np.zeros(1, np.int64))
        images = stored(tmp_path, to, {"train": Split(true, np.arange(101) % 5), "test": test}).split("train").images
    chosen, some = np.sort(rng.permutation(101)[:40]), rng.integers(-40, 40, 25)
    for ours, theirs in ((images, true), (choose(images, chosen), true[chosen])):
        assert (ours.shape, ours.nbytes, len(ours)) == (theirs.shape, theirs.nbytes, len(theirs))
        mask = rng.random(len(theirs)) < 0.5
        for rows in (0, -1, slice(None), slice(3, 17), slice(30, 4), slice(2, 39, 3), slice(-5, None), some, mask, []):
            if isinstance(rows, list):
                rows = np.array(rows, np.int64)
            np.testing.assert_array_equal(ours[rows], theirs[rows])
        assert np.array_equal(np.concatenate([part for _, part in chunks(ours)]), theirs)
        with pytest.raises(IndexError):
            ours[[len(theirs)]]
    assert choose(images, np.arange(101)) is images


class Refusing(StoredImages):
    """Images of which nobody may take more than a few at a time."""

    def __init__(self, images, most: int):
        super().__init__(images.shape)
        self.images, self._most = images, most

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        assert len(rows) <= self._most, f"{len(rows)} images were taken at once"
        return np.asarray(self.images[rows])


def test_a_run_never_gathers_a_split(tmp_path, monkeypatch):
    """Training from a raw store by the torchvision loader, a holdout, the training logits, and a whitened model."""
    monkeypatch.setattr("fastcifar.train.run.hooks.images_to_fit", lambda model: 20)
    monkeypatch.setattr("fastcifar.train.run.hooks.fit_images", lambda model, images: None)
    data = {"source": "synthetic", "subset": 200, "test_subset": 100, "holdout": 80,
            "loader": {"name": "torchvision", "workers": 1}}  # fmt: skip
    wanted = recipe(data=data, eval={"train_logits": True, "batch_size": 30}, train={"epochs": 1, "batch_size": 32})
    whole = Store.split
    monkeypatch.setattr(
        Store, "split", lambda store, name: Split(Refusing((s := whole(store, name)).images, 32), s.labels)
    )
    run = RunDirectory.create(tmp_path / "run", wanted, {})
    train(wanted, run, quiet=True)
    assert len(run.logits("train/last/raw")) == 120


def test_the_kernels_advice_goes_to_every_map(tmp_path, rng, small_parts):
    true = rng.integers(0, 256, (70, 8, 8, 3), np.uint8)
    test = Split(true[:1], np.zeros(1, np.int64))
    for to in FORMATS:
        images = stored(tmp_path, to, {"train": Split(true, np.arange(70) % 5), "test": test}).split("train").images
        assert len(pixels._maps(choose(images, np.arange(3, 60)))) == {"raw": 1, "ffcv": 1, "dali": 3}[to]
        for advice in ("RANDOM", "WILLNEED", "DONTNEED"):
            pixels.advise(images, advice)
            assert np.array_equal(images[:], true)
    pixels.advise(true, "RANDOM")  # not mapped: nothing to say
    assert torch.equal(pixels.on_device(Pieces([true[:9], true[9:]], true.shape), torch.device("cpu")),
                       torch.from_numpy(true))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.fixture
def small_pieces(monkeypatch, small_parts):
    monkeypatch.setattr("fastcifar.data.formats.target.PIECE_BYTES", 30_000)


def folder_of_images(rng: np.random.Generator, folder: Path) -> None:
    for split, count in (("train", 101), ("test", 7)):
        for row in range(count):
            path = folder / split / "ab"[row % 2] / f"{row:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (17, 23, 3), np.uint8)).save(path)


def killed(source: object, to: str, out: Path, rows: int) -> Path:
    """Convert in a process that ends as by SIGKILL once so many training images are written; return what it left."""

    def end(what: str, done: int, total: int) -> None:
        if what == f"write train as {to}" and done >= rows:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        convert(source, to, out, end)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = out.parent.glob(f".{out.name}.*.part")
    return left


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize("to", FORMATS)
def test_a_killed_conversion_is_gone_on_with(rng, small_pieces, tmp_path, monkeypatch, to):
    """The bytes are those of an unbroken one, and what was written before is not decoded again."""
    folder_of_images(rng, tmp_path / "images")
    source = find_source(tmp_path / "images", "folder")
    convert(source, to, tmp_path / "unbroken")
    left = killed(source, to, tmp_path / "set", 50)
    decoded, path = [], ImageFiles._path
    monkeypatch.setattr(ImageFiles, "_path", lambda images, row: decoded.append(row) or path(images, row))
    store, written = convert(source, to, tmp_path / "set")
    assert written
    assert files_of(store.root) == files_of(tmp_path / "unbroken")
    assert store.manifest.files.keys() == verify(tmp_path / "set").manifest.files.keys()
    assert not left.exists()
    # The first image of each split says what size they all have.
    again = sorted(set(decoded) - {0})
    assert 45 <= len(again) <= 75, again  # of 101; 55 or 56 were written, of which the last piece may be half done
    assert again == list(range(101 - len(again), 101))


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_damaged_of_a_killed_conversion_is_made_again(rng, small_pieces, tmp_path, to):
    """A byte of the file, a cut, a torn line of the journal, or nothing at all in the place of a file."""
    folder_of_images(rng, tmp_path / "images")
    source = find_source(tmp_path / "images", "folder")
    expected = files_of(convert(source, to, tmp_path / "unbroken")[0].root)
    for damage in ("byte", "cut", "journal", "gone"):
        left = killed(source, to, tmp_path / damage, 90)
        data = max((p for p in left.iterdir() if p.name.startswith("train")), key=lambda p: p.stat().st_size)
        content = bytearray(data.read_bytes())
        if damage == "byte":
            content[int(rng.integers(0, 60_000))] ^= 1
            data.write_bytes(content)
        elif damage == "cut":
            data.write_bytes(content[: int(rng.integers(0, 60_000))])
        elif damage == "journal":
            journal = (left / ".journal").read_bytes()
            (left / ".journal").write_bytes(journal[: len(journal) - int(rng.integers(1, 200))] + b"\xff")
        else:
            data.unlink()
        assert files_of(convert(source, to, tmp_path / damage)[0].root) == expected, damage
        verify(tmp_path / damage)


def test_what_another_conversion_left_is_not_taken(rng, small_pieces, tmp_path):
    folder_of_images(rng, tmp_path / "images")
    source = find_source(tmp_path / "images", "folder")
    left = killed(source, "raw", tmp_path / "set", 70)
    Image.fromarray(rng.integers(0, 256, (17, 23, 3), np.uint8)).save(tmp_path / "images/train/a/000.png")
    changed = find_source(tmp_path / "images", "folder")
    assert changed.fingerprint != source.fingerprint
    store, _ = convert(changed, "raw", tmp_path / "set")
    verify(store.root)
    assert not left.exists()
    assert np.array_equal(store.split("train").images[0], np.asarray(Image.open(tmp_path / "images/train/a/000.png")))


def test_a_conversion_that_would_write_other_bytes_says_so(rng, small_pieces, tmp_path, monkeypatch):
    """As a fastcifar of another layout with the same version would; what was left is removed."""
    folder_of_images(rng, tmp_path / "images")
    source = find_source(tmp_path / "images", "folder")
    killed(source, "ffcv", tmp_path / "set", 90)
    monkeypatch.setattr("fastcifar.data.formats.ffcv.PAGE_BYTES", 1 << 17)
    with pytest.raises(UserError, match="another conversion left other bytes here; convert again"):
        convert(source, "ffcv", tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    convert(source, "ffcv", tmp_path / "set")
    verify(tmp_path / "set")
