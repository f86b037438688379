"""Parameter counts and GMACs against the published experiment's own table; traffic against counts by hand."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from fastcifar.cli.models import CATALOGUE, chosen, metrics, models
from fastcifar.config.schema import UserModelConfig
from fastcifar.errors import UserError
from fastcifar.models.cost import cost_of, cost_of_config

LADDER = {
    "lenet5": (62_006, 0.0007),
    "deep_baseline": (2_799_178, 0.0975),
    "deep_baseline_bn": (2_800_394, 0.0975),
    "residual5": (10_407_498, 1.0882),
    "residual15": (13_535_306, 0.7064),
    "wrn16_8": (10_961_370, 1.5481),
    "wrn16_8_last_bn": (10_964_954, 1.5481),
    "pyramidnet110_a150": (10_105_771, 1.8030),
}


@pytest.mark.parametrize("name", LADDER)
def test_counts_of_the_ladder(name: str):
    row = metrics(name, 780, 4300)
    assert (row["parameters"], round(row["gmacs"], 4)) == LADDER[name]


def test_alignment_costs_arithmetic_but_no_parameters():
    plain, aligned = (metrics(name, 780, 4300) for name in ("pyramidnet110_a150", "pyramidnet110_a150_align8"))
    assert aligned["parameters"] == plain["parameters"]
    assert 1.05 < aligned["gmacs"] / plain["gmacs"] < 1.15


@pytest.mark.parametrize(("name", "arithmetic_s", "floor_s"), [("wrn16_8", 1.2, 1.6), ("pyramidnet110_a150", 1.4, 3.0)])
def test_floors_of_one_h200_with_asam(name: str, arithmetic_s: float, floor_s: float):
    floor = metrics(name, 780, 4300)["epoch_with_asam"]
    assert round(floor["arithmetic_s"], 1) == arithmetic_s
    assert round(floor["floor_s"], 1) == floor_s


def test_traffic_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    cost = cost_of(model.append(nn.Linear(8 * 64, 10)), image_px=16)
    conv, norm, pool, linear = cost.operations
    assert [o.kind for o in cost.operations] == ["convolution", "batch_norm", "pooling", "linear"]
    assert conv.flops == 6 * 16 * 16 * 8 * 27
    assert conv.values == 3 * 16 * 16 * (3 + 8)
    assert norm.values == 8 * 16 * 16 * 8
    assert pool.values == 2 * (8 * 256 + 8 * 64)
    assert linear.values == 3 * (512 + 10)
    assert cost.flops == 6 * cost.macs
    assert cost.bytes_moved() == 2 * sum(o.values for o in cost.operations)
    floor = cost.epoch_s(tflops=1, gbs=1, images=1)
    assert floor.arithmetic_s == pytest.approx(cost.flops / 1e12)
    assert floor.memory_s == pytest.approx(cost.bytes_moved() / 1e9)
    assert floor.floor_s >= max(floor.arithmetic_s, floor.memory_s)


def command():
    import typer

    app = typer.Typer()
    app.command()(models)
    return app


def test_the_command_prints_one_json_object():
    done = CliRunner().invoke(command(), ["lenet5", "--json", "--tflops", "1", "--gbs", "100"])
    row = json.loads(done.stdout)["models"][0]
    assert row["model"] == "lenet5"
    assert row["epoch_with_asam"]["floor_s"] == pytest.approx(2 * row["epoch"]["floor_s"])


def test_the_command_shows_a_table_and_a_detail_to_people(monkeypatch: pytest.MonkeyPatch):
    for name in set(CATALOGUE) - {"lenet5", "speednet"}:
        monkeypatch.delitem(CATALOGUE, name)
    for arguments in ([], ["lenet5"]):
        done = CliRunner().invoke(command(), arguments)
        assert (done.exit_code, done.stderr) == (0, "")
        assert "62,006" in done.stdout


def test_a_misspelt_model_is_named_with_its_neighbour():
    with pytest.raises(UserError, match='did you mean "wrn16_8"'):
        chosen("wrn16-8")


def test_every_preset_is_in_the_catalogue():
    from fastcifar.config.schema import PRESETS

    assert set(PRESETS) <= set(CATALOGUE)


def test_costs_are_those_of_torchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(4 * 49, 5)).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 16, 16, device="meta")).sum().backward()
    cost = cost_of(model, image_px=16)
    # Training needs no gradient of the image, which cost_of counts like every other.
    first = 2 * 49 * 4 * 27
    assert cost.flops == counter.get_total_flops() + first


class Encoder(nn.Module):
    """Patches of 4 pixels, one encoder layer of four heads over them, and a classifier of their mean."""

    def __init__(self, num_classes: int, image_px: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.encode = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.classify = nn.Linear(32, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classify(self.encode(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


class Attention(nn.Module):
    """The same patches, attention of four heads without a layer for its output, and the classifier."""

    def __init__(self, num_classes: int, image_px: int) -> None:
        super().__init__()
        self.patches, self.qkv, self.classify = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 96), nn.Linear(32, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.classify(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


PATCHES, QKV, ATTENTION, CLASSIFY = 64 * 48 * 32, 64 * 32 * 96, 2 * 64 * 64 * 32, 32 * 10
OUTPUT, FEED_FORWARD = 64 * 32 * 32, 2 * 64 * 32 * 64


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("Encoder", PATCHES + QKV + ATTENTION + OUTPUT + FEED_FORWARD + CLASSIFY),
        ("Attention", PATCHES + QKV + ATTENTION + CLASSIFY),
    ],
)
def test_attention_of_a_users_own_model_is_counted(name: str, macs: int):
    fused = torch.backends.mha.get_fastpath_enabled()
    assert cost_of_config(UserModelConfig(name=f"{__name__}:{name}")).macs == macs
    assert torch.backends.mha.get_fastpath_enabled() == fused
