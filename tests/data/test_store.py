import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastcifar.cli.data import app
from fastcifar.config.schema import DataConfig
from fastcifar.data import store as stores
from fastcifar.data.formats import dali as dali_format
from fastcifar.data.sources import Source
from fastcifar.data.store import FORMATS, Split, convert, open_store, resolve_store, store_as, verify
from fastcifar.errors import UserError
from tests.forked import Forked


@pytest.fixture(scope="module")
def made(cache, synthetic_store, tmp_path_factory) -> dict[str, Path]:
    """The synthetic images as a store of each format."""
    folder = tmp_path_factory.mktemp("stores")
    for to in FORMATS:
        convert(synthetic_store, to, folder / to)
    return {to: folder / to for to in FORMATS}


@pytest.fixture
def copy(made, tmp_path):
    """A copy of a store, to damage it."""

    def make(to: str) -> Path:
        return Path(shutil.copytree(made[to], tmp_path / to))

    return make


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_gives_back_every_byte(made, synthetic_store, to):
    store = verify(made[to])
    assert (store.format, store.classes) == (to, synthetic_store.classes)
    assert store.manifest.content == synthetic_store.manifest.content
    for name in ("train", "test"):
        ours, true = store.split(name), synthetic_store.split(name)
        assert np.array_equal(ours.images, true.images)
        assert np.array_equal(ours.labels, true.labels)
        assert np.array_equal(store.labels(name), true.labels)
        assert ours.labels.dtype == np.int64


@pytest.mark.parametrize("to", FORMATS)
def test_any_image_size_and_more_than_a_page(rng, tmp_path, monkeypatch, to):
    monkeypatch.setattr("fastcifar.data.formats.ffcv.PAGE_BYTES", 1 << 16)
    monkeypatch.setattr("fastcifar.data.formats.dali.SHARD_SAMPLES", 32)
    splits = {
        name: Split(rng.integers(0, 256, (n, 17, 23, 3), np.uint8), rng.integers(0, 500, n))
        for name, n in (("train", 101), ("test", 1))
    }
    data = stores.DataSet(splits, [str(k) for k in range(500)], {"kind": "folder"}, [])
    stores._write(data, to, tmp_path / "set", stores.no_progress)
    store = verify(tmp_path / "set")
    for name, true in splits.items():
        assert np.array_equal(store.split(name).images, true.images)
        assert np.array_equal(store.split(name).labels, true.labels)


def test_shards_are_what_other_tools_say(made, tmp_path, synthetic_store, monkeypatch):
    """Python's tarfile reads the members; DALI's own indexing tool writes the same index."""
    wds2idx = pytest.importorskip("wds2idx")
    shard = made["dali"] / "train-00000.tar"
    train = synthetic_store.split("train")
    with tarfile.open(shard) as archive:
        members = archive.getmembers()
        assert [m.name for m in members[:4]] == ["000000000.img", "000000000.cls", "000000000.idx", "000000001.img"]
        assert len(members) == 3 * 2000
        for row in (0, 7, 1999):
            pixels, label, index = (archive.extractfile(m).read() for m in members[3 * row : 3 * row + 3])
            assert pixels == train.images[row].tobytes()
            assert (int(label.decode("ascii")), int.from_bytes(index, "little")) == (train.labels[row], row)
    with wds2idx.IndexCreator(str(shard), str(tmp_path / "oracle.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "oracle.idx").read_text() == shard.with_suffix(".idx").read_text()


def test_webdataset_decodes_the_labels(made, synthetic_store):
    webdataset = pytest.importorskip("webdataset")
    train = synthetic_store.split("train")
    with open(made["dali"] / "train-00000.tar", "rb") as shard:  # webdataset leaves what it opens itself open
        members = webdataset.tariterators.tar_file_expander([{"url": "shard", "stream": shard}])
        decode = webdataset.autodecode.Decoder([webdataset.autodecode.basichandlers])
        samples = [decode(sample) for sample in webdataset.tariterators.group_by_keys(members)]
    assert [sample["cls"] for sample in samples] == train.labels.tolist()
    assert samples[1999]["img"] == train.images[1999].tobytes()


def test_labels_are_read_as_text_and_as_numbers(rng):
    labels = np.append(rng.integers(0, 1_000_000, 50), [0, 9, 999_999])
    text = np.array([list(f"{label:08d}".encode()) for label in labels.tolist()], np.uint8)
    numbers = labels.astype("<i8").reshape(-1, 1).view(np.uint8)
    for members in (text, numbers, np.concatenate([text, numbers])):
        read = dali_format.labels_of(members)
        assert np.array_equal(read, np.resize(labels, len(members)))
        assert read.dtype == np.int64


def test_a_store_with_labels_as_numbers_is_still_read(copy, synthetic_store):
    """As stores of earlier versions: everything the same but the contents of the .cls members."""
    root, labels = copy("dali"), synthetic_store.split("train").labels
    content = bytearray((root / "train-00000.tar").read_bytes())
    shard = np.frombuffer(content, np.uint8)[: -2 * 512].reshape(2000, -1)
    start = dali_format.offsets(32 * 32 * 3)[1]
    shard[:, start : start + 8] = labels.astype("<i8").reshape(-1, 1).view(np.uint8)
    (root / "train-00000.tar").write_bytes(content)
    assert np.array_equal(dali_format.read_labels(root, "train", 2000, (32, 32, 3)), labels)


def test_converting_twice_does_nothing_and_says_so(tmp_path, synthetic_store):
    for to in FORMATS:
        first, written = convert(synthetic_store, to, tmp_path / to)
        before = {p: p.stat().st_mtime_ns for p in first.root.iterdir()}
        again, rewritten = convert(synthetic_store, to, tmp_path / to)
        assert (written, rewritten) == (True, False)
        assert before == {p: p.stat().st_mtime_ns for p in again.root.iterdir()}
    with pytest.raises(UserError, match="already there, with other content"):
        convert(synthetic_store, "raw", tmp_path / "ffcv")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FORMATS)


def test_stores_are_the_same_bytes_each_time(made, tmp_path, synthetic_store):
    for to in FORMATS:
        again = convert(synthetic_store, to, tmp_path / to)[0]
        assert _hashes(again) == _hashes(open_store(made[to]))


def _hashes(store) -> dict[str, str]:
    return {name: file.sha256 for name, file in store.manifest.files.items()}


# ------------------------------------------------------------------------------------------------------------- damage


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 512)


DAMAGE = {
    "truncated beton": ("ffcv", "train.beton", _cut, "truncated"),
    "byte in a beton": ("ffcv", "test.beton", _flip, "damaged"),
    "byte in a tar": ("dali", "train-00000.tar", _flip, "damaged"),
    "no index": ("dali", "test-00000.idx", Path.unlink, "missing"),
    "index of nothing": ("dali", "train-00000.idx", lambda p: p.write_text(""), "0 bytes instead"),
    "byte in an array": ("raw", "train_images.npy", _flip, "damaged"),
    "no labels": ("raw", "test_labels.npy", Path.unlink, "missing"),
    "no manifest": ("raw", "manifest.json", Path.unlink, "no store"),
    "half a manifest": ("raw", "manifest.json", _cut, "not a readable manifest"),
}


@pytest.mark.parametrize(("to", "name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_with_the_file_named(copy, to, name, damage, message):
    root = copy(to)
    damage(root / name)
    for check in (open_store, verify):
        with pytest.raises(UserError, match=message) as caught:
            check(root)
        assert str(root if name == "manifest.json" else root / name) in str(caught.value)


def test_silent_damage_is_found_by_verify(copy):
    """A byte that changed without the file's time changing: a bad disk, not a program."""
    path = copy("dali") / "train-00000.tar"
    times = path.stat().st_mtime_ns
    open_store(path.parent).manifest.files[path.name]
    _flip(path)
    os.utime(path, ns=(times, times))
    with pytest.raises(UserError, match=r"train-00000\.tar: damaged"):
        verify(path.parent)


def test_foreign_files_and_later_versions_are_refused(copy):
    root = copy("raw")
    (root / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt: this file does not belong"):
        verify(root)
    manifest = json.loads((root / "manifest.json").read_text())
    for change, message in (
        ({"fastcifar_store": 99}, "store version 99, this fastcifar reads 2; update"),
        ({"format": "zip"}, r"format: .*'raw', 'ffcv' or 'dali'"),
    ):
        (root / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(UserError, match=message) as caught:
            open_store(root)
        assert "manifest.json" in str(caught.value)


def test_store_of_another_kind_is_refused(made):
    with pytest.raises(UserError, match=r'a store of "synthetic"; the recipe wants data\.source = "cifar10"'):
        resolve_store(DataConfig(source="cifar10"), made["ffcv"])


# -------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("to", FORMATS)
def test_failure_half_way_leaves_nothing(tmp_path, synthetic_store, to):
    def fail(what: str, done: int, total: int) -> None:
        if what == f"write test as {to}" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(synthetic_store, to, tmp_path / "set", fail)
    assert list(tmp_path.iterdir()) == []
    assert convert(synthetic_store, to, tmp_path / "set")[1]


def test_kill_half_way_leaves_no_store(tmp_path, synthetic_store):
    """SIGKILL while the second split is written: the temporary folder may stay, a store does not appear."""
    script = f"""
import time
from pathlib import Path
from fastcifar.data.store import convert, open_store
def slow(what, done, total):
    if what.startswith("write test"):
        print("half", flush=True)
        time.sleep(60)
convert(open_store(Path({str(synthetic_store.root)!r})), "dali", Path({str(tmp_path / "set")!r}), slow)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "set").exists()
    assert list(tmp_path.glob(".set.*.part"))
    assert convert(synthetic_store, "dali", tmp_path / "set")[1]
    verify(tmp_path / "set")
    # What the killed process left is nobody's, and swept away; what a living one works on is not.
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, synthetic_store, to):
    """In a process of its own: what writes through a memory map is ended by SIGBUS."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        words = ["data", "convert", "synthetic", "--to", to, "--out", str(disk / "set")]
        process = Forked(*words, cwd=tmp_path)
        assert process.status() == 2, process.printed()
        said = " ".join(process.printed().splitlines())
        assert said.startswith("fastcifar: ")
        assert said.endswith("set: cannot be written (No space left on device)")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_without_room_is_noticed_before_writing(tmp_path, synthetic_store, monkeypatch):
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device"):
        convert(synthetic_store, "raw", tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_agree(tmp_path, synthetic_store, monkeypatch):
    """Another process finishes the same store while ours is being written: its store stays."""
    made = []

    def other(what: str, done: int, total: int) -> None:
        if what == "write test as raw" and not made:
            made.append(True)
            convert(synthetic_store, "raw", tmp_path / "set")

    store, written = convert(synthetic_store, "raw", tmp_path / "set", other)
    assert not written
    assert verify(store.root).count("train") == 2000
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("other", [("other images", "raw"), ("the same images", "dali")], ids="-".join)
def test_a_store_of_something_else_that_was_made_meanwhile_is_not_taken_for_ours(tmp_path, synthetic_store, rng, other):
    content, to = other
    splits = {name: Split(rng.integers(0, 256, (9, 8, 8, 3), np.uint8), np.arange(9)) for name in ("train", "test")}
    data, made = stores.DataSet(splits, synthetic_store.classes, {"kind": "folder"}, []), []

    def finish(what: str, done: int, total: int) -> None:
        if what == "write test as raw" and not made:
            made.append(True)
            if content == "other images":
                stores._write(data, to, tmp_path / "set", stores.no_progress)
            else:
                convert(synthetic_store, to, tmp_path / "set")

    with pytest.raises(UserError, match="set: already there, with other content; remove it or choose another folder"):
        convert(synthetic_store, "raw", tmp_path / "set", finish)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert verify(tmp_path / "set").format == to


def test_unwritable_place_is_named(synthetic_store):
    with pytest.raises(UserError, match=r"/proc/nowhere/set: cannot be written"):
        convert(synthetic_store, "raw", Path("/proc/nowhere/set"))


def test_cache_is_used_the_second_time(synthetic_store, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path))
    first = store_as(Source.synthetic(), "raw")
    monkeypatch.setattr(stores, "read_source", None)  # would fail if anything were read again
    assert store_as(Source.synthetic(), "raw").root == first.root
    assert store_as(first, "raw") is first


@pytest.mark.parametrize(("name", "damage"), [d[1:3] for d in DAMAGE.values() if d[0] == "raw"])
def test_a_damaged_store_in_the_cache_is_made_again(tmp_path, monkeypatch, capfd, name, damage):
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path))
    root = store_as(Source.synthetic(), "raw").root
    damage(root / name)
    assert stores.converted(Source.synthetic()) is None
    assert verify(store_as(Source.synthetic(), "raw").root).root == root
    said = capfd.readouterr().err
    assert "; this store in the cache is removed and made again" in said
    assert str(root) in said


def test_a_store_of_an_older_version_in_the_cache_is_made_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path))
    root = store_as(Source.synthetic(), "raw").root
    table = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**table, "fastcifar_store": 1}))
    verify(store_as(Source.synthetic(), "raw").root)
    assert "store version 1, this fastcifar reads 2; this store in the cache is removed" in capfd.readouterr().err


def test_a_damaged_store_that_was_named_stays_and_its_cure_works(tmp_path, synthetic_store):
    root = convert(synthetic_store, "raw", tmp_path / "set")[0].root
    _flip(root / "test_images.npy")
    before = {path: path.read_bytes() for path in root.iterdir()}
    with pytest.raises(UserError, match=r"test_images\.npy: damaged .*; remove the store and convert again$"):
        convert(synthetic_store, "raw", root)
    assert before == {path: path.read_bytes() for path in root.iterdir()}
    shutil.rmtree(root)
    verify(convert(synthetic_store, "raw", root)[0].root)


# -------------------------------------------------------------------------------------------------- places for a store


def test_a_link_to_an_empty_folder_is_a_place_for_a_store(tmp_path, synthetic_store):
    (tmp_path / "disk/set").mkdir(parents=True)
    (tmp_path / "set").symlink_to(tmp_path / "disk/set")
    store, written = convert(synthetic_store, "raw", tmp_path / "set")
    assert (store.root, written) == (tmp_path / "set", True)
    verify(tmp_path / "disk/set")
    assert convert(synthetic_store, "raw", tmp_path / "set")[1] is False
    assert (tmp_path / "set").is_symlink()


def test_a_link_to_nothing_yet_is_a_place_for_a_store(tmp_path, synthetic_store):
    (tmp_path / "set").symlink_to("disk/set")
    convert(synthetic_store, "raw", tmp_path / "set")
    verify(tmp_path / "disk/set")


def test_the_working_directory_is_refused_before_anything_is_read(tmp_path, synthetic_store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stores, "_as_data_set", None)  # would fail if anything were read
    for out in (Path("."), tmp_path):
        with pytest.raises(UserError, match="a store cannot take the place of a working directory; name a new folder"):
            convert(synthetic_store, "raw", out)


def test_a_mount_point_is_refused_before_anything_is_read(tmp_path, synthetic_store, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    monkeypatch.setattr(stores, "_as_data_set", None)
    (tmp_path / "disk").mkdir()
    with pytest.raises(UserError, match="disk: a store cannot take the place of a mount point; name a new folder"):
        convert(synthetic_store, "raw", tmp_path / "disk")


def test_a_place_that_is_full_is_refused_before_anything_is_read(tmp_path, synthetic_store, monkeypatch):
    monkeypatch.setattr(stores, "_as_data_set", None)
    (tmp_path / "mine").write_text("a line")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match="already there, with other content"):
            convert(synthetic_store, "raw", out)
    assert (tmp_path / "mine").read_text() == "a line"


# ------------------------------------------------------------------------------------------------------- command line


def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)
    run, said = CliRunner(), []

    def call(*args: str) -> dict:
        answer = run.invoke(app, [*args, "--json"], catch_exceptions=False)
        assert answer.exit_code == 0
        said.append(answer.stderr)
        return json.loads(answer.stdout)

    assert call("convert", "synthetic", "--to", "dali")["written"] is True
    again = call("convert", "synthetic", "--to", "dali")
    assert (again["written"], again["path"], again["splits"]) == (
        False,
        "data/synthetic-dali",
        {"train": 2000, "test": 1000},
    )
    assert call("verify", "data/synthetic-dali")["verified"] is True
    assert call("info", "folder", "--data", str(_folder(tmp_path)))["format"] is None
    assert "already there, unchanged" in said[1]
    with pytest.raises(UserError, match="fastcifar data fetch"):
        run.invoke(app, ["info"], catch_exceptions=False)
    _flip(Path("data/synthetic-dali/train-00000.tar"))
    with pytest.raises(UserError, match="damaged"):
        run.invoke(app, ["verify", "data/synthetic-dali"], catch_exceptions=False)


def _folder(root: Path) -> Path:
    (root / "set" / "train").mkdir(parents=True)
    return root / "set"


def test_fetch_checks_what_it_got(tmp_path, monkeypatch):
    """No network in tests: torchvision's part is replaced by what it would leave behind, or by its failure."""
    from fastcifar.cli import data as command
    from tests.data.making import use_small_releases, write_release

    release = use_small_releases(monkeypatch)["cifar10", "python"]
    monkeypatch.setattr(command, "_download", lambda name, folder: write_release(folder, release, 0))
    answer = CliRunner().invoke(app, ["fetch", "--out", str(tmp_path / "got"), "--json"], catch_exceptions=False)
    assert json.loads(answer.stdout)["splits"] == {"train": 150, "test": 20}


def test_dali_index_of_chosen_samples():
    text = dali_format.index_text(np.array([9, 2]), np.array([3, 0]), 5)
    stride = dali_format.sample_bytes(5)
    assert stride == 6 * 512
    assert text.splitlines()[0] == "v1.2 2"
    assert text.splitlines()[1].split()[:4] == ["img", str(3 * stride + 512), "5", "000000009.img"]


def test_a_class_whose_name_is_no_text_is_written_in_json_and_for_people(rng, tmp_path, monkeypatch):
    """Bytes of a name that are not UTF-8 cannot be written as they are; both have signs for them."""
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path / "cache"))
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "test"):
        (tmp_path / "images" / split / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "images" / split / name / "0.png")
    store = resolve_store(DataConfig(source="folder"), tmp_path / "images")
    answer = CliRunner().invoke(app, ["info", "folder", "--data", str(store.root), "--json"], catch_exceptions=False)
    assert answer.exit_code == 0
    assert json.loads(answer.stdout)["classes"] == [name]
    answer = CliRunner().invoke(app, ["info", "folder", "--data", str(store.root)], catch_exceptions=False)
    assert answer.exit_code == 0
    assert r"caf\udce9" in answer.stdout
