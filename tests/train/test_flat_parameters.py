"""Flat parameters: layout, views that survive, state, and clear refusals."""

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcifar.config.schema import MuonConfig, PyramidNetConfig, SGDConfig
from fastcifar.models import build_model
from fastcifar.train.execution import WorkingCopyModel
from fastcifar.train.flat_parameters import ALIGNMENT, FlatParameters
from fastcifar.train.muon import Muon
from fastcifar.train.optimizers import Optimizer, build_optimizer
from tests.train.rank_checks import smooth
from tests.train.reference import loss_of, make_data, make_net


@pytest.fixture
def net() -> nn.Module:
    return make_net(1)


def test_values_shapes_and_strides_are_kept(net: nn.Module) -> None:
    before = {n: (t.clone(), t.stride()) for n, t in net.state_dict().items()}
    flat = FlatParameters(net)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        if tensor.ndim:
            assert tensor.stride() == before[name][1]
    assert net.first.weight.is_contiguous(memory_format=torch.channels_last)
    for segment in flat.segments + flat.stat_segments:
        assert segment.offset % ALIGNMENT == 0
    assert flat.weights.data_ptr() % 64 == 0


def test_order_by_role(net: nn.Module) -> None:
    flat = FlatParameters(net)
    below = lambda end: {s.name for s in flat.segments if s.offset < end}  # noqa: E731
    assert below(flat.conv_end) == {"first.weight", "second.weight"}
    assert below(flat.matrix_end) == below(flat.conv_end) | {"head.weight"}
    assert below(flat.weight_end) == below(flat.matrix_end) | {"norm.weight"}
    assert {s.name for s in flat.stat_segments} == {"norm.running_mean", "norm.running_var"}


def test_gradients_are_collected_and_let_go(net: nn.Module) -> None:
    plain = copy.deepcopy(net)
    flat = FlatParameters(net)
    x, y = make_data(1, 1)[0]
    for model in (net, plain):
        loss_of(model, x.to(memory_format=torch.channels_last), y).backward()
    flat.collect_gradients()
    views = flat.named(flat.grads)
    for name, parameter in plain.named_parameters():
        assert torch.equal(views[name], parameter.grad)
    flat.check()
    assert all(p.grad is None for p in net.parameters())
    flat.collect_gradients()  # a parameter without a gradient counts as zero
    assert not flat.grads.any()


def test_gradients_of_a_working_copy_are_collected_in_its_dtype(net: nn.Module) -> None:
    flat = FlatParameters(net)
    copies = flat.add_working_copy(torch.bfloat16)
    assert set(copies) == {"first.weight", "second.weight", "head.weight"}
    generator = torch.Generator().manual_seed(3)
    expected = {n: torch.randn(c.shape, generator=generator).bfloat16() for n, c in copies.items()}
    sum((copy * expected[name]).float().sum() for name, copy in copies.items()).backward()
    flat.collect_gradients()
    views = flat.named(flat.grads)
    assert all(torch.equal(views[name], grad.float()) for name, grad in expected.items())
    assert not views["head.bias"].any()


def test_survives_load_state_dict_memory_format_and_state(net: nn.Module) -> None:
    flat, other = FlatParameters(net), make_net(2)
    net.load_state_dict(other.state_dict())
    net.to(memory_format=torch.channels_last)
    net.to("cpu")
    flat.check()
    assert torch.equal(flat.named(flat.weights)["first.weight"], other.first.weight)
    flat.add("momentum").fill_(3.0)
    state = {name: tensor.clone() for name, tensor in flat.state_dict().items()}
    third = make_net(3)
    again = FlatParameters(third)
    again.add("momentum")
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), third.state_dict().values(), strict=True))
    assert torch.equal(again.buffers["momentum"], flat.buffers["momentum"])


def test_says_what_left_it(net: nn.Module) -> None:
    flat = FlatParameters(net)
    net.second.weight.data = net.second.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"second\.weight left the flat parameters"):
        flat.check()


def test_refuses_pickling_copying_other_dtypes_and_foreign_state(net: nn.Module) -> None:
    flat = FlatParameters(net)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            attempt(flat)
    with pytest.raises(ValueError, match=r"flat buffer stats: expected .* found nothing"):
        flat.load_state_dict({"weights": flat.weights})
    with pytest.raises(TypeError, match=r"weight is torch\.bfloat16"):
        FlatParameters(nn.Linear(2, 2).bfloat16())


def test_frozen_parameters_are_statistics_and_shared_ones_appear_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    net[1].bias.requires_grad_(False)
    flat = FlatParameters(net)
    assert [s.name for s in flat.segments] == ["0.weight", "0.bias"]
    assert [s.name for s in flat.stat_segments] == ["1.bias"]
    assert net[1].weight is net[0].weight


MUON = MuonConfig(name="muon", lr=0.01, normalize=True)


@pytest.mark.parametrize(
    "make",
    [partial(build_optimizer, SGDConfig(name="sgd", lr=0.01)), partial(Muon, MUON), partial(Muon, MUON, padded=True)],
    ids=["sgd", "muon", "muon, matrices of all shapes at once"],
)
@pytest.mark.parametrize("copied", [False, True])
def test_padding_lies_in_the_buffers_and_stays_zero(make: Callable[..., Optimizer], copied: bool, seed: int) -> None:
    """Against the same net of the true widths; a working copy in fp32 adds no rounding."""
    losses, flats = [], []
    with smooth():
        for align in (1, 8):
            config = PyramidNetConfig(name="pyramidnet", depth=8, alpha=11, align=align)
            net = build_model(config, image_px=8, seed=seed).to(memory_format=torch.channels_last)
            flat = FlatParameters(net)
            forward = WorkingCopyModel(net, flat, torch.float32) if copied else net
            update = make(flat=flat, averages=None)
            generator, seen = torch.Generator().manual_seed(seed), []
            for _ in range(3):
                images = torch.randn(6, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(forward(images), torch.randint(10, (6,), generator=generator))
                loss.backward()
                flat.collect_gradients()
                update.step(0.01)
                seen.append(float(loss.detach()))
            flat.check()
            losses.append(seen)
            flats.append(flat)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    plain, padded = (flat.named(flat.weights) for flat in flats)
    for name, tensor in plain.items():
        torch.testing.assert_close(padded[name], tensor, rtol=1e-3, atol=1e-4)
    assert len(flats[1].weights) > len(flats[0].weights)
    for name, buffer in flats[1].buffers.items():
        if name != "stats":
            assert buffer.count_nonzero() == sum(view.count_nonzero() for view in flats[1].named(buffer).values()), name
