"""Muon against a per-tensor transcription in float64, and its orthogonalization against singular values."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastcifar.config.schema import MuonConfig
from fastcifar.train.flat_parameters import FlatParameters, Segment
from fastcifar.train.muon import Muon, orthogonal
from fastcifar.train.padded_matrices import PaddedMatrices, padding_pays
from tests.train.reference import error, loss_of, make_data, make_net


@pytest.mark.parametrize("shape", [(2, 16, 60), (1, 60, 16), (3, 8, 8)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    found = orthogonal(matrices, iterations=10)
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min())
    assert float(values.max()) < 1.3
    # The singular vectors stay: U^T X V is diagonal.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ found @ v.mT
    off = inner - torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2))
    assert float(off.abs().max()) < 1e-3


def newton_schulz(g: Tensor) -> Tensor:
    x = g / (g.norm() + 1e-7)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(3):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def reference_step(model: torch.nn.Module, momenta: dict[str, Tensor], config: MuonConfig) -> None:
    for name, p in model.named_parameters():
        conv = p.ndim == 4
        mu = config.momentum if conv else config.momentum_other
        lr = config.lr if conv else (config.lr_head or config.lr_other) if p.ndim == 2 else config.lr_other
        momenta[name] = mu * momenta.get(name, 0.0) + p.grad
        step = p.grad + mu * momenta[name]
        p.data *= 1 - lr * config.weight_decay
        if conv and config.normalize:
            p.data *= len(p) ** 0.5 / p.data.norm()
        p.data -= lr * (newton_schulz(step.flatten(1)).view_as(p) if conv else step)
        p.grad = None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lr_head", [None, 0.05])
@pytest.mark.parametrize("normalize", [True, False])
def test_steps_equal_the_transcription(normalize: bool, lr_head: float | None, padded: bool) -> None:
    rates = {"lr": 0.02, "lr_head": lr_head, "lr_other": 0.01}
    config = MuonConfig(name="muon", **rates, weight_decay=0.01, normalize=normalize)
    net, momenta = make_net(1), {}
    expected = copy.deepcopy(net).double()
    flat = FlatParameters(net)
    optimizer = Muon(config, flat, None, padded)
    for x, y in make_data(2, 20):
        loss_of(net, x.to(memory_format=torch.channels_last), y).backward()
        flat.collect_gradients()
        with torch.no_grad():
            optimizer.step(config.lr)
        loss_of(expected, x.double(), y).backward()
        reference_step(expected, momenta, config)
    assert error(net.state_dict(), expected) < 1e-5


@pytest.mark.parametrize("decay_per", ["lr", "step"])
def test_a_net_of_convolutions_alone_trains_as_the_transcription(decay_per: str) -> None:
    """A fully convolutional net without BatchNorm or biases has nothing beside its matrices."""
    config = MuonConfig(name="muon", lr=0.02, decay_per=decay_per)
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.SiLU(), nn.Conv2d(8, 10, 3, bias=False)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(memory_format=torch.channels_last)
    expected, momenta = copy.deepcopy(net).double(), {}
    flat = FlatParameters(net)
    optimizer = Muon(config, flat, None)
    for x, y in make_data(4, 20):
        loss_of(net, x.to(memory_format=torch.channels_last), y).backward()
        flat.collect_gradients()
        with torch.no_grad():
            optimizer.step(config.lr)
        loss_of(expected, x.double(), y).backward()
        reference_step(expected, momenta, config)
    assert error(net.state_dict(), expected) < 1e-5


def test_padded_matrices_keep_every_element_and_the_gaps(seed: int) -> None:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(  # 4 x 27, 9 x 4 (more rows than columns), 2 x 81; gaps between them
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Conv2d(4, 9, 1, bias=False), torch.nn.Conv2d(9, 2, 3, bias=False)
    )  # fmt: skip
    flat = FlatParameters(net)
    matrices = PaddedMatrices(flat.segments, flat.conv_end, torch.device("cpu"))
    before = flat.weights.clone()
    batch = matrices.spread(flat.weights, torch.float32)
    assert batch.shape == (3, 4, 81)
    assert torch.equal(batch[1, :4, :9].mT, net[1].weight.detach().view(9, 4))
    squares = torch.stack([p.detach().square().sum() for p in net.parameters()])
    torch.testing.assert_close(batch.square().sum((1, 2)), squares)
    torch.testing.assert_close(matrices.sqrt_rows.flatten(), torch.tensor([4.0, 9.0, 2.0]).sqrt())
    batch.mul_(2)
    matrices.gather(flat.weights)
    assert torch.equal(flat.weights, 2 * before)


def test_padding_is_for_shapes_that_differ_a_little() -> None:
    def segments(*shapes: tuple[int, int]) -> list[Segment]:
        return [Segment("", 0, rows * columns, (rows, columns, 1, 1), ()) for rows, columns in shapes]

    assert padding_pays(segments((256, 576), (256, 2304), (256, 2304)))
    assert not padding_pays(segments((256, 2304), (256, 2304)))  # one shape: nothing to gain
    assert not padding_pays(segments((16, 144), (16, 144), (512, 4608)))
