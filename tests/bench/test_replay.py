"""``benchmarks/replay.py``: its draws against torch's loaders and others' nets, its steps against a plain loop."""

import random
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastcifar.data.store import resolve_store
from fastcifar.models.deep_baseline import DeepBaseline
from fastcifar.models.lenet import LeNet5

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import published  # noqa: E402
import replay  # noqa: E402

BATCH = 48


def layers(net: nn.Module) -> list[nn.Module]:
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def drawn(net: nn.Module) -> int:
    """How often torch draws to make a net's convolutions and linear layers."""
    return sum(parameter.numel() for layer in layers(net) for parameter in layer.parameters())


def drawn_again(net: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in layers(net))


def stem(net: nn.Module, convolution: nn.Conv2d) -> int:
    """How much less a 3x3 first convolution draws than the net's own."""
    return convolution.weight.numel() - convolution.weight[:, :, :3, :3].numel()


def test_the_draws_of_nets_that_others_have_too():
    resnet = torchvision.models.resnet18(num_classes=10)
    dense = torchvision.models.densenet121(num_classes=10)
    vgg = torchvision.models.vgg16_bn().features
    first = stem(resnet, resnet.conv1)
    assert replay.DRAWS["ResNet-18"] == drawn(resnet) + drawn_again(resnet) - 2 * first
    assert replay.DRAWS["DenseNet-121"] == drawn(dense) - stem(dense, dense.features.conv0)
    assert replay.DRAWS["VGG-16"] == drawn(vgg) + drawn(nn.Linear(512, 10))
    # That code's MobileNetV2 expands in its first block, too, and has convolutions beside those that change the width.
    beside = [nn.Conv2d(*widths, 1, bias=False) for widths in ((32, 32), (32, 16), (16, 24), (64, 96), (160, 320))]
    mobile = torchvision.models.mobilenet_v2(num_classes=10)
    assert replay.DRAWS["MobileNetV2"] == drawn(mobile) + sum(drawn(convolution) for convolution in beside)
    deep = DeepBaseline()
    assert replay.DRAWS["LeNet-5"] == drawn(LeNet5())
    assert replay.DRAWS["deep baseline"] == replay.DRAWS["deep, BatchNorm"] == drawn(deep)
    assert replay.DRAWS["deep, SiLU"] == drawn(deep) + drawn_again(deep)
    assert replay.DRAWS["deep, dropout"] == drawn(deep)
    convolutions = sum(drawn(layer) for layer in layers(deep) if isinstance(layer, nn.Conv2d))
    assert replay.DRAWS["deep, average pooling"] == convolutions + drawn(nn.Linear(256, 10))


def test_a_draw_for_each_number_leaves_torch_where_making_the_layers_does():
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    net = DeepBaseline()
    for layer in layers(net):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    expected = torch.get_rng_state()
    torch.manual_seed(seed)
    torch.empty(drawn(net) + drawn_again(net)).uniform_()
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize(("images", "batch"), [(97, 16), (64, 16)])
def test_the_orders_are_those_of_two_loaders_that_share_a_generator(images, batch):
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    train = DataLoader(TensorDataset(torch.arange(images)), batch, shuffle=True)
    test = DataLoader(TensorDataset(torch.arange(10)), batch)
    torch.manual_seed(seed)
    expected = []
    for _ in range(3):
        expected.append(torch.cat([rows for (rows,) in train]))
        list(test)
    found = islice(replay.orders(images, torch.Generator().manual_seed(seed)), 3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "weights"),
    [("lenet5", published.lenet5), ("deep", lambda: published.deep_baseline(narrow_before=False))],
)
def test_a_log_begins_with_the_published_weights_and_leaves_torch_alone(name, weights):
    before = torch.get_rng_state()
    model, generator = replay.beginning(replay.LOGS[name])
    same, other = replay.beginning(replay.LOGS[name], other=1)
    assert torch.equal(torch.get_rng_state(), before)
    for ours, again, theirs in zip(model.parameters(), same.parameters(), weights().parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(again, theirs)
    assert not torch.equal(next(replay.orders(50, generator)), next(replay.orders(50, other)))


def test_a_replay_is_a_plain_loop_over_the_same_batches():
    """With torch's loss, Adam and schedule, on synthetic images, of which the last batch has fewer."""
    changes = ("data.source=synthetic", *replay.LOGS["lenet5"].changes, "train.epochs=3", f"train.batch_size={BATCH}")
    log = replace(replay.LOGS["lenet5"], changes=changes, draws_after=0)
    found = list(replay.replay(log, 3))
    recipe = replay.recipe_of(log)
    store = resolve_store(recipe.data)
    (images, labels), (test_images, test_labels) = (
        (
            torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5),
            torch.from_numpy(np.asarray(split.labels, dtype=np.int64)),
        )
        for split in (store.split("train"), store.split("test"))
    )
    model, generator = replay.beginning(log)
    model = model.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    order_of = replay.orders(len(labels), generator)
    for loss, test_loss, accuracy in found:
        losses = []
        for rows in next(order_of).split(BATCH):
            optimizer.zero_grad()
            value = F.cross_entropy(model(images[rows]), labels[rows])
            value.backward()
            optimizer.step()
            losses.append(value.item())
        schedule.step()
        with torch.no_grad():
            logits = model(test_images)
        assert len(labels) % BATCH
        assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert test_loss == pytest.approx(F.cross_entropy(logits, test_labels).item(), rel=1e-4)
        right = (logits.argmax(1) == test_labels).float().mean().item()
        assert accuracy == pytest.approx(100 * right, abs=100 / len(test_labels))
    assert len(found) == 3


def test_without_data_it_says_so_and_ends_with_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["replay.py", "lenet5", "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        replay.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcifar: replay: ")
    assert "nowhere" in error


@pytest.mark.parametrize("words", [["--epochs", "0"], ["--other", "-1"], ["--precision", "fp8"]])
def test_bad_numbers_are_refused(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["replay.py", "lenet5", *words])
    with pytest.raises(SystemExit) as ended:
        replay.main()
    assert ended.value.code == 2


def test_it_prints_the_log_beside_what_the_step_gives(monkeypatch, capsys):
    changes = ("data.source=synthetic", *replay.LOGS["lenet5"].changes, f"train.batch_size={BATCH}")
    monkeypatch.setitem(replay.LOGS, "lenet5", replace(replay.LOGS["lenet5"], changes=changes, draws_after=0))
    monkeypatch.setattr(sys, "argv", ["replay.py", "lenet5", "--epochs", "2"])
    replay.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [(row[0], row[1], row[4], row[7]) for row in rows] == [
        ("1", "1.6945", "1.4948", "46.05"),
        ("2", "1.4253", "1.3762", "50.72"),
    ]
