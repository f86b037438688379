"""SAM, ASAM and EMA on a plain module against the float64 transcription of the papers."""

import copy
from functools import partial

import pytest
import torch

import fastcifar
from tests.train.reference import error, loss_of, make_data, make_net, train_reference

STEPS = 30
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
SETTINGS = {
    "sam": (fastcifar.optim.SAM, {"rho": 0.05}, {"rho": 0.05, "adaptive": False, "eta": 0.0, "weights_only": False}),
    "asam": (
        fastcifar.optim.ASAM, {"rho": 0.5, "eta": 0.01},
        {"rho": 0.5, "adaptive": True, "eta": 0.01, "weights_only": False},
    ),
    "asam-weights": (
        fastcifar.optim.ASAM, {"rho": 0.5, "scope": "weights"},
        {"rho": 0.5, "adaptive": True, "eta": 0.0, "weights_only": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_against_the_papers_in_float64(name, seed):
    kind, options, formula = SETTINGS[name]
    net, data = make_net(seed), make_data(seed, STEPS)
    expected, average = train_reference(net, data, SGD, sam=formula, decay=0.9)
    sam, ema = kind(net, SGD(net.parameters()), **options), fastcifar.optim.EMA(net, decay=0.9)
    for x, y in data:
        sam.step(lambda: loss_of(net, x, y))  # noqa: B023
        ema.update()
    assert error(net.state_dict(), expected) < 1e-4
    assert error(ema.state_dict(), average) < 1e-4


def test_adam_is_as_good_as_any_optimizer(seed):
    net, data = make_net(seed), make_data(seed, 5)
    adam = partial(torch.optim.Adam, lr=1e-3)
    expected, _ = train_reference(net, data, adam, sam=SETTINGS["sam"][2])
    sam = fastcifar.optim.SAM(net, adam(net.parameters()), rho=0.05)
    for x, y in data:
        sam.step(lambda: loss_of(net, x, y))  # noqa: B023
    assert error(net.state_dict(), expected) < 1e-3


@pytest.mark.parametrize(("kind", "radius"), [(fastcifar.optim.SAM, 0.5), (fastcifar.optim.ASAM, 0.5 * 3.0)])
def test_a_scalar_parameter_takes_part(kind, radius):
    """As a learned temperature is: the loss s^2 at s = 3 is climbed by the radius, times s for ASAM."""
    net = torch.nn.Module()
    net.s = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    kind(net, torch.optim.SGD(net.parameters(), lr=0.1), rho=0.5).step(lambda: net.s**2)
    assert net.s.item() == pytest.approx(3.0 - 0.1 * 2 * (3.0 + radius))


def test_frozen_statistics_move_once_and_the_loss_is_that_of_the_first_pass(seed):
    net, ((x, y),) = make_net(seed), make_data(seed, 1)
    plain = copy.deepcopy(net)
    loss = loss_of(plain, x, y)
    found = fastcifar.optim.SAM(net, SGD(net.parameters()), batch_norm="freeze").step(lambda: loss_of(net, x, y))
    assert torch.equal(found, loss.detach())
    assert torch.equal(net.norm.running_mean, plain.norm.running_mean)
    assert int(net.norm.num_batches_tracked) == 1


def test_averages_are_lent_to_the_model_and_given_back_after_an_error(seed):
    net = make_net(seed)
    ema = fastcifar.optim.EMA(net, decay=0.5)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        net.head.bias += 1
    ema.update()
    lent = []

    def fail() -> None:
        with ema.applied():
            lent.append(net.head.bias.detach().clone())
            raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        fail()
    torch.testing.assert_close(lent[0], before["head.bias"] + 0.5)
    torch.testing.assert_close(net.head.bias.detach(), before["head.bias"] + 1)
    other = fastcifar.optim.EMA(make_net(seed + 1))
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(t, ema.state_dict()[name]) for name, t in other.state_dict().items())


def test_an_infinity_that_stays_is_averaged_as_it_is(seed):
    net = make_net(seed)
    net.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    ema, mask = fastcifar.optim.EMA(net, decay=0.5), net.mask.clone()
    with torch.no_grad():
        net.head.bias += 1
        net.mask[2, 0] += 4
    ema.update()
    mask[2, 0] = 2
    assert torch.equal(ema.state_dict()["mask"], mask)
    with torch.no_grad():
        net.mask[0, 1] = 5.0
    ema.update()
    assert ema.state_dict()["mask"][0, 1] == 5.0


@pytest.mark.parametrize("wrong", [{"rho": 0.0}, {"rho": -1.0}, {"rho": float("nan")}, {"eta": -0.1}])
def test_what_is_no_radius_is_refused(wrong):
    net = torch.nn.Linear(2, 2)
    with pytest.raises(fastcifar.UserError, match=next(iter(wrong))):
        fastcifar.optim.ASAM(net, torch.optim.SGD(net.parameters()), **wrong)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_what_is_no_decay_is_refused(decay):
    with pytest.raises(fastcifar.UserError, match="decay"):
        fastcifar.optim.EMA(torch.nn.Linear(2, 2), decay)
