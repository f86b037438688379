"""Whatever is wrong with an import path is told when the recipe is loaded, in one message."""

import re

import pytest

from fastcifar.config import load_recipe
from fastcifar.errors import UserError
from fastcifar.models import build_model
from tests.command import fastcifar

MODEL = "model.name=theirs.nets:Net"


def optimizer(path, more=""):
    return [f'optimizer={{name="{path}", lr=1e-3{more}}}']



WRONG = {
    "no module": (["model.name=thiers.nets:Net"], ['"thiers.nets:Net"', 'no module "thiers"', "working directory"]),
    "no submodule": (["model.name=theirs.net:Net"], ['no module "theirs.net"']),
    "no name": (["model.name=theirs.nets:Nett"], ['nets.py has no "Nett"', 'did you mean "Net"']),
    "no form": (['model.name=theirs:nets:Net'], ["model.name", '"package.module:Name"']),
    "a file": (["model.name=./nets.py:Net"], ['"package.module:Name"']),
    "not a maker": (["model.name=theirs.nets:number"], ["of type int", "makes no model"]),
    "a missing package": (["model.name=theirs.bad:Net"], ["theirs.bad failed", "a_package_that_is_not_there"]),
    "an error": (["model.name=theirs.raises:Net"], ["ValueError: on import", "raises.py, line 1"]),
    "an option": ([MODEL, "model.options={widht=3}"], ["model.options", '"widht" (did you mean "width"?)']),
    "another key": ([MODEL, "model.depth=3"], ['model.depth: unknown key', "options"]),
    "no optimizer": (optimizer("theirs.opt:NotOne"), ["not a subclass of torch.optim.Optimizer"]),
    "a closure": (optimizer("torch.optim:LBFGS"), ["needs a closure"]),
    "an option of an optimizer": (
        optimizer("theirs.opt:Lion", ", options={beta=3}"), ["optimizer.options", 'mean "betas"'],
    ),
    "no weight decay": (
        optimizer("theirs.opt:Plain", ", weight_decay=0.1"), ["optimizer.weight_decay", "Plain takes none"],
    ),
    "an operation": (['augment=["theirs.ops:Grids(3)"]'], ["augment", 'ops.py has no "Grids" (did you mean "Grid"?)']),
    "its values": (['augment=["theirs.ops:Grid(a)"]'], ["(value, key=value)"]),
    "its arguments": (['augment=["theirs.ops:Grid(1, 2, 3)"]'], ["Grid(1, 2, 3)", "TypeError"]),
    "a transform on the device": (['augment=["theirs.ops:Shadow"]'], ["no method augment(images, draws)", '"loader"']),
    "an operation in workers": (
        ['augment={ops=["theirs.ops:Grid(3)"], where="loader"}'], ["is not callable", "transform of an image"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_path_is_one_message(workplace, case):
    overrides, parts = WRONG[case]
    with pytest.raises(UserError) as caught:
        load_recipe("smoke", overrides)
    said = str(caught.value)
    assert len(said.splitlines()) == 1, said
    for part in [*parts, "smoke.toml"]:
        assert part in said, said


def test_the_command_says_so_and_makes_nothing(workplace):
    done = fastcifar("run", "smoke", "--set", "model.name=theirs.nets:Nett", "--out", "nothing", cwd=workplace)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (workplace / "nothing").exists()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("theirs.nets:thousand", ["(2, 1000)", "(2, 10)", "num_classes"]),
        ("theirs.nets:broken", ["RuntimeError: no such thing", "nets.py, line"]),
        ("collections:OrderedDict", ["made a OrderedDict, not a torch.nn.Module"]),
        ("torch.nn:Flatten", ["(2, 3072)"]),
        ("theirs.nets:double", ["conv.weight is float64", "float32"]),
        ("theirs.nets:Masked", ["mask has values that are not finite", "persistent=False"]),
    ],
)
def test_what_is_no_classifier_is_refused_before_training(workplace, name, parts):
    with pytest.raises(UserError) as caught:
        build_model(load_recipe("smoke", [f"model.name={name}"]).model, seed=0)
    for part in parts:
        assert part in str(caught.value)


def test_a_mask_of_infinities_that_is_no_state_is_taken(workplace):
    config = load_recipe("smoke", ["model.name=theirs.nets:Masked", "model.options={persistent=false}"]).model
    assert build_model(config, seed=0).mask.isinf().any()


SMALL = ["data.source=synthetic", "data.subset=200", "data.test_subset=100", "train.epochs=2", "train.batch_size=50"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.name=theirs.nets:Flat", "data.resize=[[0.0, 32], [0.5, 24]]"], "theirs.nets:Flat.*be multiplied"),
        (["model.name=theirs.nets:Frozen"], r'learning_epochs names "haed.bias".*did you mean "head.bias"'),
    ],
)
def test_what_a_model_cannot_do_later_is_said_before_the_first_step(workplace, tmp_path, changes, said):
    words = [word for change in [*SMALL, *changes] for word in ("--set", change)]
    done = fastcifar("run", "smoke", *words, "--out", str(tmp_path / "run"), cwd=workplace)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert re.search(said, done.stderr), done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_timm_is_an_extra(workplace, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)  # as if it were not installed
    with pytest.raises(UserError, match="needs timm, which is not installed"):
        load_recipe("smoke", ["model.name=timm:resnet18"])


def test_a_model_of_timm():
    pytest.importorskip("timm", reason="timm is not installed")
    config = load_recipe("smoke", ["model.name=timm:resnet18", "model.options={in_chans=3}"]).model
    model = build_model(config, num_classes=7, seed=0)
    assert model.num_classes == 7
    with pytest.raises(UserError, match='no model "resnet19"'):
        load_recipe("smoke", ["model.name=timm:resnet19"])
