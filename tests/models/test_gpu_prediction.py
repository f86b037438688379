"""The predicted epoch: each part against numbers that were worked out by hand."""

import json

import pytest

from fastcifar.config import load_recipe
from fastcifar.errors import UserError
from fastcifar.models import gpu_prediction
from fastcifar.models.cost import Cost, Operation
from fastcifar.models.gpu_prediction import Assumptions, Card, flat_bytes, own_bytes, predict_epoch, read_ledger

# Half of 200 TFLOP/s is 1e14 FLOP/s; half of 2,000 GB/s is 1e12 bytes/s, or 5e11 values of bf16.
CARD = Card("A card", {"bf16": 200.0, "fp32": 20.0}, 2000.0, "a sheet")
CONVOLUTION = Operation("convolution", flops=10**9, values=10**6)  # 10 us of arithmetic, 2 us of memory
LINEAR = Operation("linear", flops=10**6, values=10**6)  # 0.01 us of arithmetic, 2 us of memory
NORM = Operation("batch_norm", flops=0, values=5 * 10**6)  # 10 us of memory
COST = Cost(parameters=10**6, operations=[CONVOLUTION, LINEAR, NORM])


def entry(recipe: str, **changed) -> dict:
    step = {"launches": {"generated": 7, "own": 3}, "library": {"convolution": 2, "convolution_backward": 4}}
    evaluation = {"launches": {"own": 1}, "library": {"convolution": 2}}
    held = {"recipe": recipe, "step": step, "evaluation": evaluation, "generated_bytes": 2 * 10**9, "names": {}}
    return {recipe: held | changed}


@pytest.fixture(autouse=True)
def assumed(monkeypatch):
    monkeypatch.setattr(gpu_prediction, "ASSUMPTIONS", Assumptions(arithmetic=0.5, memory=0.5, kernel_s=1e-5))


def test_each_part_of_an_epoch():
    found = predict_epoch(load_recipe("wrn-sgd"), CARD, entry("wrn-sgd"), COST)
    assert (found.basis, found.source, found.kernels_per_step) == ("ledger", "launches of wrn-sgd", 7 + 3 + 2 + 2 * 4)
    assert found.library_s == pytest.approx(391 * 128 * 12e-6)
    assert found.generated_s == pytest.approx(391 * 2e-3)
    # A parameter: gradients 2 + 4; SGD reads w, g, v and writes w, v and the bf16 copy. An image: 1 byte in, 2 out.
    assert found.own_s == pytest.approx(391 * ((6 + 20 + 2) * 1e6 + 128 * 3072 * 3) / 1e12)
    assert found.launches_s == pytest.approx(391 * 20 * 1e-5)
    assert found.evaluation_s == pytest.approx(10_000 * 22e-6 / 3 + 10 * 3 * 1e-5)
    parts = found.library_s + found.generated_s + found.own_s + found.launches_s + found.evaluation_s
    assert found.epoch_s == pytest.approx(parts)


def test_a_similar_recipe_is_scaled_by_passes_and_samples():
    one = predict_epoch(load_recipe("wrn-sgd"), CARD, entry("wrn-sgd"), COST)
    two = predict_epoch(load_recipe("wrn-asam"), CARD, entry("wrn-sgd"), COST)
    assert two.source == "launches of wrn-sgd, the same model, scaled"
    assert two.kernels_per_step == 2 * one.kernels_per_step
    assert two.library_s == pytest.approx(2 * one.library_s)
    assert two.generated_s == pytest.approx(2 * one.generated_s)
    half = predict_epoch(load_recipe("wrn-sgd", ["train.batch_size=64"]), CARD, entry("wrn-sgd"), COST)
    assert half.kernels_per_step == one.kernels_per_step  # a step; there are twice as many
    assert half.generated_s == pytest.approx(one.generated_s, rel=0.001)
    assert half.launches_s == pytest.approx(2 * one.launches_s)


def test_the_entry_most_alike_is_taken():
    ledger = entry("deep-bn") | entry("aug-cutmix") | entry("wrn-200")
    sources = {
        name: predict_epoch(load_recipe(name), CARD, ledger, COST).source.split(",")[0].split()[-1]
        for name in ("deep-bn", "aug-none", "aug-mixup", "wrn-ls")
    }
    assert sources == {"deep-bn": "deep-bn", "aug-none": "deep-bn", "aug-mixup": "aug-cutmix", "wrn-ls": "wrn-200"}


@pytest.mark.parametrize("recipe", [load_recipe("residual"), load_recipe("wrn-sgd", ["engine.mode=eager"])], ids=str)
def test_without_launches_it_is_the_floor_and_says_so(recipe):
    found = predict_epoch(recipe, CARD, entry("wrn-sgd"), COST)
    assert (found.basis, found.kernels_per_step, found.launches_s) == ("floor", None, 0)
    assert "floor" in found.source
    assert found.library_s == pytest.approx(50_000 * 22e-6)


def test_another_model_under_the_same_name_is_another_model():
    wide = load_recipe("wrn-sgd", ["model.widen=10"])
    assert predict_epoch(wide, CARD, entry("wrn-sgd"), COST).basis == "floor"


def test_flat_bytes_by_optimizer():
    # Twice 2 + 4 of gathering; SAM 8 + 16 + 2; SGD 20 + 2; averages 8.
    assert flat_bytes(load_recipe("wrn-ema")) == 12 + 26 + 22 + 8
    assert flat_bytes(load_recipe("wrn-ema", ["engine.precision=fp32"])) == 16 + 24 + 20 + 8
    assert flat_bytes(load_recipe("wrn-adam")) == 6 + 30


def test_our_batch_norm_counts_where_the_ledger_names_it():
    recipe = load_recipe("wrn-asam")
    every, half = ({"statistics_kernel": count, "normalize_kernel": 26} for count in (26, 13))
    every_layer, half_given, without = (own_bytes(recipe, COST, names) for names in (every, half, {"triton_red": 1}))
    assert every_layer - without == 128 * 2 * 5 * 10**6 * 2
    assert half_given - without == (every_layer - without) * 15 / 16  # half of the layers save one of eight passes


def test_fp32_has_its_own_peak_and_wider_values():
    found = predict_epoch(load_recipe("wrn-sgd", ["engine.precision=fp32"]), CARD, {}, COST)
    assert found.library_s == pytest.approx(50_000 * (100e-6 + 4e-6 + 20e-6))


def test_hardware_names_find_their_card():
    names = {word: card and card.name for word in ("h200", "NVIDIA-H100-80GB-HBM3", "a100", "amd-epyc")
             for card in [gpu_prediction.card_of(word)]}  # fmt: skip
    assert names == {"h200": "H200 SXM", "NVIDIA-H100-80GB-HBM3": "H100 SXM", "a100": None, "amd-epyc": None}


def test_the_ledger_is_read_and_a_damaged_one_is_named(tmp_path):
    assert read_ledger([tmp_path]) == {}
    (tmp_path / "launches.json").write_text(json.dumps({"devices": {"null device": {"lenet5": 1}, "H100": {}}}))
    assert read_ledger([tmp_path / "absent", tmp_path]) == {"lenet5": 1}
    (tmp_path / "launches.json").write_text("[]")
    with pytest.raises(UserError, match=r"launches\.json"):
        read_ledger([tmp_path])
