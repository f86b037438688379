import errno
import gzip
import os
import pickle
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcifar.config.schema import DataConfig
from fastcifar.data.releases import RELEASES
from fastcifar.data.sources import find_source, read_source
from fastcifar.data.store import locate, no_progress, resolve_store
from fastcifar.errors import UserError
from tests.data.making import NAMES, evil_archive, pack, use_small_releases, write_release

LAYOUTS = [(r.kind, r.layout) for r in RELEASES]


@pytest.fixture
def smalls(monkeypatch):
    return use_small_releases(monkeypatch)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTCIFAR_DATA", raising=False)


@pytest.mark.parametrize("how", ["inside", "itself", "archive inside", "archive itself"])
@pytest.mark.parametrize("which", LAYOUTS)
def test_release_is_read_wherever_it_lies(tmp_path, smalls, which, how):
    release = smalls[which]
    truth = write_release(tmp_path, release, seed=len(how))
    place = {"inside": tmp_path, "itself": tmp_path / release.folder}.get(how)
    if place is None:
        archive = pack(tmp_path, release)
        (tmp_path / release.folder).rename(tmp_path / "elsewhere")
        place = archive if how == "archive itself" else tmp_path
    data = read_source(find_source(place, release.kind), no_progress)
    assert data.classes == NAMES[release.kind]
    for split, (images, labels) in truth.items():
        assert np.array_equal(data.splits[split].images, images)
        assert np.array_equal(data.splits[split].labels, labels)


def test_a_file_that_is_not_the_official_one_is_noted(tmp_path, smalls):
    write_release(tmp_path, smalls["cifar10", "binary"], 0)
    notes = resolve_store(DataConfig(source="cifar10"), tmp_path).notes
    assert len(notes) == 6
    assert "data_batch_1.bin: not the official file" in notes[0]


def test_hashes_are_torchvisions():
    from torchvision.datasets import CIFAR10, CIFAR100

    for kind, oracle in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        release = next(r for r in RELEASES if r.kind == kind and r.layout == "python")
        known = oracle.train_list + oracle.test_list
        assert [[f.name, f.md5] for f in release.all_files] == known
        assert (release.folder, release.archive) == (oracle.base_folder, oracle.filename)


@pytest.mark.real
def test_real_data_is_what_it_should_be(real_train, real_images, real_store):
    assert real_train.images.shape == (50_000, 32, 32, 3)
    assert np.bincount(real_train.labels).tolist() == [5000] * 10
    # The mean colour of the training set, as everybody's recipes have it.
    assert np.allclose(real_train.images.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
    assert real_images.shape == (10_000, 32, 32, 3)
    assert real_store.classes[:3] == ["airplane", "automobile", "bird"]


# --------------------------------------------------------------------------------------------------- bad data folders


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _wrong_label(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3073 * 2] = 10
    path.write_bytes(content)


class _Evil:
    def __reduce__(self):
        return print, ("this must not run",)


BINARY_DAMAGE = {
    "truncated": ("data_batch_3.bin", _truncate, "truncated or damaged"),
    "missing": ("data_batch_5.bin", Path.unlink, "this file of the release is missing"),
    "empty": ("test_batch.bin", lambda p: p.write_bytes(b""), "0 bytes instead of"),
    "label": ("data_batch_2.bin", _wrong_label, "image 2 has label 10, not in 0..9"),
    "names": ("batches.meta.txt", lambda p: p.write_text("one\ntwo\n"), "does not name 10 classes"),
}
PYTHON_DAMAGE = {
    "truncated": ("data_batch_1", _truncate, "not a CIFAR pickle"),
    # Not by print's full name: Ray, where another test has started it, puts its own function in its place.
    "code": ("data_batch_2", lambda p: p.write_bytes(pickle.dumps(_Evil(), 2)), "it wants .*print, which"),
    "hidden code": (
        "test_batch",
        lambda p: p.write_bytes(pickle.dumps({"data": _Evil(), "labels": []}, 4)),
        "which CIFAR does not need",
    ),
    "no dictionary": ("data_batch_4", lambda p: p.write_bytes(pickle.dumps([1], 2)), "holds a list"),
    "no images": ("data_batch_5", lambda p: p.write_bytes(pickle.dumps({"data": 3}, 2)), "data is int instead of"),
    "not a pickle": ("batches.meta", lambda p: p.write_text("hello"), "not a CIFAR pickle"),
}
DAMAGE = [("binary", *v) for v in BINARY_DAMAGE.values()] + [("python", *v) for v in PYTHON_DAMAGE.values()]


@pytest.mark.parametrize(("layout", "name", "damage", "message"), DAMAGE)
def test_damaged_release_is_refused_by_file(tmp_path, smalls, capsys, layout, name, damage, message):
    release = smalls["cifar10", layout]
    write_release(tmp_path, release, 0)
    damage(tmp_path / release.folder / name)
    with pytest.raises(UserError, match=message) as caught:
        resolve_store(DataConfig(source="cifar10"), tmp_path)
    assert str(tmp_path / release.folder / name) in str(caught.value)
    assert capsys.readouterr().out == ""


def test_archives_cannot_escape_or_be_damaged(rng, tmp_path, smalls):
    release = smalls["cifar10", "python"]
    path = tmp_path / release.archive
    evil_archive(path, release, "../escaped")
    with pytest.raises(UserError, match="unsafe archive"):
        resolve_store(DataConfig(source="cifar10"), path)
    assert not (tmp_path / "escaped").exists()
    path.unlink()
    write_release(tmp_path, release, 0)
    content = pack(tmp_path, release).read_bytes()
    for where in rng.integers(2000, len(content) - 4, 10):  # wherever the byte is
        path.write_bytes(content[:where] + bytes([content[where] ^ 255]) + content[where + 1 :])
        with pytest.raises(UserError, match=release.archive):
            resolve_store(DataConfig(source="cifar10"), path)
    path.write_bytes(gzip.compress(b"nothing"))
    with pytest.raises(UserError, match="not a readable archive"):
        resolve_store(DataConfig(source="cifar10"), path)


def _archive(path: Path, members: list[tuple[str, int]]) -> None:
    """Make a compressed archive of files of zeros: small, whatever it unpacks to."""

    class Zeros:
        def read(self, count: int) -> bytes:
            return bytes(count)

    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, size in members:
            entry = tarfile.TarInfo(name)
            entry.size = size
            archive.addfile(entry, Zeros())


def test_archives_of_more_than_a_release_are_refused_from_their_headers(tmp_path, smalls, monkeypatch):
    release = smalls["cifar10", "python"]
    monkeypatch.setattr("fastcifar.data.releases.MAX_ARCHIVE_BYTES", 3_000_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = tmp_path / release.archive
    for members in ([(f"{release.folder}/a", 4_000_000)], [(f"{release.folder}/{k}", 1) for k in range(100)]):
        _archive(path, members)
        with pytest.raises(UserError, match="no release does"):
            resolve_store(DataConfig(source="cifar10"), path)
    with tarfile.open(path, "w") as archive:  # not compressed: a header that promises what is not there
        entry = tarfile.TarInfo(f"{release.folder}/data_batch_1")
        entry.size = 2**60
        archive.fileobj.write(entry.tobuf() + bytes(10_000))
    with pytest.raises(UserError, match=release.archive):
        resolve_store(DataConfig(source="cifar10"), path)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_huge_integers_in_a_pickled_release_are_refused(tmp_path, smalls):
    release = smalls["cifar10", "python"]
    write_release(tmp_path, release, 0)
    path = tmp_path / release.folder / "data_batch_1"
    for label in (2**70, -(2**63), 10**4000):
        batch = {"data": np.zeros((30, 3072), np.uint8), "labels": [0] * 29 + [label]}
        path.write_bytes(pickle.dumps(batch, 2))
        with pytest.raises(UserError, match="data_batch_1"):
            resolve_store(DataConfig(source="cifar10"), tmp_path)


def test_damage_within_an_archive_is_named_by_both(tmp_path, smalls):
    release = smalls["cifar10", "binary"]
    write_release(tmp_path, release, 0)
    _truncate(tmp_path / release.folder / "data_batch_4.bin")
    path = pack(tmp_path, release)
    with pytest.raises(UserError, match=rf"^{path}: {release.folder}/data_batch_4\.bin: .* truncated"):
        resolve_store(DataConfig(source="cifar10"), path)


def test_no_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="fastcifar data fetch cifar10"):
        resolve_store(DataConfig(source="cifar10"))
    with pytest.raises(UserError, match=r"nowhere \(--data\): no such file or folder"):
        resolve_store(DataConfig(source="cifar10"), Path("nowhere"))
    monkeypatch.setenv("FASTCIFAR_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"\(FASTCIFAR_DATA\): no cifar100 there"):
        resolve_store(DataConfig(source="cifar100"))


def test_a_place_that_the_file_system_refuses_is_one_message(tmp_path, monkeypatch):
    """As another user's folder is; a name that is too long is refused to the super-user, too."""
    long = tmp_path / ("x" * 300)
    with pytest.raises(UserError, match=rf"^{long} \(--data\): cannot be read: File name too long; make it readable"):
        locate("cifar10", long)
    monkeypatch.setenv("FASTCIFAR_DATA", str(long))
    with pytest.raises(UserError, match=rf"^{long} \(FASTCIFAR_DATA\): cannot be read: File name too long"):
        locate("cifar10")


@pytest.mark.parametrize("look", ["is_file", "is_dir"])
@pytest.mark.parametrize("kind", ["cifar10", "folder"])
def test_a_folder_that_may_not_be_looked_into_is_one_message(tmp_path, monkeypatch, look, kind):
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, look, refuse)
    with pytest.raises(UserError, match=rf"^{tmp_path} \(--data\): cannot be read: Permission denied"):
        locate(kind, tmp_path)


def test_the_home_of_an_unknown_user_is_one_message(monkeypatch):
    monkeypatch.setenv("FASTCIFAR_DATA", "~nosuchuser/x")
    with pytest.raises(UserError, match=r"^~nosuchuser/x \(FASTCIFAR_DATA\): cannot be read: there is no home of ~no"):
        locate("cifar10")


def test_places_are_looked_at_in_order(tmp_path, monkeypatch, smalls):
    release = smalls["cifar10", "binary"]
    monkeypatch.chdir(tmp_path)
    for seed, place in enumerate(("data", "variable", "option")):
        write_release(tmp_path / place, release, seed)
    assert locate("cifar10").path == Path("data") / release.folder
    monkeypatch.setenv("FASTCIFAR_DATA", "variable")
    assert locate("cifar10").path == Path("variable") / release.folder
    assert locate("cifar10", Path("option")).path == Path("option") / release.folder


# ------------------------------------------------------------------------------------------------------ image folders


def _image_folder(rng: np.random.Generator, root: Path, shape=(20, 24, 3)) -> dict[str, np.ndarray]:
    images = {}
    for split, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, shape, np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.png")
                images[f"{split}/{name}/{k}"] = pixels
    return images


def test_image_folder_becomes_a_store(rng, tmp_path):
    truth = _image_folder(rng, tmp_path / "set")
    store = resolve_store(DataConfig(source="folder"), tmp_path / "set")
    assert store.classes == ["cat", "dog"]
    assert store.name == str(tmp_path / "set"), "messages name what was given, not the store in the cache"
    assert store.image_shape == (20, 24, 3)
    train = store.split("train")
    assert train.labels.tolist() == [0] * 5 + [1] * 5
    for row, key in enumerate(f"train/{c}/{k}" for c in ("cat", "dog") for k in range(5)):
        assert np.array_equal(train.images[row], truth[key])


def test_a_folder_without_train_is_told_what_one_has(rng, tmp_path):
    _image_folder(rng, tmp_path / "set")
    with pytest.raises(UserError, match=r"train \(--data\): is not a folder with a .*train.train in it; an image"):
        find_source(tmp_path / "set" / "train", "folder")


def test_what_lies_beside_the_images_is_not_looked_at(rng, tmp_path):
    """Else each new run there would convert the set again, and what cannot be read would end it."""
    _image_folder(rng, tmp_path)
    before = find_source(tmp_path, "folder")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log").write_text("a line")
    (tmp_path / "nothing").symlink_to(tmp_path / "nowhere")
    assert find_source(tmp_path, "folder") == before
    image = next((tmp_path / "train").rglob("*.png"))
    os.utime(image, (1, 1))
    assert find_source(tmp_path, "folder") != before


def _link_classes(root: Path, into: Path) -> None:
    """Make an image folder whose class folders are links to those of another."""
    for split in ("train", "test"):
        (into / split).mkdir(parents=True)
        for name in ("cat", "dog"):
            (into / split / name).symlink_to(root / split / name)


def test_class_folders_that_are_links_are_told_apart_by_what_they_lead_to(rng, tmp_path):
    truths = []
    for name in ("a", "b"):
        truths.append(_image_folder(rng, tmp_path / name))
        _link_classes(tmp_path / name, tmp_path / f"links {name}")
    for name, truth in zip("ab", truths, strict=True):
        store = resolve_store(DataConfig(source="folder"), tmp_path / f"links {name}")
        assert np.array_equal(store.split("train").images[0], truth["train/cat/0"])
    before = find_source(tmp_path / "links a", "folder")
    assert find_source(tmp_path / "links a", "folder") == before
    os.utime(tmp_path / "a/train/dog/4.png", (1, 1))
    assert find_source(tmp_path / "links a", "folder") != before


def test_images_that_are_links_have_the_label_of_the_folder_that_the_link_is_in(rng, tmp_path):
    _image_folder(rng, tmp_path / "pool")
    root = tmp_path / "set"
    for image in (tmp_path / "pool").rglob("*.png"):
        link = root / image.relative_to(tmp_path / "pool")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)
    first = resolve_store(DataConfig(source="folder"), root)
    assert first.split("train").labels.tolist() == [0] * 5 + [1] * 5
    (root / "train/dog/0.png").rename(root / "train/cat/9.png")  # in the same order as before
    moved = resolve_store(DataConfig(source="folder"), root).split("train")
    assert moved.labels.tolist() == [0] * 6 + [1] * 4
    assert np.array_equal(moved.images, first.split("train").images)
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "zebra")
    assert resolve_store(DataConfig(source="folder"), root).classes == ["cat", "zebra"]


def test_links_that_lead_in_a_circle_are_walked_once(rng, tmp_path):
    _image_folder(rng, tmp_path / "set")
    (tmp_path / "set/train/dog/again").symlink_to(tmp_path / "set")
    (tmp_path / "set/train/whole").symlink_to(tmp_path / "set/train")
    assert find_source(tmp_path / "set", "folder") == find_source(tmp_path / "set", "folder")


def test_a_full_temporary_disk_is_not_called_damage(tmp_path, smalls, monkeypatch):
    release = smalls["cifar10", "python"]
    write_release(tmp_path, release, 0)
    path = tmp_path / release.archive
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / release.folder, release.folder)
    shutil.rmtree(tmp_path / release.folder)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(UserError, match=r"cannot be extracted into .*: No space left on device; set TMPDIR"):
        resolve_store(DataConfig(source="cifar10"), tmp_path)


def test_image_folder_is_checked(rng, tmp_path):
    root = tmp_path / "set"
    _image_folder(rng, root)
    (root / "train" / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"dog/3\.png: cannot be read as an image"):
        resolve_store(DataConfig(source="folder"), root)
    Image.fromarray(np.zeros((9, 24, 3), np.uint8)).save(root / "train" / "dog" / "3.png")
    with pytest.raises(UserError, match=r"dog/3\.png: 24x9 pixels"):
        resolve_store(DataConfig(source="folder"), root)
    (root / "train" / "dog" / "3.png").unlink()
    (root / "test" / "bird").mkdir()
    with pytest.raises(UserError, match="bird: a class that train/ does not have"):
        resolve_store(DataConfig(source="folder"), root)


def test_image_folder_of_many_formats_and_spellings(rng, tmp_path):
    """PNG, BMP and lossless WebP under any spelling; 16-bit grey is scaled, not clipped; the rest is mentioned."""
    root, grey = tmp_path / "set", np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    _image_folder(rng, root, (16, 32, 3))
    pixels = rng.integers(0, 256, (16, 32, 3), np.uint8)
    Image.fromarray(grey).save(root / "train/cat/a.Png")
    Image.fromarray(pixels).save(root / "train/cat/b.WebP", lossless=True)
    Image.fromarray(pixels).save(root / "train/cat/c.bmp")
    (root / "train/cat/notes.txt").write_text("mine")
    (root / "train/.hidden").mkdir()
    (root / "test/dog").rename(root / "test/.dog")
    (root / "test/dog").mkdir()
    store = resolve_store(DataConfig(source="folder"), root)
    assert store.classes == ["cat", "dog"]
    images = store.split("train").images
    assert len(images) == 13
    wanted = np.rint(grey / 257).astype(np.uint8)
    assert np.array_equal(images[5], np.repeat(wanted[..., None], 3, axis=2))
    assert np.array_equal(images[6], pixels)
    assert np.array_equal(images[7], pixels)
    said = "\n".join(store.notes)
    for part in ("train/.hidden: hidden", "test/dog: no images", "train/cat: 1 files"):
        assert part in said


def test_a_class_without_training_images_is_refused(rng, tmp_path):
    _image_folder(rng, tmp_path / "set")
    (tmp_path / "set/train/bird").mkdir()
    with pytest.raises(UserError, match=r"train/bird: a class folder without images"):
        resolve_store(DataConfig(source="folder"), tmp_path / "set")


def test_synthetic_images_are_the_same_everywhere(synthetic_store):
    train, test = synthetic_store.split("train"), synthetic_store.split("test")
    assert (len(train), len(test)) == (2000, 1000)
    assert np.bincount(train.labels).tolist() == [200] * 10
    assert len(np.unique(np.concatenate([train.images, test.images]).reshape(3000, -1), axis=0)) == 3000
    assert synthetic_store.manifest.content.startswith("928ee38aadfc2ffa")
