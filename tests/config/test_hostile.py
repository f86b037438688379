"""Recipes that are meant to break something: every one gets one clear message, quickly, and nothing else happens."""

import os

import pytest

from fastcifar.config import load_recipe, to_toml
from fastcifar.config.schema import AugmentConfig
from fastcifar.errors import UserError
from tests.config.test_errors import GOOD

DEEP = 100_000
# What is wrong: (a key, the value written for it, what the message must hold)
OUT_OF_BOUNDS = {
    "endless epochs": ("train.epochs", "1000000000", "less than or equal to"),
    "an infinite rate": ("optimizer.lr", "inf", "finite number"),
    "no number as a mean": ("data.mean", "[nan, 0.5, 0.5]", "finite number"),
    "an infinite deviation": ("data.std", "[inf, 0.5, 0.5]", "finite number"),
    "two means": ("data.mean", "[0.5, 0.5]", "at least 3 items"),
    "a rate beyond float32": ("optimizer.lr", "1e300", "less than or equal to"),
    "a negative width": ("model", '{ name = "speednet", widths = [64, -1, 256] }', "model.widths.1"),
    "a width for terabytes": ("model", '{ name = "wide_resnet", widen = 1000000 }', "model.widen"),
    "a depth for terabytes": ("model", '{ name = "wide_resnet", depth = 600000004 }', "model.depth"),
    "a pyramid for terabytes": ("model", '{ name = "pyramidnet", alpha = 100000000 }', "model.alpha"),
    "a batch larger than the set": ("train.batch_size", "50001", "larger than the 50,000 training images"),
    "a batch larger than what the holdout leaves": ("data.holdout", "49900", "larger than the 100 training images"),
    "a holdout of everything": ("data.holdout", "50000", "leaves none of the 50,000 training images"),
    "more micro-batches than samples": ("train.accumulate", "129", "train.accumulate"),
    "AutoAugment twice": ("augment", '["autoaugment", "flip", "autoaugment"]', "autoaugment is there 2 times"),
    "a hole as large as the image": ("augment", '["cutout(256)"]', "256 px"),
    "a crop of nothing but padding": ("augment", '["crop(64)"]', "64 px"),
    "too many operations": ("augment", str(["flip"] * 100), "at most"),
    "a list for a dictionary's key": ("augment", '["crop({[]:1})"]', "not of the form"),
    "a setting twice": ("augment", '["crop(padding_px=1, padding_px=2)"]', "twice"),
    "a deep operation": ("augment", f'["crop({"(" * 5000})"]', "not of the form"),
    "a name that is a path": ("name", '"../../x"', "name:"),
    "a hidden name": ("name", '".x"', "name:"),
    "an empty name": ("name", '""', "name:"),
    "a long name": ("name", f'"{"x" * 300}"', "name:"),
    "a control character in a title": ("title", '"a\\u001bb"', "control character"),
    "a line break in a title": ("title", '"a\\nb"', "control character"),
    "a class without weight": ("loss.class_weights", "[" + "0.0, " * 10 + "]", "class_weights"),
    "two class weights for ten": ("loss.class_weights", "[1.0, 1.0]", "class_weights: 2 weights for 10 classes"),
    "a warm-up as long as the run": ("schedule.warmup_epochs", "2", "warmup_epochs"),
}
BAD_FILES = {
    "deep lists": (f"x = {'[' * DEEP}{']' * DEEP}", "nested"),
    "deep tables": (f"[{'.'.join('a' * 50_000)}]\nb = 1", "nested"),
    "a decimal of 5,000 digits": (f"seed = {'9' * 5000}\n{GOOD}", "valid TOML"),
    "a hexadecimal of 5,000 digits": (f"seed = 0x{'f' * 5000}\n{GOOD}", "64 bits"),
    "a negative of 65 bits": (f"seed = {-(2**63) - 1}\n{GOOD}", "64 bits"),
    "a large file": ("#" * 2_000_000, "bytes"),
    "an empty key": (f'"" = 1\n{GOOD}', "unknown key"),
    "a key with a line break": (f'"a\\nb" = 1\n{GOOD}', "unknown key"),
    "extends with a null": (f'extends = "a\\u0000b"\n{GOOD}', "extends:"),
    "extends of a long name": (f'extends = "{"x" * 5000}"\n{GOOD}', "extends:"),
    "extends of a device": (f'extends = "/dev/zero"\n{GOOD}', "extends:"),
    "extends of a folder": (f'extends = "."\n{GOOD}', "extends:"),
    "extends of too much": (f"extends = {['base.toml'] * 1000}\n{GOOD}", "extends:"),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base.toml").write_text(GOOD)
    return tmp_path


def message(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(*arguments)
    said = str(caught.value)
    assert len(said) < 4000, said[:5000]
    assert all(line.isprintable() for line in said.split("\n")), repr(said)
    return said


@pytest.mark.parametrize("case", OUT_OF_BOUNDS)
def test_a_value_out_of_bounds_is_refused(folder, case):
    key, value, wanted = OUT_OF_BOUNDS[case]
    said = message(folder / "base.toml", [f"{key}={value}"])
    assert wanted in said
    assert len(said.splitlines()) == 1, said


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_hostile_file_is_refused(folder, case):
    text, wanted = BAD_FILES[case]
    (folder / "bad.toml").write_text(text)
    said = message(folder / "bad.toml")
    assert wanted in said
    assert "bad.toml" in said


def test_a_set_of_many_dots_is_refused(folder):
    assert "nested" in message(folder / "base.toml", [f"{'.'.join('a' * 5000)}=1"])


@pytest.mark.parametrize("value", ["[" * DEEP, "0x" + "f" * 5000, "9" * 5000])
def test_a_hostile_value_is_refused(folder, value):
    message(folder / "base.toml", [f"seed={value}"])


@pytest.mark.timeout(60)
def test_special_files_are_refused_at_once(folder):
    os.mkfifo(folder / "pipe.toml")
    assert "pipe.toml: is not a regular file" in message(folder / "pipe.toml")
    assert "/dev/zero: is not a regular file" in message("/dev/zero")
    message("x" * 5000)
    message("a\0b")
    (folder / "bad.toml").write_text('extends = "pipe.toml"\n')
    assert "pipe.toml" in message(folder / "bad.toml")


@pytest.mark.timeout(60)
def test_a_long_chain_of_extends_is_refused_and_a_short_one_read(folder):
    previous = "base.toml"
    for k in range(1500):
        (folder / f"{k}.toml").write_text(f'extends = "{previous}"\n')
        previous = f"{k}.toml"
    assert load_recipe(folder / "5.toml").train.epochs == 2
    assert "extends" in message(folder / "1499.toml")


@pytest.mark.timeout(60)
def test_files_that_extend_the_next_twice_are_each_read_once(folder):
    previous = "base.toml"
    for k in range(14):
        (folder / f"{k}.toml").write_text(f'extends = ["{previous}", "{previous}"]\n[data]\nholdout = {k}\n')
        previous = f"{k}.toml"
    assert load_recipe(folder / previous).data.holdout == 13


@pytest.mark.timeout(60)
def test_of_many_unknown_keys_a_few_are_named_and_the_rest_counted(folder):
    (folder / "bad.toml").write_text("\n".join(f"k{k}=1" for k in range(100_000)) + GOOD)
    said = message(folder / "bad.toml")
    assert "k0: unknown key" in said
    assert "99,990 more" in said


@pytest.mark.parametrize("title", ["\x7f", "del \x7f", "\x00"])
def test_control_characters_are_refused(folder, title):
    assert "control character" in message(folder / "base.toml", [f"title={title}"])


@pytest.mark.parametrize("title", ["plain", 'quotes " and \\', "ünï ✓ 🐈"])
def test_what_is_accepted_is_read_back_the_same(folder, title):
    recipe = load_recipe(folder / "base.toml", [f"title={title}", "optimizer.lr=5e-324", "data.mean=[-0.0,1e-9,1]"])
    (folder / "copy.toml").write_text(to_toml(recipe))
    assert load_recipe(folder / "copy.toml") == recipe


def test_a_file_of_any_name_is_a_recipe_of_a_plain_name(folder):
    for name in ("my recipe", "[red]", "ünï", "..x", "a" * 200, "-"):
        (folder / f"{name}.toml").write_text(GOOD)
        made = load_recipe(folder / f"{name}.toml").name
        assert made
        assert "/" not in made
        assert not made.startswith((".", "-"))


def test_operations_are_checked_against_images_of_any_size():
    import torch

    from fastcifar.augment.augment import build_augment

    config = AugmentConfig(ops=["crop(20)"])
    settings = {"mean": [0.5] * 3, "std": [0.5] * 3, "seed": 0, "device": torch.device("cpu"), "dtype": torch.float32}
    build_augment(config, image_shape=(64, 64, 3), **settings)
    with pytest.raises(UserError, match="16 px"):
        build_augment(config, image_shape=(64, 16, 3), **settings)
