"""Every row of the published ladder against the shipped recipe of the same id, field by field.

The expectation is made from the ladder's own words by a translator that shares nothing with the recipes; a word that
it does not know is an error, so that a changed ladder cannot pass unread.
"""

import json
import re
from pathlib import Path

import pytest

from fastcifar.config import load_recipe, recipes_folder

LADDER = Path(__file__).resolve().parents[3] / "shared" / "ladder" / "ladder.json"
ROWS = json.loads(LADDER.read_text())["rows"] if LADDER.is_file() else []
COMBINED = json.loads(LADDER.read_text())["combined"] if LADDER.is_file() else []
needs_ladder = pytest.mark.skipif(not LADDER.is_file(), reason="the published ladder (shared/ladder) is not here")

WIDE = {"name": "wide_resnet", "depth": 16, "widen": 8, "dropout": 0.3, "first_relu": True, "last_bn": False}
WIDE |= {"shakedrop": 0.0, "shakedrop_gate": "batch"}
PYRAMID = {"name": "pyramidnet", "depth": 110, "alpha": 150, "block": "basic", "shakedrop": 0.0}
PYRAMID |= {"shakedrop_gate": "batch", "align": 1}
LAST_BN = WIDE | {"first_relu": False, "last_bn": True}
MODELS = {
    "lenet5": {"name": "lenet5"},
    "deep_baseline": {"name": "deep_baseline"},
    "deep_baseline_bn": {"name": "deep_baseline_bn"},
    "residual5": {"name": "residual5", "dropout": 0.1},
    "residual15": {"name": "residual15"},
    "wrn16_8": WIDE,
    "wrn16_8 without the first ReLU of each block": WIDE | {"first_relu": False},
    "wrn16_8 without the first ReLU, with a BatchNorm last in each block": LAST_BN,
    "pyramidnet110_a150": PYRAMID,
    "pyramidnet110_a150 shakedrop 0.5": PYRAMID | {"shakedrop": 0.5},
}
TORCH_DECAY = {"lr_norm_bias": None, "decay_per": "lr"}
INITS = {"default": "default", "kaiming_normal fan_out": "kaiming_normal_fan_out"}
# The ladder's summary says the same of all nets, but `models/wideresnet.py` and `models/wideresnet_pyramid.py` of the
# article's repository draw convolutions alone: for Linear they only set the bias to 0.
CONVOLUTIONS_ALONE = {"wide_resnet", "pyramidnet"}
OPTIMIZERS = {
    "adam": {"name": "adam", "betas": [0.9, 0.999], "eps": 1e-8, "decay": "all"},
    "sgd nesterov momentum 0.9": {"name": "sgd", "momentum": 0.9, "nesterov": True} | TORCH_DECAY,
}
SCHEDULES = {"constant": "constant", "cosine per epoch to 0": "cosine"}
ASAM = {
    None: None,
    "asam rho 2.0": {
        "rho": 2.0,
        "adaptive": True,
        "eta": 0.0,
        "scope": "all",
        "batch_norm": "update",
        "start": 0.0,
        "norm": "global",
    },
}
EMA = {None: None, "decay 0.999": {"decay": 0.999}}
NORMALIZE = {"0.5/0.5": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])}


def expected_ops(text):
    """Translate ``crop4+flip+cutout16 prob 0.5`` into (name, values by name) pairs."""
    ops = []
    for word in [] if text == "none" else text.split("+"):
        if match := re.fullmatch(r"crop(\d+)", word):
            ops.append(("crop", {"padding_px": int(match[1]), "pad": "zero"}))
        elif word == "flip":
            ops.append(("flip", {"p": 0.5, "alternate": False}))
        elif match := re.fullmatch(r"rotate(\d+)", word):
            ops.append(("rotate", {"degrees": float(match[1])}))
        elif word == "autoaugment":
            ops.append(("autoaugment", {}))
        elif match := re.fullmatch(r"cutout(\d+) prob ([\d.]+)", word):
            square = {"size_px": int(match[1]), "holes": 1, "fill": "black", "inside": False}
            ops.append(("cutout", square | {"p": float(match[2])}))
        else:
            raise AssertionError(f"the ladder has a new augmentation: {word}")
    return ops


def expected_mix(text):
    """Translate ``cutmix alpha 1 prob 1, only from 75% of the epochs on``."""
    if text is None:
        return None
    match = re.fullmatch(r"(cutmix|mixup) alpha ([\d.]+) prob ([\d.]+)(, only from (\d+)% of the epochs on)?", text)
    assert match, f"the ladder has a new mix: {text}"
    start = int(match[5]) / 100 if match[4] else 0.0
    drawn = {"name": match[1], "alpha": float(match[2]), "p": float(match[3])}
    return drawn | {"switch": 0.5, "start": start, "per_sample": False}


def got_ops(recipe):
    return [(op.name, op.model_dump(exclude={"name"})) for op in recipe.augment.ops]


@needs_ladder
def test_the_ladder_has_36_rows():
    assert (len(ROWS), len(COMBINED)) == (32, 4)


@needs_ladder
def test_the_top_level_holds_the_ladder_and_the_smoke_recipe_only():
    ids = {row["id"] for row in ROWS + COMBINED}
    assert {p.stem for p in recipes_folder().glob("*.toml")} == ids | {"smoke"}


@needs_ladder
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_training_row(row):
    recipe = load_recipe(row["id"])
    wanted = dict(row["settings"])
    assert recipe.name == row["id"]
    assert recipe.stage == row["table"]
    assert recipe.published.best == row["published_best"]
    assert recipe.published.last == row.get("published_last_epoch")
    assert recipe.target is None
    assert recipe.seed == wanted.pop("seed")
    mean, std = NORMALIZE[wanted.pop("normalize")]
    data = {
        "source": "cifar10",
        "holdout": 0,
        "holdout_seed": None,
        "resize": [],
        "subset": 0,
        "test_subset": 0,
        "mean": mean,
        "std": std,
    }
    assert recipe.data.model_dump(exclude={"loader"}) == data
    model = MODELS[row["model"]]
    init = INITS[wanted.pop("init")] + ("_conv" if model["name"] in CONVOLUTIONS_ALONE else "")
    assert recipe.model.model_dump() == model | {"init": init}
    optimizer = OPTIMIZERS[wanted.pop("optimizer")] | {"lr": wanted.pop("lr"), "weight_decay": wanted["weight_decay"]}
    assert recipe.optimizer.model_dump() == optimizer
    schedule = {"name": SCHEDULES[wanted.pop("schedule")], "per": "epoch", "warmup_epochs": 0.0, "final": 0.0}
    assert recipe.schedule.model_dump(exclude={"warmup_from"}) == schedule
    assert got_ops(recipe) == expected_ops(wanted.pop("augment"))
    mix = expected_mix(wanted.pop("mix"))
    assert (recipe.mix and recipe.mix.model_dump()) == mix
    loss = {"label_smoothing": wanted.pop("label_smoothing"), "class_weights": None, "reduction": "mean"}
    assert recipe.loss.model_dump() == loss
    assert (recipe.lookahead, recipe.select) == (None, None)
    assert (recipe.asam and recipe.asam.model_dump()) == ASAM[wanted.pop("asam")]
    assert (recipe.ema and recipe.ema.model_dump()) == EMA[wanted.pop("ema")]
    train = {"epochs": wanted.pop("epochs"), "batch_size": wanted.pop("batch_size"), "drop_last": False}
    assert recipe.train.model_dump() == train | {"accumulate": 1, "grad_clip": 0.0}
    member = any(row["id"] in combined["members"] for combined in COMBINED)
    assert recipe.eval.train_logits == member
    assert set(wanted) == {"weight_decay"}, "the ladder has a setting that this test does not know"


HOW = {
    "majority vote": {"how": "hard", "weights": None},
    "mean of the softmax outputs": {"how": "soft", "weights": None},
    "softmax outputs weighted 0.5, 0.25, 0.25": {"how": "weighted", "weights": [0.5, 0.25, 0.25]},
}


@needs_ladder
@pytest.mark.parametrize("row", COMBINED, ids=lambda row: row["id"])
def test_combined_row(row):
    recipe = load_recipe(row["id"])
    assert recipe.name == row["id"]
    assert recipe.stage == row["table"]
    assert recipe.published.best == row["published_best"]
    assert recipe.combine.members == row["members"]
    assert recipe.combine.protocol == "published"
    if row["id"] == "stacking":
        assert row["how"].startswith("MLP on the 30 concatenated logits")
        assert row["how"].endswith(f"meta seed {recipe.combine.meta_seed}")
        assert (recipe.combine.how, recipe.combine.meta) == ("stacking", "mlp")
    else:
        assert recipe.combine.model_dump(include={"how", "weights"}) == HOW[row["how"]]
