"""Compiled and captured steps give the eager step's losses; on a GPU nothing in a step waits for the host."""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar.augment.augment import build_augment
from fastcifar.data.batch import Batch
from fastcifar.errors import UserError
from fastcifar.models import build_model
from fastcifar.train import execution
from fastcifar.train.cursor import DeviceCursor
from fastcifar.train.execution import preserved
from fastcifar.train.flat_parameters import FlatParameters
from fastcifar.train.step import build_step
from tests.train.step_parts import batches, make_step, recipe, same, state, train

# torch's compiler warns about itself: while it is imported, and with advice on performance.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("default::UserWarning"),
]

VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam": {"optimizer": {"name": "adam", "lr": 1e-3}, "ema": {"decay": 0.9}},
    "asam": {"asam": {"rho": 0.5}, "ema": {"decay": 0.9}, "schedule": {"name": "cosine", "per": "step"}},
    "asam-fp16": {"asam": {"rho": 0.5}, "train": {"epochs": 4, "batch_size": 16, "grad_clip": 1.0}},
    "asam-freeze": {"asam": {"rho": 0.5, "batch_norm": "freeze"}},
    "accumulate": {"asam": {"rho": 0.5}, "train": {"epochs": 4, "batch_size": 16, "accumulate": 2}},
    "muon": {"optimizer": {"name": "muon", "lr": 0.02}},
    "mixed": {"mix": {"name": "cutmix"}, "asam": {"rho": 0.5}, "loss": {"label_smoothing": 0.1}},
}
PRECISION = {"asam-fp16": "fp16"}


def run(mode: str, device: str, size: int = 20, **tables: Any) -> tuple[torch.Tensor, Any]:
    """Train two epochs without dropout, whose random numbers depend on the mode; return the losses and the step.

    With 20 samples a batch, an epoch's last batch is smaller.
    """
    engine = {"precision": "fp32", "mode": mode} | tables.pop("engine", {})
    step = make_step(recipe(engine=engine, **tables), device, dropout=0.0)
    curve = torch.cat([result["curve"] for result in train(step, 0, 2, device, size)])
    return curve, step


def test_compiled_equals_eager_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, made functional and differentiated ahead of time, as for Inductor, without its C++.

    Inductor itself compiles in the tests on a GPU and on the null device.
    """
    torch.compiler.reset()
    ahead = lambda forward: torch.compile(forward, backend="aot_eager", dynamic=False)  # noqa: E731
    monkeypatch.setattr(execution, "compile_model", ahead)
    tables = {"asam": {"rho": 0.5}, "ema": {"decay": 0.9}}
    compiled, step = run("compile", "cpu", 16, **tables)  # one shape: each takes long to trace
    assert step.execution.mode == "compile"
    eager, reference = run("eager", "cpu", 16, **tables)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state(step)["flat.ema"], state(reference)["flat.ema"], rtol=1e-3, atol=1e-4)


def test_each_of_many_models_in_a_process_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All working copies share one function, of which torch compiles eight versions unless it is told otherwise."""
    torch.compiler.reset()
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for width in range(1, 13):
        model = torch.nn.Linear(width, 2)
        forward = execution.WorkingCopyModel(model, FlatParameters(model), torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            execution.compile_model(forward)(torch.ones(1, width))
    assert len(compiled) == 12
    assert torch._dynamo.config.fail_on_recompile_limit_hit


def test_what_is_compiled_is_kept_in_our_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCIFAR_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # for the test's end to put back what was there
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    execution.compile_model(lambda images: images)  # nothing is compiled before its first call
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "mine"


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("mode", ["graph", "auto"])
def test_graph_equals_eager(name: str, mode: str) -> None:
    tables = VARIANTS[name] | {"engine": {"precision": PRECISION.get(name, "fp32")}}
    eager, _ = run("eager", "cuda", **tables)
    captured, step = run(mode, "cuda", **tables)
    assert step.execution.fallback is None
    assert "graph" in step.execution.mode
    bound = 2e-2 if name in PRECISION else 2e-3
    torch.testing.assert_close(captured, eager, rtol=bound, atol=bound)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    on_cpu, _ = run("eager", "cpu", **VARIANTS["asam"])
    on_gpu, _ = run("graph", "cuda", **VARIANTS["asam"])
    torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_step_waits_for_the_host(name: str, mode: str) -> None:
    engine = {"precision": PRECISION.get(name, "bf16"), "mode": mode}
    step = make_step(recipe(engine=engine, **VARIANTS[name]), "cuda")
    step.begin_epoch(0)
    given = batches(0, "cuda")
    for batch in given[:4]:  # kernels are compiled, graphs captured
        step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in given[4:]:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.end_epoch()["nonfinite_step"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["wide_resnet", "pyramidnet", "speednet"])
def test_a_recipe_as_published_is_captured_with_its_augmentation(model: str) -> None:
    small = {
        "wide_resnet": {"depth": 10, "widen": 1},
        "pyramidnet": {"depth": 8, "alpha": 8, "shakedrop": 0.5},
        "speednet": {"widths": [16, 32, 32], "scale": 1 / 32},
    }
    tables = {
        "model": {"name": model, **small[model]}, "augment": ["crop(4)", "flip", "autoaugment"],
        "asam": {"rho": 2.0}, "ema": {}, "loss": {"label_smoothing": 0.1},
        "engine": {"mode": "auto", "precision": "bf16"},
    }  # fmt: skip
    config, device = recipe(**tables), torch.device("cuda")
    augment = build_augment(
        config.augment, mean=[0.5] * 3, std=[0.5] * 3, image_shape=(32, 32, 3), seed=1, device=device,
        dtype=torch.bfloat16,
    )  # fmt: skip
    step = build_step(config, build_model(config.model, seed=1), augment, None, steps_per_epoch=6, device=device)
    images = torch.randint(0, 256, (96, 32, 32, 3), dtype=torch.uint8, device=device)
    given = [Batch(images, b.rows, b.labels, b.indices) for b in batches(0, "cuda")]
    step.begin_epoch(0)
    step(given[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in given[1:]:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (step.execution.mode, step.execution.fallback) == ("compile+graph", None)
    assert step.end_epoch()["nonfinite_step"] is None


BF16_MODELS: dict[str, dict[str, Any]] = {
    "wide_resnet": {"depth": 10, "widen": 1, "dropout": 0.0},
    "pyramidnet": {"depth": 8, "alpha": 8},
    "speednet": {"widths": [16, 32, 32], "scale": 1 / 32},
    "vit": {"depth": 2, "drop_path": 0.0},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", BF16_MODELS)
def test_compiled_gradients_in_bf16_are_as_near_to_fp32_as_eager_ones(name: str) -> None:
    """Compiled code keeps values in fp32 that eager code rounds: nearer is no fault, NaN or another direction is."""
    table, gradients = {"name": name, **BF16_MODELS[name]}, {}
    images = torch.rand(64, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (64,), device="cuda")
    for mode, precision in (("eager", "fp32"), ("eager", "bf16"), ("compile", "bf16")):
        config = recipe(model=table, engine={"mode": mode, "precision": precision})
        model = build_model(config.model, seed=1)
        step = build_step(config, model, None, None, steps_per_epoch=6, device=torch.device("cuda"))
        step.begin_epoch(0)
        step.backward(images.to(step.precision.images), labels, 64)
        gradients[mode, precision] = step.flat.grads.double()
    exact = gradients.pop(("eager", "fp32"))
    errors = {key: float((found - exact).norm() / exact.norm()) for key, found in gradients.items()}
    assert errors["compile", "bf16"] <= 1.5 * errors["eager", "bf16"] + 1e-2, errors


@pytest.mark.gpu
def test_capture_leaves_no_trace() -> None:
    """Steps that only warm up and capture must not train: one captured step equals one eager step."""
    found = []
    for mode in ("eager", "graph"):
        step = make_step(recipe(engine={"precision": "fp32", "mode": mode}, asam={"rho": 0.5}), "cuda", dropout=0.0)
        step.begin_epoch(0)
        step(batches(0, "cuda")[0])
        found.append(state(step))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)


class NoGraph:
    """Stands for a captured graph where there is no GPU: the warm-up goes its whole way, and nothing is captured."""

    def beside(self, work: Any) -> Any:
        return work()

    def capture(self, batch: Batch) -> None: ...


def test_a_warm_up_needs_no_more_steps_than_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, learning rates and Lookahead's shares have an entry for each step: here one, or the one that is left."""
    monkeypatch.setattr("fastcifar.train.step.build_cursor", DeviceCursor)
    monkeypatch.setattr("tests.train.step_parts.STEPS", 1)
    monkeypatch.setattr(execution, "first_wait", lambda run: run())
    tables = {"lookahead": {}, "asam": {"rho": 0.5}, "train": {"epochs": 2, "batch_size": 16}}
    step, given = make_step(recipe(**tables)), batches(0)[0]
    step.execution.graph = NoGraph()  # type: ignore[assignment]
    for epoch in range(2):
        step.begin_epoch(epoch)
        before = state(step)
        step.execution.warm_up([given])
        assert same(state(step), before)
        step.execute(given)
        step.end_epoch()
    assert int(state(step)["flat.lookahead_steps"]) == 2


@pytest.mark.gpu
def test_state_is_put_back() -> None:
    tensor, before = torch.ones(3, device="cuda"), torch.cuda.get_rng_state()
    with preserved([tensor]):
        tensor.add_(1)
        torch.rand(5, device="cuda")
    assert tensor.tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(before, torch.cuda.get_rng_state())


def broken_backend(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("at 11:11:\nsource\nValueError('Scalar 3449720151 is out of range for type int32')")


def test_a_model_that_does_not_compile_goes_on_without_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    broken = lambda forward: torch.compile(forward, backend=broken_backend)  # noqa: E731
    monkeypatch.setattr(execution, "compile_model", broken)
    step, reference = make_step(recipe(engine={"mode": "compile"})), make_step(recipe(engine={"mode": "eager"}))
    assert step.execution.mode == "compile"
    step.execution.warm_up(batches(0)[:1])
    assert step.execution.mode == "eager"
    assert "cannot be compiled" in str(step.execution.fallback)
    assert str(step.execution.fallback).endswith("ValueError('Scalar 3449720151 is out of range for type int32')")
    train(step, 0, 1)
    train(reference, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(state(step).values(), state(reference).values(), strict=True))


def test_strict_makes_that_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    broken = lambda forward: torch.compile(forward, backend=broken_backend)  # noqa: E731
    monkeypatch.setattr(execution, "compile_model", broken)
    step = make_step(recipe(engine={"mode": "compile", "strict": True}))
    with pytest.raises(UserError, match=r"cannot be compiled.*out of range.*engine\.strict"):
        step.execution.warm_up(batches(0)[:1])


def test_warming_up_trains_on_nothing() -> None:
    step, reference = make_step(recipe(ema={}, asam={"rho": 0.5})), make_step(recipe(ema={}, asam={"rho": 0.5}))
    step.execution.warm_up(batches(0))
    assert all(torch.equal(a, b) for a, b in zip(state(step).values(), state(reference).values(), strict=True))
    for results in zip(train(step, 0, 1), train(reference, 0, 1), strict=True):
        assert torch.equal(results[0]["curve"], results[1]["curve"])


def test_looking_for_waits_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)
        modes.append(mode)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert execution.first_wait(lambda: None) is None
        assert execution.first_wait(waits) == "RuntimeError: called a synchronizing CUDA operation"
    assert (modes, seen) == (["error", "default"] * 2, [])


def test_what_is_warmed_up_is_in_training_mode() -> None:
    """A captured graph keeps the mode; a builder of the user's own may return a model in evaluation mode."""
    step = make_step(recipe())
    step.model.eval()
    modes: list[bool] = []
    forward = step.forward
    step.forward = lambda x: (modes.append(step.model.training), forward(x))[1]
    step.execution.warm_up(batches(0)[:1])
    assert modes
    assert all(modes)


def test_out_of_memory_says_what_to_lower() -> None:
    step = make_step(recipe())
    step.forward = lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("tried to allocate 20 GiB"))
    with pytest.raises(UserError, match=r"20 GiB.*lower train\.batch_size"):
        step.execution.warm_up(batches(0)[:1])
