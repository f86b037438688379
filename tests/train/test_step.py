"""The step on a CPU: exact repetition and resume, and what each option means."""

import contextlib
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fastcifar.config.schema import EngineConfig
from fastcifar.errors import UserError
from fastcifar.train.execution import choose_mode
from fastcifar.train.step_state import torch_seed
from tests.train.step_parts import BATCH, STEPS, Normalize, batches, make_step, recipe, same, state, train

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam-ema": {"optimizer": {"name": "adam", "lr": 1e-3}, "ema": {}},
    "adamw-bf16": {"optimizer": {"name": "adamw", "lr": 1e-3}, "engine": {"precision": "bf16"}},
    "asam-ema": {"asam": {"rho": 0.5}, "ema": {"decay": 0.9}, "schedule": {"name": "cosine"}},
    "asam-fp16": {"asam": {"rho": 0.5}, "engine": {"precision": "fp16"}},
    "asam-freeze": {"asam": {"rho": 0.5, "batch_norm": "freeze"}},
    "accumulate": {"asam": {"rho": 0.5}, "train": {"epochs": 4, "batch_size": BATCH, "accumulate": 3}},
    "muon": {"optimizer": {"name": "muon", "lr": 0.02, "normalize": True, "weight_decay": 0.01}, "ema": {}},
    "working_copy": {"engine": {"precision": "bf16", "working_copy": True}, "asam": {"rho": 0.5}},
    "mixed": {"mix": {"name": "cutmix_or_mixup"}, "loss": {"label_smoothing": 0.1}, "asam": {"rho": 0.5}},
    "linear-clip": {"schedule": {"name": "linear", "per": "step"}, "train": {"epochs": 4, "grad_clip": 0.1}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_same_bits_twice_and_after_a_resume(name: str) -> None:
    config = recipe(**VARIANTS[name])
    whole = make_step(config)
    results = train(whole, 0, 4)
    assert results[-1]["loss"] < results[0]["loss"]
    first = make_step(config)
    train(first, 0, 2)
    saved = state(first)
    torch.manual_seed(99)
    again = make_step(config)
    again.load_state_dict(saved)
    resumed = train(again, 2, 4)
    assert torch.equal(resumed[-1]["curve"], results[-1]["curve"])
    assert same(state(again), state(whole))


def test_learning_rate_is_returned_and_used() -> None:
    step = make_step(recipe(schedule={"name": "cosine"}))
    assert step.begin_epoch(0) == 0.05
    assert step.begin_epoch(2) == pytest.approx(0.025)
    step(batches(0)[0])
    still = make_step(recipe(schedule={"name": "linear"}, train={"epochs": 1, "batch_size": BATCH}))
    before = state(still)["flat.weights"]
    still.begin_epoch(1)  # the end of the line: a rate of 0
    still(batches(0)[0])
    assert torch.equal(before, state(still)["flat.weights"])


@pytest.mark.parametrize("tables", [{}, {"mix": {"name": "mixup"}}, {"asam": {"rho": 0.5, "adaptive": False}}])
def test_micro_batches_add_up_to_the_whole(tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without BatchNorm, whose statistics are per micro-batch by nature; class weights make them unequal."""
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", lambda self, x: x)
    loss, found = {"label_smoothing": 0.1, "class_weights": [0.5, *[1.0] * 8, 3.0]}, []
    for accumulate in (1, 3):
        config = recipe(loss=loss, train={"epochs": 4, "batch_size": BATCH, "accumulate": accumulate}, **tables)
        step = make_step(config, dropout=0.0)
        results = train(step, 0, 2)
        found.append((state(step)["flat.weights"], results[1]["curve"], torch.tensor(results[1]["accuracy"])))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mix", [None, {"name": "mixup"}])
def test_a_summed_loss_has_the_gradient_of_the_sum_and_is_recorded_as_a_mean(accumulate: int, mix: Any) -> None:
    gradients, losses = [], []
    for reduction in ("mean", "sum"):
        tables = {"mix": mix, "loss": {"reduction": reduction, "label_smoothing": 0.1}}
        config = recipe(**tables, train={"epochs": 4, "batch_size": BATCH, "accumulate": accumulate})
        step = make_step(config, dropout=0.0)
        step.begin_epoch(0)
        losses.append(step.backward(*step.inputs(batches(0)[0]), total=16)[0])
        gradients.append(step.flat.grads.clone())
    torch.testing.assert_close(gradients[1], BATCH * gradients[0])
    torch.testing.assert_close(losses[1], losses[0])


def test_batch_norm_in_the_second_pass() -> None:
    """Freeze: the statistics move as if there were no second pass; update: they move twice."""
    found = {}
    for name, asam in (("none", None), ("freeze", "freeze"), ("update", "update")):
        step = make_step(recipe(asam=asam and {"rho": 2.0, "batch_norm": asam}))
        step.begin_epoch(0)
        step(batches(0)[0])
        found[name] = state(step)["flat.stats"]
    assert torch.equal(found["none"], found["freeze"])
    assert not torch.equal(found["none"], found["update"])


def test_results_of_an_epoch() -> None:
    step = make_step(recipe(optimizer={"name": "sgd", "lr": 1e-9}), dropout=0.0)
    result = train(step, 0, 1, size=18)[0]  # 5 batches of 18 and one of 6
    x, y = Normalize()(batches(0, size=96)[0], 0), batches(0, size=96)[0].labels
    assert (result["samples"], result["nonfinite_step"]) == (96, None)
    assert len(result["curve"]) == STEPS
    correct = 0.0
    for batch in batches(0, size=18):
        correct += float((step.model(Normalize()(batch, 0)).argmax(1) == batch.labels).sum())
    assert result["accuracy"] == pytest.approx(100 * correct / 96, abs=2.1)
    whole = torch.nn.functional.cross_entropy(step.model(x).detach(), y)
    assert result["loss"] == pytest.approx(float(whole), abs=0.1)


def test_a_loss_that_is_not_finite_is_named_with_its_step() -> None:
    step = make_step(recipe(), augment=Normalize(spoil_at=3))
    assert train(step, 0, 1)[0]["nonfinite_step"] == 3


@pytest.mark.parametrize("asam", [None, {"rho": 0.5}])
def test_fp16_overflow_leaves_the_step_out_and_halves_the_scale(asam: dict[str, Any] | None) -> None:
    step = make_step(recipe(engine={"precision": "fp16"}, asam=asam), dropout=0.0)
    step.scaler.scale.fill_(2.0**40)  # type: ignore[union-attr]
    step.begin_epoch(0)
    before = state(step)
    step(batches(0)[0])
    after = state(step)
    assert torch.equal(before["flat.weights"], after["flat.weights"])
    assert torch.equal(before["flat.momentum"], after["flat.momentum"])
    assert float(after["scaler.scale"]) == 2.0**39
    for _ in range(40):
        step.cursor.begin(0)
        step(batches(0)[0])
    assert not torch.equal(before["flat.weights"], state(step)["flat.weights"])


@pytest.mark.parametrize("spoilt", [1, 2])
@pytest.mark.parametrize("batch_norm", ["update", "freeze"])
def test_a_step_that_the_loss_scaler_leaves_out_leaves_no_statistics_behind(spoilt: int, batch_norm: str) -> None:
    """Either pass of a step can overflow within the model; the running statistics would never recover from it."""
    asam = {"rho": 0.5, "batch_norm": batch_norm}
    step = make_step(recipe(engine={"precision": "fp16"}, asam=asam, ema={"decay": 0.9}), dropout=0.0)
    step.begin_epoch(0)
    step(batches(0)[0])
    before, backward, passes = state(step), step.backward, []

    def overflowing(images: torch.Tensor, *rest: Any) -> Any:
        passes.append(images)
        return backward(images * (float("inf") if len(passes) == spoilt else 1.0), *rest)

    step.backward = overflowing  # type: ignore[method-assign]
    step(batches(0)[1])
    after = state(step)
    assert len(passes) == 2
    assert float(after["scaler.scale"]) == float(before["scaler.scale"]) / 2
    for name in ("flat.weights", "flat.stats"):
        assert torch.equal(before[name], after[name])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    step(batches(0)[2])
    assert not torch.equal(after["flat.stats"], state(step)["flat.stats"])


@pytest.mark.parametrize("asam", [None, {"rho": 0.5}])
def test_fp16_and_bf16_follow_fp32(asam: dict[str, Any] | None) -> None:
    losses = {}
    for precision in ("fp32", "fp16", "bf16"):
        step = make_step(recipe(engine={"precision": precision}, asam=asam))
        losses[precision] = train(step, 0, 2)[1]
    assert losses["fp16"]["loss"] == pytest.approx(losses["fp32"]["loss"], rel=5e-3)
    assert losses["bf16"]["loss"] == pytest.approx(losses["fp32"]["loss"], rel=3e-2)


def test_a_working_copy_changes_no_bit() -> None:
    found = []
    for working_copy in (False, True):
        config = recipe(engine={"precision": "bf16", "working_copy": working_copy}, asam={"rho": 0.5}, ema={})
        step = make_step(config)
        train(step, 0, 2)
        found.append(state(step))
    assert same(*found)


def test_averaged_weights_are_swapped_in_and_out_even_on_an_error() -> None:
    step = make_step(recipe(ema={"decay": 0.5}))
    train(step, 0, 1)
    raw = {name: t.clone() for name, t in step.model.state_dict().items()}
    with step.weights("ema"):
        assert torch.equal(step.flat.weights, step.flat.buffers["ema"])
        assert not torch.equal(step.model.norm.running_mean, raw["norm.running_mean"])
    with contextlib.suppress(KeyError), step.weights("ema"):
        raise KeyError
    with step.weights("raw"):
        assert all(torch.equal(t, raw[name]) for name, t in step.model.state_dict().items())
    with pytest.raises(ValueError, match="no ema"):
        make_step(recipe()).weights("ema")


def test_state_of_another_recipe_is_refused() -> None:
    step, other = make_step(recipe()), make_step(recipe(ema={}))
    with pytest.raises(ValueError, match=r"flat\.ema is missing"):
        other.load_state_dict(state(step))


def test_modes_and_their_reasons() -> None:
    assert choose_mode(EngineConfig(mode="auto"), CPU) == (False, False, None)
    assert choose_mode(EngineConfig(mode="auto"), torch.device("cuda")) == (True, True, None)
    assert choose_mode(EngineConfig(mode="graph"), torch.device("cuda")) == (False, True, None)
    step = make_step(recipe(engine={"mode": "graph", "precision": "fp32"}))
    assert step.execution.mode == "eager"
    assert "needs a CUDA device" in str(step.execution.fallback)
    with pytest.raises(UserError, match=r"needs a CUDA device.*engine\.strict"):
        make_step(recipe(engine={"mode": "graph", "strict": True}))


def test_the_environment_makes_every_recipe_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCIFAR_STRICT", "1")
    with pytest.raises(UserError, match=r"needs a CUDA device.*engine\.strict"):
        make_step(recipe(engine={"mode": "graph", "precision": "fp32"}))


def test_class_weights_are_checked() -> None:
    with pytest.raises(ValidationError, match="3 weights for 10 classes"):
        recipe(loss={"class_weights": [1.0, 1.0, 1.0]})


def test_torch_seed_depends_on_seed_and_epoch() -> None:
    seeds = {torch_seed(seed, epoch) for seed in (0, 1, 2**40) for epoch in range(20)}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch_seed(1, 0) == torch_seed(1, 0)
