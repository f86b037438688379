"""An optimizer by import path steps as ours of the same name, keeps its state, and leaves none of a warm-up."""

import pytest
import torch

from fastcifar.config.schema import EngineConfig
from fastcifar.errors import UserError
from fastcifar.models import build_model
from fastcifar.train.execution import choose_mode
from fastcifar.train.flat_parameters import FlatParameters
from fastcifar.train.user_optimizer import UserOptimizer
from tests.train.step_parts import Normalize, batches, make_step, recipe, same, state, train

OURS = {
    "sgd": ({"name": "sgd", "lr": 0.05, "weight_decay": 5e-4}, {"momentum": 0.9, "nesterov": True}),
    "adam": ({"name": "adam", "lr": 1e-3, "weight_decay": 1e-3}, {}),
    "adamw": ({"name": "adamw", "lr": 1e-3, "weight_decay": 1e-2}, {"betas": [0.9, 0.999]}),
}
PATHS = {"sgd": "torch.optim:SGD", "adam": "torch.optim:Adam", "adamw": "torch.optim:AdamW"}


@pytest.mark.parametrize("parameters", ["each", "flat"])
@pytest.mark.parametrize("name", OURS)
def test_torchs_own_by_import_path_is_ours(name, parameters):
    ours, options = OURS[name]
    tables = {"ema": {"decay": 0.9}, "train": {"epochs": 4, "batch_size": 16, "grad_clip": 1.0}}
    tables |= {"asam": {"rho": 0.1}} if name == "sgd" else {}
    theirs = {**ours, "name": PATHS[name], "options": options, "parameters": parameters}
    steps = [make_step(recipe(optimizer=table, **tables)) for table in (ours, theirs)]
    for step in steps:
        train(step, 0, 2)
    for key in ("flat.weights", "flat.ema", "flat.stats"):
        torch.testing.assert_close(state(steps[1])[key], state(steps[0])[key], rtol=1e-4, atol=1e-5)


def lion(workplace, **tables):
    return make_step(recipe(optimizer={"name": "theirs.opt:Lion", "lr": 1e-3}, **tables))


def test_the_state_goes_through_a_checkpoint(workplace):
    whole, first = lion(workplace), lion(workplace)
    train(whole, 0, 3)
    train(first, 0, 2)
    saved = state(first)
    again = lion(workplace)
    again.load_state_dict(saved)
    assert type(next(iter(again.user_optimizer.inner.state.values()))["count"]) is int
    assert again.user_optimizer.inner.param_groups[0]["steps"] == 12
    train(again, 2, 3)
    assert same(state(again), state(whole))


@pytest.mark.parametrize("parameters", ["each", "flat"])
def test_a_fused_optimizer_goes_through_a_checkpoint_to_the_same_bits(parameters, rng):
    """Torch's fused kernels go through weights and state as they lie in memory, and a file knows no strides."""
    table = {"name": "torch.optim:AdamW", "lr": 1e-2, "options": {"fused": True}, "parameters": parameters}
    whole, first, again = (make_step(recipe(optimizer=table)) for _ in range(3))
    train(whole, 0, 3)
    train(first, 0, 2)
    again.load_state_dict({name: tensor.contiguous() for name, tensor in state(first).items()})
    train(again, 2, 3)
    assert same(state(again), state(whole))


def padded_net(parameters, fused):
    """Return the flat parameters of a net whose convolutions are padded between their channels, and its optimizer."""
    table = {"name": "torch.optim:AdamW", "lr": 1e-2, "parameters": parameters, "options": {"fused": fused}}
    config = recipe(model={"name": "pyramidnet", "depth": 8, "alpha": 11, "align": 8}, optimizer=table)
    flat = FlatParameters(build_model(config.model, seed=1))
    return flat, UserOptimizer(config.optimizer, flat, None, skip=False)


@torch.no_grad()
def test_a_fused_optimizer_that_has_all_parameters_as_one_trains_padded_weights(seed):
    (whole, fused), (each, plain) = padded_net("flat", True), padded_net("each", False)
    before, generator = whole.weights.clone(), torch.Generator().manual_seed(seed)
    weights = sum(segment.view(before).numel() for segment in whole.segments)
    for number in range(3):
        for segment in whole.segments:
            gradient = torch.randn(segment.shape, generator=generator)
            for flat in (whole, each):
                segment.view(flat.grads).copy_(gradient)
        fused.step(1e-2)
        plain.step(1e-2)
        if number == 0:  # all moved by the learning rate, and no padding; later ones may come back
            assert int((whole.weights != before).sum()) == weights < before.numel()
    torch.testing.assert_close(whole.weights, each.weights, rtol=1e-5, atol=1e-6)
    assert int((whole.weights != 0).sum()) <= weights


def test_a_fused_optimizer_is_refused_each_padded_weight():
    """Torch's kernel would go through a view's memory as if it had no holes, and not come to its end."""
    with pytest.raises(UserError, match=r'padded weights \(model\.align\), such as .*parameters = "flat"'):
        padded_net("each", fused=True)


def test_an_optimizer_with_other_weights_for_evaluation_is_refused(workplace):
    with pytest.raises(UserError, match=r"theirs.opt:ScheduleFree.* modes for training and evaluation"):
        make_step(recipe(optimizer={"name": "theirs.opt:ScheduleFree", "lr": 1e-3}))


def test_a_count_that_was_on_the_device_goes_back_there():
    """Capturable and fused optimizers keep theirs on the GPU, all others on the CPU."""
    step = make_step(recipe(optimizer={"name": "torch.optim:Adam", "lr": 1e-3}))
    train(step, 0, 1)
    tensors = step.user_optimizer.tensors()
    moved = {name.replace("state/", "device/") if name.endswith("/step") else name: t for name, t in tensors.items()}
    assert moved.keys() != tensors.keys()
    step.user_optimizer.load_tensors(moved)
    assert same(step.user_optimizer.tensors(), tensors)


def test_a_warm_up_leaves_no_state_behind(workplace):
    step = lion(workplace)
    before = state(step)
    step.execution.warm_up(batches(0)[:1])
    assert same(state(step), before)
    assert not step.user_optimizer.inner.state


def test_a_step_that_is_not_finite_is_left_out(workplace):
    engine = {"precision": "fp32", "on_nonfinite": "skip"}
    config = recipe(optimizer={"name": "theirs.opt:Lion", "lr": 1e-3}, engine=engine)
    step = make_step(config, augment=Normalize(spoil_at=2))
    train(step, 0, 1)
    assert torch.isfinite(step.flat.weights).all()
    assert next(iter(step.user_optimizer.inner.state.values()))["count"] == 5


def test_adam_leaves_out_one_step_and_not_those_after_it():
    engine = {"precision": "fp32", "on_nonfinite": "skip"}
    step = make_step(recipe(optimizer={"name": "adam", "lr": 1e-3}, engine=engine), augment=Normalize(spoil_at=2))
    train(step, 0, 1)
    assert torch.isfinite(step.flat.weights).all()
    assert float(step.flat.buffers["adam_steps"]) == 5


def test_a_state_that_no_checkpoint_holds_is_refused(workplace):
    step = lion(workplace)
    step.user_optimizer.inner.state[next(iter(step.model.parameters()))]["history"] = ["a list"]
    with pytest.raises(UserError, match="keeps a list in its state \\(history\\)"):
        step.state_dict()


def test_it_is_not_captured():
    gpu = torch.device("cuda")
    assert choose_mode(EngineConfig(mode="auto"), gpu, True)[:2] == (True, False)
    assert "not captured" in choose_mode(EngineConfig(mode="graph"), gpu, True)[2]
    assert choose_mode(EngineConfig(mode="eager"), gpu, True) == (False, False, None)


@pytest.mark.gpu
def test_on_a_gpu_it_steps_as_on_the_cpu(workplace):
    table = {"optimizer": {"name": "theirs.opt:Lion", "lr": 1e-3}, "asam": {"rho": 0.1}}
    steps = [make_step(recipe(**table), device, dropout=0.0) for device in ("cpu", "cuda")]
    curves = [train(step, 0, 1, device)[0]["curve"] for step, device in zip(steps, ("cpu", "cuda"), strict=True)]
    torch.testing.assert_close(curves[0], curves[1], rtol=2e-2, atol=2e-2)
    assert isinstance(steps[1].user_optimizer, UserOptimizer)
