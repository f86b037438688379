"""Which changes of a shipped recipe make it another one than the one whose accuracies were published."""

import pytest

from fastcifar.config import load_recipe
from fastcifar.config.shipped import recipe_differs


@pytest.mark.parametrize(
    ("name", "settings", "keys"),
    [
        ("lenet5", [], []),
        ("smoke/lenet5", [], []),
        ("beyond/speed94", [], []),
        ("ensemble-soft", [], []),
        ("lenet5", ["seed=1", "engine.device=cpu", "eval.train_logits=true", "checkpoint.keep=1"], []),
        ("lenet5", ["data.loader.name=torchvision", "data.loader.workers=1", "track=[\'tensorboard\']"], []),
        ("lenet5", ["train.epochs=2", "data.subset=500", "seed=1"], ["data.subset", "train.epochs"]),
        ("lenet5", ["optimizer={name=\'sgd\', lr=0.1}", "ema.decay=0.9"], ["optimizer.name", "ema"]),
        ("lenet5", ["name=short", "train.epochs=2"], ["train.epochs"]),
        ("ensemble-soft", ["combine.how=hard"], ["combine.how"]),
        ("smoke", ["name=mine"], None),
    ],
)
def test_keys_that_change_the_training_are_named(name, settings, keys):
    assert recipe_differs(load_recipe(name, settings)) == keys


def test_keys_may_be_left_out():
    recipe = load_recipe("lenet5", ["data.holdout=5000", "data.subset=9000"])
    assert recipe_differs(recipe, ["data.holdout"]) == ["data.subset"]
