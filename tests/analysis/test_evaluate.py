"""Corruptions against their formulas and other libraries; evaluation on other data through the command line."""

import colorsys
import json

import numpy as np
import pytest
from PIL import ExifTags, Image
from scipy.ndimage import convolve1d, zoom
from sklearn.metrics import accuracy_score, log_loss

from fastcifar.analysis import corruptions
from fastcifar.analysis.corruptions import CORRUPTIONS, LEVELS, corrupt
from fastcifar.analysis.predict import load_trained, predict
from fastcifar.data.store import resolve_store
from fastcifar.models import build_model
from fastcifar.run_directory import RunDirectory
from tests.command import fastcifar
from tests.run_directories import add_weights, logits_for, make_run, recipe


@pytest.fixture
def x(rng):
    """Smooth images float64 (6, 32, 32, 3) in 0..1."""
    return np.clip(zoom(rng.random((6, 5, 5, 3)), (1, 6.4, 6.4, 1), order=1), 0, 1)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("gaussian_noise", lambda x: (0.04, 0.06, 0.08, 0.09, 0.10)),
        ("shot_noise", lambda x: [np.sqrt(x / c) for c in (500, 250, 100, 75, 50)]),
        ("speckle_noise", lambda x: [x * s for s in (0.06, 0.10, 0.12, 0.16, 0.20)]),
    ],
)
def test_noise_has_the_deviation_of_its_formula(rng, name, deviation):
    x = np.full((40, 32, 32, 3), 0.4)
    for level, expected in zip(LEVELS, deviation(0.4), strict=True):
        changed = CORRUPTIONS[name](x, level, rng) - x
        assert changed.std() == pytest.approx(expected, rel=0.02)
        assert abs(changed.mean()) < 0.002


def test_impulse_noise_hits_its_share_with_both_kinds(rng):
    x = np.full((40, 32, 32, 3), 0.4)
    for level, share in zip(LEVELS, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        changed = corruptions.impulse_noise(x, level, rng)
        assert (changed == 0).mean() == pytest.approx(share / 2, rel=0.25)
        assert (changed == 1).mean() == pytest.approx(share / 2, rel=0.25)


def test_gaussian_blur_is_two_convolutions(x, rng):
    for level, sigma in zip(LEVELS, (0.4, 0.6, 0.7, 0.8, 1.0), strict=True):
        place = np.arange(-4, 5)
        kernel = np.where(np.abs(place) <= int(4 * sigma + 0.5), np.exp(-(place**2) / (2 * sigma**2)), 0)
        once = convolve1d(x, kernel / kernel.sum(), axis=1, mode="nearest")
        expected = convolve1d(once, kernel / kernel.sum(), axis=2, mode="nearest")
        np.testing.assert_allclose(corruptions.gaussian_blur(x, level, rng), expected, atol=1e-12)


def test_defocus_keeps_what_is_flat_and_its_disk_is_opencvs():
    cv2 = pytest.importorskip("cv2")
    for radius, rim in ((0.3, 0.4), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)):
        place = np.arange(-8, 9)
        inside = (place[:, None] ** 2 + place**2 <= radius**2).astype(np.float64)
        theirs = cv2.GaussianBlur(inside / inside.sum(), (3, 3), sigmaX=rim)
        ours = corruptions.disk(radius, rim)
        reach = len(ours) // 2
        np.testing.assert_allclose(ours, theirs[8 - reach : 9 + reach, 8 - reach : 9 + reach], atol=1e-6)
        assert theirs.sum() == pytest.approx(ours.sum())


def test_a_zoom_is_scipys(x):
    for factor in (1.0, 1.05, 1.11, 1.25):
        middle = int(np.ceil(32 / factor))
        start = (32 - middle) // 2
        theirs = zoom(x[:, start : start + middle, start : start + middle], (1, factor, factor, 1), order=1)
        over = (theirs.shape[1] - 32) // 2
        expected = theirs[:, over : over + 32, over : over + 32]
        np.testing.assert_allclose(corruptions.zoomed(x, factor), expected, atol=1e-12)


def test_brightness_and_saturation_are_colorsys(rng):
    pixels = np.concatenate([rng.random((30, 3)), np.repeat(rng.random((3, 1)), 3, 1), np.zeros((1, 3))])
    levels = zip(LEVELS, (0.05, 0.1, 0.15, 0.2, 0.3), ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), strict=True)
    for level, more, (a, b) in levels:
        hsv = [colorsys.rgb_to_hsv(*p) for p in pixels]
        brighter = [colorsys.hsv_to_rgb(h, s, min(1, v + more)) for h, s, v in hsv]
        purer = [colorsys.hsv_to_rgb(h, min(1, a * s + b), v) for h, s, v in hsv]
        x = pixels[None, None]
        np.testing.assert_allclose(corruptions.brightness(x, level, rng)[0, 0], brighter, atol=1e-12)
        np.testing.assert_allclose(corruptions.saturate(x, level, rng)[0, 0], purer, atol=1e-12)


def test_contrast_shrinks_the_deviation_and_keeps_the_mean(x, rng):
    changed = corruptions.contrast(x, 5, rng)
    np.testing.assert_allclose(changed.mean((1, 2)), x.mean((1, 2)))
    np.testing.assert_allclose(changed.std((1, 2)), 0.15 * x.std((1, 2)))


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_a_corruption_repeats_grows_with_its_level_and_leaves_its_input(rng, name, x):
    images = (255 * x).astype(np.uint8)
    before = images.copy()
    made = [corrupt(images, name, level, seed=3) for level in LEVELS]
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(made[4], corrupt(images, name, 5, seed=3))
    assert made[0].dtype == np.uint8
    assert made[0].shape == images.shape
    distances = [np.abs(m.astype(int) - images).mean() for m in made]
    assert distances[4] > 0
    if name != "saturate":  # its levels go to less saturation and then to more
        assert distances[4] == max(distances)


# ----------------------------------------------------------------------------------------------- on the command line


@pytest.fixture
def run(tmp_path, synthetic_store, rng):
    """A run on the synthetic images with weights that nobody trained, and its test images and labels."""
    made = recipe("tiny", data={"source": "synthetic"})
    test = synthetic_store.split("test")
    labels = np.asarray(test.labels, np.int64)
    run = make_run(tmp_path / "run", {"test/labels": labels, "test/last/raw": logits_for(labels, rng, 2.0)}, made)
    run.write_summary({**{k: v for k, v in run.summary.items() if k != "format"}, "classes": synthetic_store.classes})
    add_weights(run, "last", build_model(made.model, seed=1).state_dict())
    return run


def test_the_runs_own_test_set_as_scikit_learn_sees_it(run, tmp_path):
    done = fastcifar("evaluate", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    clean = json.loads(done.stdout)["clean"]
    test = resolve_store(run.recipe.data).split("test")
    p = predict(load_trained(run), np.asarray(test.images))
    assert clean["accuracy"] == pytest.approx(100 * accuracy_score(test.labels, p.argmax(1)))
    q = p.astype(np.float64) / p.astype(np.float64).sum(1, keepdims=True)
    assert clean["loss"] == pytest.approx(log_loss(test.labels, q, labels=range(10)), rel=1e-4)
    assert clean["images"] == len(test.labels)


@pytest.mark.parametrize(("level", "views"), [(1, 7), (2, 12), (3, 16), (4, 21), (5, 26)])
def test_zoom_blur_has_the_views_of_the_papers_files(level, views, rng, monkeypatch):
    """scipy enlarges 26 px by a little more than 1.25 to 33, by 1.25 itself to 32: the very factors count."""
    x, factors = rng.random((1, 32, 32, 3)), []
    monkeypatch.setattr(corruptions, "zoomed", lambda images, factor: factors.append(factor) or images)
    np.testing.assert_allclose(corruptions.zoom_blur(x, level, rng), x)
    assert len(factors) == views
    np.testing.assert_allclose(factors, 1 + 0.01 * np.arange(views), rtol=1e-12)
    assert level < 5 or factors[25] > 1.25


def test_corruptions_make_a_table(run, tmp_path):
    words = ("--limit", "50", "--corruptions", "contrast,gaussian_noise", "--levels", "1,5")
    done = fastcifar("evaluate", "run", *words, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert [(row["corruption"], row["level"]) for row in found["corrupted"]] == [
        ("contrast", 1), ("contrast", 5), ("gaussian_noise", 1), ("gaussian_noise", 5)
    ]  # fmt: skip
    assert found["mean_corrupted"] == pytest.approx(np.mean([row["accuracy"] for row in found["corrupted"]]))
    table = fastcifar("evaluate", "run", *words, cwd=tmp_path).stdout
    assert "gaussian_noise" in table
    assert "level 5" in table


def test_a_folder_of_classes_is_matched_by_name(run, tmp_path, synthetic_store):
    test = synthetic_store.split("test")
    rows = np.arange(30)
    for row in rows:
        folder = tmp_path / "other" / synthetic_store.classes[int(test.labels[row])]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(test.images[row])).save(folder / f"{row}.png")
    found = json.loads(fastcifar("evaluate", "run", "--data", "other", "--json", cwd=tmp_path).stdout)
    expected = predict(load_trained(run), np.asarray(test.images[rows])).argmax(1) == np.asarray(test.labels[rows])
    assert found["clean"]["images"] == 30
    assert found["clean"]["accuracy"] == pytest.approx(100 * expected.mean())
    (tmp_path / "other" / "unicorn").mkdir()
    done = fastcifar("evaluate", "run", "--data", "other", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert '"unicorn"' in done.stderr


def test_image_folders_with_a_class_named_train_and_turned_photographs_are_read_as_for_training(
    run, tmp_path, synthetic_store, rng
):
    """Training on an image folder reads pixels as they are stored, whatever the files' EXIF data say of them."""
    classes = ["train", *synthetic_store.classes[1:]]
    run.write_summary({**{k: v for k, v in run.summary.items() if k != "format"}, "classes": classes})
    images, labels = rng.integers(0, 256, (20, 32, 32, 3), np.uint8), np.arange(20) % 2
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 3
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        for split in ("train", "test"):
            folder = tmp_path / "photos" / split / classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{row:02}.png", exif=turned)
    right = 100 * (predict(load_trained(RunDirectory.open(run.folder)), images).argmax(1) == labels).mean()
    for data in ("photos", "photos/test"):
        found = json.loads(fastcifar("evaluate", "run", "--data", data, "--json", cwd=tmp_path).stdout)
        assert (found["clean"]["images"], found["clean"]["accuracy"]) == (20, pytest.approx(right)), data


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere"),
        (["run", "--data", "nothing"], "nothing (--data)"),
        (["run", "--corruptions", "gausian_noise"], "gaussian_noise"),
        (["run", "--corruptions", "all", "--levels", "0"], "levels of 1 to 5"),
        (["run", "--levels", "3"], "add --corruptions"),
        (["run", "--seed", "0"], "add --corruptions"),
        (["run", "--split", "tset"], "test, train"),
        (["run", "--weights", "bset"], "bset"),
    ],
    ids=" ".join,
)
def test_bad_input_gives_one_line_and_status_2(run, tmp_path, words, message):
    done = fastcifar("evaluate", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
