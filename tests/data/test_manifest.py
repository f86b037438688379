"""What the manifest says is checked like the data: types, its own hash, labels, and damage that keeps a file's time."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from fastcifar.data import store as stores
from fastcifar.data.formats import Split
from fastcifar.data.formats.dali import LABEL_DIGITS
from fastcifar.data.manifest import Manifest, read_manifest
from fastcifar.data.store import FORMATS, open_store, verify
from fastcifar.errors import UserError


def make(root: Path, to: str, labels=None) -> Path:
    """Write a store of twelve images and three classes."""
    random = np.random.default_rng(0)
    labels = np.arange(12) % 3 if labels is None else labels
    splits = {n: Split(random.integers(0, 256, (12, 9, 8, 3), np.uint8), labels) for n in ("train", "test")}
    data = stores.DataSet(splits, ["a", "b", "c"], {"kind": "folder"}, [])
    stores._write(data, to, root, stores.no_progress)
    return root


@pytest.fixture(scope="module", params=FORMATS)
def original(request, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("original") / request.param, request.param)


@pytest.fixture
def root(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "set"))


def change(root: Path, **values) -> None:
    path = root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def seal(root: Path) -> None:
    """Give a changed manifest the hash that goes with it, as who means harm would."""
    path = root / "manifest.json"
    table = json.loads(path.read_text())
    table.pop("sha256")
    Manifest.model_validate(table).write(root)


CHANGES = {
    "classes in another order": {"classes": ["b", "a", "c"]},
    "another image shape": {"image_shape": [8, 9, 3]},
    "a note": {"notes": ["official"]},
    "another origin": {"source": {"kind": "cifar10"}},
    "no hash": {"sha256": None},
    "another content": {"content": "0" * 64},
}
WRONG = {
    "classes of a wrong type": {"classes": 3},
    "a class that is no text": {"classes": ["a", 1, "c"]},
    "no classes": {"classes": []},
    "a flat image": {"image_shape": [9, 8]},
    "a negative side": {"image_shape": [-9, 8, 3]},
    "no source": {"source": None},
    "a source without a kind": {"source": {}},
    "splits of a wrong type": {"splits": []},
    "one split": {"splits": {"train": {"count": 12}}},
    "a count of a wrong type": {"splits": {"train": {"count": "12"}, "test": {"count": 12}}},
    "a count of nothing": {"splits": {"train": {"count": 0}, "test": {"count": 12}}},
    "files of a wrong type": {"files": ["train.beton"]},
    "a file outside": {"files": {"../x": {"bytes": 1, "sha256": "0" * 64, "mtime_ns": 0}}},
    "a version of a wrong type": {"fastcifar_store": "2"},
    "an older version": {"fastcifar_store": 1},
    "an unknown key": {"more": 1},
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_manifest_is_noticed(root, case):
    change(root, **CHANGES[case])
    for check in (open_store, verify):
        with pytest.raises(UserError, match=r"manifest\.json: changed since it was written"):
            check(root)


@pytest.mark.parametrize("case", WRONG)
def test_a_manifest_of_wrong_types_is_one_message(root, case):
    change(root, **WRONG[case])
    for check in (open_store, verify):
        with pytest.raises(UserError, match=r"manifest\.json: ") as caught:
            check(root)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "\0", '{"fastcifar_store": ' + "9" * 5000 + "}"])
def test_what_is_no_manifest(root, text):
    (root / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: "):
        open_store(root)


def test_classes_in_another_order_are_found_by_verify_whatever_the_hash_says(root):
    change(root, classes=["b", "a", "c"])
    seal(root)
    with pytest.raises(UserError, match="classes, labels or pixels are not those that it names"):
        verify(root)


@pytest.mark.parametrize("shape", [[9, 9, 3], [9, 8, 1], [65535, 65535, 3]])
def test_another_shape_is_found_by_verify_and_never_a_crash(root, shape):
    change(root, image_shape=shape)
    seal(root)
    with pytest.raises(UserError):
        verify(root)
    with contextlib.suppress(UserError):  # shards of padded members cannot tell two small shapes apart
        open_store(root).split("train")


@pytest.mark.parametrize("wrong", [3, -1, -100, 2**40])
@pytest.mark.parametrize("to", FORMATS)
def test_labels_out_of_range_are_refused(tmp_path, to, wrong):
    if to == "dali":  # which has so many digits for a label
        wrong = min(wrong, 10**LABEL_DIGITS - 1)
    said = r"-?\d+" if to == "dali" else wrong  # what are no digits is read as the integer of older stores
    labels = np.arange(12) % 3
    labels[5] = wrong
    store = open_store(make(tmp_path / "set", to, labels))
    for read in (store.split, store.labels):
        with pytest.raises(UserError, match=rf"image 5 of train has label {said}, not in 0\.\.2"):
            read("train")


def test_an_image_beyond_the_end_of_a_beton(tmp_path):
    from fastcifar.data.formats import ffcv

    root = make(tmp_path / "set", "ffcv")
    start = ffcv.HEADER.itemsize + len(ffcv.FIELDS) * ffcv.FIELD.itemsize
    content = bytearray((root / "train.beton").read_bytes())
    samples = np.frombuffer(content, ffcv.SAMPLE, 12, start)
    samples["image"]["pointer"][3] = 2**63
    (root / "train.beton").write_bytes(content)
    entry = stores._describe(root / "train.beton", stores.hash_file(root / "train.beton"))
    files = {**json.loads((root / "manifest.json").read_text())["files"], "train.beton": entry.model_dump()}
    change(root, files=files)
    seal(root)
    for read in (open_store(root).split, open_store(root).labels):
        with pytest.raises(UserError, match="beyond the end"):
            read("train")


# ------------------------------------------------------------------------------------------- damage that keeps the time


def rot(path: Path, rng: np.random.Generator) -> None:
    """Flip a bit and put the time back, as a disk does."""
    found, content = path.stat(), bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def data_files(root: Path) -> list[Path]:
    return [p for p in sorted(root.rglob("*")) if p.is_file() and p.name != "manifest.json"]


def test_silent_damage_is_found_before_training(root, rng):
    open_store(root)
    path = rng.choice(data_files(root))
    rot(path, rng)
    with pytest.raises(UserError, match=rf"{path.name}: damaged"):
        open_store(root)


def settle():
    """Wait until what was written before is no longer taken for just written."""
    time.sleep(2e-9 * stores.TICK_NS)


def test_silent_damage_right_after_the_hashing_is_found(root, rng, monkeypatch):
    """Where the file system's clock has not moved between the two, so that the file looks as before."""
    looks = dict.fromkeys(data_files(root))
    monkeypatch.setattr(stores, "_looks", lambda path: looks[path])
    for age_s, found in ((0, True), (1, False)):
        looks = {path: [1, 2, time.time_ns() - age_s * 10**9, 3] for path in looks}
        open_store(root)
        path = rng.choice(data_files(root))
        before = path.read_bytes()
        rot(path, rng)
        with pytest.raises(UserError, match="damaged") if found else contextlib.nullcontext():  # what no look can tell
            open_store(root)
        path.write_bytes(before)


def test_hashes_are_made_once_for_what_does_not_change(root, monkeypatch):
    settle()
    open_store(root)
    hashed = []
    monkeypatch.setattr(stores, "hash_file", lambda path: hashed.append(path))
    open_store(root)
    assert hashed == []
    with pytest.raises(UserError, match="damaged"):  # always hashed, and the hash made up here is wrong
        verify(root)
    assert len(hashed) == 1
    with pytest.raises(UserError, match="damaged"):
        open_store(root).check_split("train")


def test_a_damaged_memory_of_hashes_costs_only_time(root, cache):
    open_store(root)
    for text in ("", "[]", "{", '{"train.beton": 3}'):
        for path in (cache / "verified").glob("*.json"):
            path.write_text(text)
        open_store(root)


def test_a_manifest_is_read_back_as_it_was_written(root):
    manifest = read_manifest(root / "manifest.json")
    assert manifest == open_store(root).manifest
    assert json.loads((root / "manifest.json").read_text())["sha256"] == manifest.digest
