"""The grammar of spaces: what is read as one, what as a plain value, and the message for what is neither."""

import math

import pytest
from optuna import create_study
from optuna.samplers import RandomSampler

from fastcifar.config import load_recipe
from fastcifar.config.toml import parse_toml
from fastcifar.errors import UserError
from fastcifar.sweep.spaces import Choices, Range, in_toml, parse_space, split_settings


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("optimizer.lr=log(0.01, 1)", Range("optimizer.lr", "log", 0.01, 1.0)),
        (" asam.rho = uniform( -1e-3 ,2 ) ", Range("asam.rho", "uniform", -0.001, 2.0)),
        ("train.epochs=int(1, 20)", Range("train.epochs", "int", 1, 20)),
        ("asam.rho=[0.5, 1, 2]", Choices("asam.rho", ("0.5", "1", "2"))),
        ('augment=[["crop(4)", "flip"], []]', Choices("augment", ('["crop(4)", "flip"]', "[]"))),
        ("ema=[false, {decay = 0.99}]", Choices("ema", ("false", '{"decay" = 0.99}'))),
        ("train.epochs=2", None),
        ("data.source=synthetic", None),
        ('model.name="log(1, 2)"', None),
    ],
)
def test_a_setting_is_a_space_or_a_value(text, space):
    assert parse_space(text) == space


def test_fixed_values_and_spaces_are_told_apart():
    fixed, spaces = split_settings(["train.epochs=2", "seed=[1, 2]", "optimizer.lr=log(1, 2)"])
    assert fixed == ["train.epochs=2"]
    assert [space.key for space in spaces] == ["seed", "optimizer.lr"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=log(1)", "two numbers"),
        ("a=log(1, 2, 3)", "two numbers"),
        ("a=log()", "two numbers"),
        ("a=log(2, 1)", "lower bound comes first"),
        ("a=int(3, 3)", "lower bound comes first"),
        ("a=log(0, 1)", "above 0"),
        ("a=log(-1, 1)", "above 0"),
        ("a=int(0.5, 2)", "0.5 is not a whole number"),
        ("a=uniform(x, 2)", "x is not a number"),
        ("a=uniform(nan, 2)", "is not a number"),
        ("a=uniform(0, inf)", "is not a number"),
        ("a=int(0, 1e400)", "is not a whole number"),
        ("a=logg(1, 2)", 'did you mean "log"'),
        ("a=crop(4)", "there is no crop"),
        ("a=[]", "1 to 1,000"),
        ("a=[1, 2", "not a valid TOML list"),
        ("a=[1, nonsense]", "not a valid TOML list"),
        ("a=[1, 2, 1]", "names 1 twice"),
    ],
)
def test_what_is_no_space_gets_one_message_that_names_the_setting(text, message):
    with pytest.raises(UserError, match=r"^--set ") as caught:
        split_settings([text])
    assert message in str(caught.value)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_has_one_space():
    with pytest.raises(UserError, match="has a space already"):
        split_settings(["a=[1, 2]", "a=log(1, 2)"])


@pytest.mark.parametrize(
    "value", [True, 3, 0.1, 1e-30, "a \"b\" \\ ü \n", [1, [2.5, "x"]], {"a": {"b c": [True]}}, 2**53]
)
def test_toml_on_one_line_reads_back(value):
    assert parse_toml(f"value = {in_toml(value)}")["value"] == value


def test_suggested_values_lie_in_their_space_and_are_read_by_the_recipe(seed):
    spaces = [parse_space(t) for t in ("optimizer.lr=log(1e-7, 1e-2)", "train.epochs=int(1, 3)", "seed=[1, 2]")]
    study = create_study(sampler=RandomSampler(seed=seed))
    lrs = []
    for _ in range(60):
        trial = study.ask()
        settings = [space.suggest(trial) for space in spaces]
        recipe = load_recipe("smoke/lenet5", settings)
        assert recipe.optimizer.lr == trial.params["optimizer.lr"]
        assert recipe.train.epochs == trial.params["train.epochs"]
        assert recipe.train.epochs in (1, 2, 3)
        assert recipe.seed in (1, 2)
        lrs.append(math.log10(recipe.optimizer.lr))
    assert min(lrs) >= -7
    assert max(lrs) <= -2
    assert sum(lr < -4.5 for lr in lrs) > 10, "a log space gives small values as often as large ones"


def test_small_spaces_list_their_values():
    assert parse_space("a=int(2, 5)").all_values() == [2, 3, 4, 5]
    assert parse_space("a=[0.5, 1]").all_values() == ["0.5", "1"]
    assert parse_space("a=uniform(0, 1)").all_values() is None
    assert parse_space("a=int(0, 100000)").all_values() is None
