"""Bad recipes: every message names the file, the key and what to write instead; the command ends with status 2."""

import subprocess
import sys

import pytest

from fastcifar.config import load_recipe
from fastcifar.errors import UserError

GOOD = """
[model]
name = "lenet5"
[optimizer]
name = "sgd"
lr = 0.1
[train]
epochs = 2
"""

# What is wrong: (text put in front of or in place of GOOD, what the message must hold)
BAD_KEYS = {
    "unknown top-level key": ("modle = 3\n" + GOOD, ["modle", "unknown key", 'did you mean "model"']),
    "a key with the name of a union's tag": ("ours = 3\n" + GOOD, [": ours: unknown key", "allowed: name, title"]),
    "such a key of a table": (GOOD + "ours = 3\n", ["train.ours: unknown key", "batch_size"]),
    "such a key of a model": (GOOD.replace('"lenet5"', '"lenet5"\nours = 3'), ["model.ours: unknown key", "init"]),
    "unknown key of a table": (GOOD + "epoch = 3\n", ["train.epoch:", 'did you mean "epochs"', "batch_size"]),
    "unknown key of a model": (
        GOOD.replace('"lenet5"', '"wide_resnet"\ndept = 16'),
        ["model.dept:", 'did you mean "depth"', "widen"],
    ),
    "key of another model": (GOOD.replace('"lenet5"', '"lenet5"\ndepth = 16'), ["unknown key; allowed: init, name"]),
    "key of another optimizer": (
        GOOD.replace("lr = 0.1", "lr = 0.1\nbetas = [0.9, 0.9]"),
        ["optimizer.betas:", "momentum"],
    ),
    "key of another table": ("epochs = 3\n" + GOOD, [": epochs: unknown key", 'did you mean "train.epochs"?', "title"]),
    "key of two other tables": ("batch_size = 3\n" + GOOD, ['mean "train.batch_size" or "eval.batch_size"?']),
    "key of many other tables": (GOOD + 'name = "x"\n', ['train.name:', 'mean "name", "mix.name" or "model.name"?']),
    "misspelt key of another table": ("weight-decay = 0\n" + GOOD, ['did you mean "optimizer.weight_decay"?']),
    "key between two tables": (GOOD + "lr = 0.1\n", ["train.lr:", 'did you mean "optimizer.lr"?', "batch_size"]),
    "key by another program's name": (GOOD + "num_epochs = 3\n", ["train.num_epochs:", 'did you mean "train.epochs"?']),
    "a mode by its own name": (GOOD + "compile = 1\n", ["train.compile:", 'did you mean "engine.mode"?']),
    "table and key in one": ("ema_decay = 0.9\n" + GOOD, [": ema_decay:", 'did you mean "ema.decay"?']),
    "table and key in one, misspelt": ("sam_rho = 2.0\n" + GOOD, ['did you mean "asam.rho"?']),
    "an option of the command line": (GOOD + "num_gpus = 8\n", ["train.num_gpus:", "fastcifar run --devices"]),
    "only a stranger is close": (GOOD + "steps = 4\n", ["train.steps: unknown key; allowed: epochs"]),
    "another name, another table": ("Learning_Rate = 0.1\n" + GOOD, ['did you mean "optimizer.lr"?']),
    "table at a wrong place": (GOOD + "[loader]\nworkers = 3\n", [": loader:", 'did you mean "data.loader"?']),
    "unknown key two levels down": (GOOD + "[data.loader]\nworker = 3\n", ["data.loader.worker:", '"workers"']),
    "unknown key of an optional table": (GOOD + "[asam]\nrho = 1.0\nradius = 3\n", ["asam.radius:", "rho, adaptive"]),
}
BAD_VALUES = {
    "unknown model": (GOOD.replace("lenet5", "lenet"), ["model.name:", 'did you mean "lenet5"', "pyramidnet110_a150"]),
    "unknown optimizer": (GOOD.replace("sgd", "sdg"), ["optimizer.name:", 'did you mean "sgd"', "muon"]),
    "unknown schedule": (GOOD + '[schedule]\nname = "cosin"\n', ["schedule.name:", 'did you mean "cosine"', "linear"]),
    "unknown mix": (GOOD + '[mix]\nname = "cutmx"\n', ["mix.name:", 'did you mean "cutmix"', "mixup"]),
    "unknown loader": (
        GOOD + '[data.loader]\nname = "ffvc"\n',
        ["data.loader.name:", 'did you mean "ffcv"', "resident"],
    ),
    "unknown precision": (
        GOOD + '[engine]\nprecision = "bf61"\n',
        ["engine.precision:", 'did you mean "bf16"', "fp32"],
    ),
    "unknown augmentation": ('augment = ["crap(4)"]\n' + GOOD, ["augment.ops:", 'did you mean "crop"', "autoaugment"]),
    "augmentation out of range": ('augment = ["crop(99)"]\n' + GOOD, ["augment.ops:", '"crop(99)"', "64"]),
    "augmentation with an unknown setting": (
        'augment = ["cutout(16, prob=1)"]\n' + GOOD,
        ["augment.ops:", "prob", "p,"],
    ),
    "augmentation setting of another kind": (
        """augment = ["crop(4, pad='mirror')"]\n""" + GOOD,
        ["augment.ops:", "pad", "'zero' or 'reflect'"],
    ),
    "summed loss with class weights": (
        GOOD + '[loss]\nreduction = "sum"\nclass_weights = [1.0]\n',
        ["loss.reduction:", "works without class_weights"],
    ),
    "a share of Lookahead's way back": (
        GOOD.replace('name = "lenet5"', 'name = "speednet"\nwhiten_bias_rate = "fade"') + "[lookahead]\n",
        ["whiten_bias_rate", "works without lookahead"],
    ),
    "two averages": (GOOD + "[ema]\n[lookahead]\n", ["lookahead", "ema = false"]),
    "augmentation that is not one": ('augment = ["crop(4"]\n' + GOOD, ["augment.ops:", '"crop(4"', "name(value"]),
    "augmentation of a wrong type": ("augment = [4]\n" + GOOD, ["augment.ops:", "4 is not a text"]),
    "negative rate": (GOOD.replace("lr = 0.1", "lr = -0.1"), ["optimizer.lr:", "-0.1", "greater than 0"]),
    "text for a number": (GOOD.replace("lr = 0.1", 'lr = "0.1"'), ["optimizer.lr:", "'0.1'", "number"]),
    "fraction of an epoch": (GOOD.replace("epochs = 2", "epochs = 1.5"), ["train.epochs:", "1.5", "integer"]),
    "no epochs": (GOOD.replace("epochs = 2", "epochs = 0"), ["train.epochs:", "greater than or equal to 1"]),
    "a truth value for a number": (GOOD.replace("epochs = 2", "epochs = true"), ["train.epochs: true", "integer"]),
    "a text for a truth value": (GOOD + 'drop_last = "True"\n', ["train.drop_last: 'True' should be", "mean true, in"]),
    "a text where a truth value would do": (
        GOOD + '[engine]\nworking_copy = "false"\n',
        ["engine.working_copy:", "mean false, in lower case and without quotes", "allowed: auto, true, false"],
    ),
    "a zero deviation": (GOOD + "[data]\nstd = [0.5, 0.0, 0.5]\n", ["data.std.1:", "greater than or equal to 0.001"]),
    "a value for a table": ("data = 3\n" + GOOD, ["data:", "3 is not a table", "source"]),
    "true for an optional table": ("asam = true\n" + GOOD, ["asam:", "is not a table", "rho"]),
    "a missing table": (GOOD.replace("[train]\nepochs = 2", ""), ["train:", "is missing"]),
    "a missing key": (GOOD.replace("lr = 0.1", ""), ["optimizer.lr:", "is missing"]),
    "a missing name": (GOOD.replace('name = "sgd"', ""), ["optimizer.name:", "is missing", "sgd, adam"]),
    "a depth that cannot be": (GOOD.replace('"lenet5"', '"wrn16_8"\ndepth = 17'), ["model.depth:", "17", "16"]),
    "a depth below a right one": (GOOD.replace('"lenet5"', '"wrn16_8"\ndepth = 27'), ["model.depth:", "nearest is 28"]),
    "a pyramid's depth": (GOOD.replace('"lenet5"', '"pyramidnet"\ndepth = 111'), ["model.depth:", "111", "110"]),
    "an alignment that cannot be": (
        GOOD.replace('"lenet5"', '"pyramidnet"\nalign = 7'),
        ["model.align:", "1, 8, 16, 32"],
    ),
}
BAD_COMBINATIONS = {
    "asam with adam": (
        GOOD.replace("sgd", "adam") + "[asam]\nrho = 2.0\n",
        ["asam", 'optimizer.name = "sgd"', '"adam"'],
    ),
    "a working copy with micro-batches": (
        GOOD.replace("[train]", "[engine]\nworking_copy = true\n\n[train]\naccumulate = 2"),
        ["engine.working_copy", "train.accumulate = 1"],
    ),
    "augmentation in a loader that has none": (
        GOOD + '[augment]\nwhere = "loader"\n[data.loader]\nname = "dali"\n',
        ["augment.where", "torchvision"],
    ),
    "a native order elsewhere": (GOOD + '[data.loader]\norder = "native"\n', ["data.loader.order", "dali"]),
    "weights for other members": (
        '[combine]\nhow = "weighted"\nmembers = ["a", "b"]\nweights = [1.0]\n',
        ["combine", "1 weights for 2 members"],
    ),
    "weights of a vote without": (
        '[combine]\nhow = "soft"\nmembers = ["a", "b"]\nweights = [1.0, 2.0]\n',
        ["combine.weights: are for how = weighted or hard, not soft"],
    ),
    "a moment that never forgets": (
        GOOD.replace('"sgd"', '"adam"\nbetas = [0.9, 1.0]'),
        ["optimizer.betas.1: 1.0", "less than 1"],
    ),
    "a combination of one": ('[combine]\nhow = "soft"\nmembers = ["a"]\n', ["combine.members", "at least 2"]),
}
BAD_FILES = {
    "not TOML": ("[model\nname = 3", ["not valid TOML", "line 1"]),
    "a key twice": ("seed = 1\nseed = 2\n" + GOOD, ["not valid TOML", "line 2"]),
    "no base": ('extends = "basee.toml"\n' + GOOD, ["extends:", "basee.toml", 'did you mean "base.toml"']),
    "a base that is a number": ("extends = 3\n" + GOOD, ["extends:", "3", "file name"]),
    "a base that is itself": ('extends = "bad.toml"\n', ["extends itself", "bad.toml -> bad.toml"]),
    "a loop": ('extends = "loop.toml"\n', ["extends itself", "bad.toml -> loop.toml -> bad.toml"]),
}
ALL = {**BAD_KEYS, **BAD_VALUES, **BAD_COMBINATIONS, **BAD_FILES}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base.toml").write_text(GOOD)
    (tmp_path / "loop.toml").write_text('extends = "bad.toml"\n')
    return tmp_path


def message(*args):
    with pytest.raises(UserError) as caught:
        load_recipe(*args)
    return str(caught.value)


def test_the_good_recipe_is_good(folder):
    assert load_recipe(folder / "base.toml").train.epochs == 2


@pytest.mark.parametrize("case", ALL)
def test_bad_recipe(folder, case):
    text, wanted = ALL[case]
    (folder / "bad.toml").write_text(text)
    said = message(folder / "bad.toml")
    assert "bad.toml" in said or "loop.toml" in said
    for part in wanted:
        assert part in said, said
    assert "{" not in said, "a whole table in a message helps nobody"
    assert len(said.splitlines()) == 1, said


def test_all_problems_are_told_at_once(folder):
    (folder / "bad.toml").write_text(
        GOOD.replace("lenet5", "lenet").replace("lr = 0.1", "lr = 0") + "[ema]\ndecay = 2.0\n"
    )
    lines = message(folder / "bad.toml").splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{folder / 'bad.toml'}: ") for line in lines)


def test_not_utf8(folder):
    (folder / "bad.toml").write_bytes(b'title = "na\xefve"\n' + GOOD.encode())
    said = message(folder / "bad.toml")
    assert "bad.toml" in said
    assert "UTF-8" in said


def test_a_folder_for_a_file(folder):
    assert "is a folder, not a recipe file" in message(folder)


def test_a_misspelt_shipped_name():
    said = message("lenet5-kaimin")
    assert "Did you mean lenet5-kaiming" in said
    assert "fastcifar recipes" in said


def test_an_empty_name():
    assert "no such recipe" in message("nothing-of-the-kind-at-all")


OVERRIDES = {
    "train.epochs": ["--set train.epochs", "key=value"],
    "=3": ["--set =3", "key=value"],
    "train..epochs=3": ["--set train..epochs=3", "key=value"],
    "train.epochs=": ["--set train.epochs=", "no value"],
    "train.epochs=[1": ["--set train.epochs=[1", "not a valid TOML value"],
    "augment=[crop(4)]": ["not a valid TOML value", """--set 'augment=["crop(4)"]'"""],  # as a shell hands it on
    "augment=flip": ["augment:", "'flip' is not a list of operations"],
    "optimizer=sgd": ["optimizer:", "'sgd' is not a table; its name is optimizer.name"],
    "optimizer.name=sgd": ["optimizer.lr:", "is missing", "another name", "none of the keys"],
    "seed.x=1": ["--set seed.x=1", "seed is a value (42)"],
    "train.epochs=many": ["train.epochs:", "'many'", "integer"],
    "train.epoch=3": ["train.epoch:", 'did you mean "epochs"'],
    "epochs=3": [": epochs: unknown key", 'did you mean "train.epochs"?'],
    "engine.working_copy=True": ["'True' is not allowed", "did you mean true, in lower case", "auto, true, false"],
    "model.name=lenet": ["model.name:", 'did you mean "lenet5"'],
    "asam.rho=2": ["asam", 'optimizer.name = "sgd"'],
    "mix.alpha=1": ["mix.name:", "is missing", "cutmix"],
}


@pytest.mark.parametrize("text", OVERRIDES)
def test_bad_override(text):
    said = message("lenet5", [text])
    for part in OVERRIDES[text]:
        assert part in said, said


@pytest.mark.parametrize("key", ["asam", "ema", "mix"])
def test_false_takes_an_optional_table_away_whether_it_is_there_or_not(key):
    assert getattr(load_recipe("wrn-200", [f"{key}=false"]), key) is None


def test_overrides_reach_tables_that_are_not_written_out():
    recipe = load_recipe(
        "lenet5", ["data.loader.workers=3", "ema.decay=0.9", "engine.precision=fp32", "title=two words"]
    )
    assert (recipe.data.loader.workers, recipe.ema.decay, recipe.engine.precision) == (3, 0.9, "fp32")
    assert recipe.title == "two words"


def test_an_override_of_a_preset_keeps_the_rest_of_it():
    model = load_recipe("wrn-sgd", ["model.widen=1"]).model
    assert (model.name, model.depth, model.widen, model.init) == ("wide_resnet", 16, 1, "kaiming_normal_fan_out_conv")


@pytest.mark.parametrize(
    "arguments", [["show", "lenet"], ["show", "lenet5", "--set", "train.epoch=3"], ["run", "lenet"]]
)
def test_the_command_ends_with_status_2_and_no_traceback(arguments):
    done = subprocess.run([sys.executable, "-m", "fastcifar", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "lenet5" in done.stderr
    assert done.stdout == ""
