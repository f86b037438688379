"""`check_finite` names the layer that a fault was put into."""

import pytest
import torch
from torch import nn

from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from fastcifar.train.check_nan import check_finite
from fastcifar.train.run import eagerly, train
from tests.train.tiny import recipe


class Spoil(torch.autograd.Function):
    """Finite forward, infinite backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def model(function) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), Layer(function), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x / 0, r"epoch 1, step 2: the output of 2 \(Layer\) is not finite \(its input is finite\)"),
        (Spoil.apply, r"epoch 1, step 2: the gradient at the output of 1 \(ReLU\) is not finite"),
    ],
)
def test_the_first_layer_is_named(function, message):
    made = model(function)
    check_finite(made, lambda: "epoch 1, step 2")
    with pytest.raises(UserError, match=message):
        made(torch.ones(3, 4)).sum().backward()


def test_a_layer_that_is_spoiled_in_evaluation_alone_is_named():
    made = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    check_finite(made, lambda: "epoch 1, step 2", lambda: "the evaluation after epoch 1")
    made(torch.randn(3, 4)).sum().backward()
    made[1].running_mean[0] = float("inf")
    message = r"the evaluation after epoch 1: the running_mean of 1 \(BatchNorm1d\) is not finite \(before this pass\)"
    with pytest.raises(UserError, match=message):
        made.eval()(torch.randn(3, 4))


def test_a_run_that_diverges_names_its_first_layer(tmp_path):
    optimizer = {"name": "sgd", "lr": 1e6}
    wanted = recipe(optimizer=optimizer, engine={"device": "cpu", "mode": "eager"})
    run = RunDirectory.create(tmp_path / "run", wanted, {})
    with pytest.raises(UserError, match=r"epoch \d.*: the (output|weight|gradient).* of .*conv.* not finite"):
        train(wanted, run, quiet=True, check_nan=True)
    assert not run.checkpoints(), "nothing of a spoiled epoch is kept"


def test_no_layer_is_hidden_in_a_kernel_or_a_compiled_model():
    engine = eagerly(recipe()).engine
    assert (engine.mode, engine.fused_batch_norm) == ("eager", False)


def test_a_spoiled_weight_is_named():
    made = model(torch.tanh)
    check_finite(made, lambda: "epoch 1, step 2")
    made(torch.ones(3, 4)).sum().backward()
    with torch.no_grad():
        made[3].weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"the weight of 3 \(Linear\) is not finite \(before this pass\)"):
        made(torch.ones(3, 4))
