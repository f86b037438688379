"""Every option of the step on the null device: captured, replayed, nothing forbidden, no wait for the host."""

from pathlib import Path

import pytest

from tests.nullgpu.checks import assert_clean, assert_steps_are_replayed
from tests.nullgpu.harness import Job, on_null_device
from tests.nullgpu.report import Report

pytestmark = [pytest.mark.nullgpu, pytest.mark.timeout(1800)]

SAM = "asam={rho=0.5}"
BASE = ["train.batch_size=24", "optimizer={name='sgd',lr=0.1}"]
# What is changed in smoke/deep-bn (a small net with BatchNorm, batches of 24 images, SGD).
CAPTURED: dict[str, list[str]] = {
    "sgd": [],
    "plain momentum": ["optimizer={name='sgd',lr=0.1,nesterov=false}"],
    "adam": ["optimizer={name='adam',lr=1e-3}"],
    "adamw": ["optimizer={name='adamw',lr=1e-3,weight_decay=0.1}"],
    "muon": ["optimizer={name='muon',lr=0.02}"],
    "muon, normalized": ["optimizer={name='muon',lr=0.02,normalize=true}", "ema.decay=0.9"],
    "ema": ["ema.decay=0.9"],
    "fp32": ["engine.precision=fp32"],
    "tf32": ["engine.precision=tf32"],
    "fp16": ["engine.precision=fp16"],
    "working copy": ["engine.working_copy=true"],
    "asam": [SAM],
    "sam": ["asam={rho=0.05,adaptive=false}"],
    "asam of the weights": ["asam={rho=0.5,scope='weights',eta=0.01}"],
    "asam, frozen BatchNorm": ["asam={rho=0.5,batch_norm='freeze'}"],
    "asam, fp16, clipping": [SAM, "engine.precision=fp16", "train.grad_clip=1.0"],
    "asam, late": ["asam={rho=0.5,start=0.5}"],
    "hardest samples": ["select={every=2,model={name='speednet',widths=[16,16,16]}}"],
    "accumulate": ["train.accumulate=3"],
    "accumulate, asam": ["train.accumulate=3", SAM],
    "clipping": ["train.grad_clip=1.0"],
    "per step": ["schedule={name='cosine',per='step',warmup_epochs=1}", "train.epochs=2"],
    "smoothing": ["loss.label_smoothing=0.1"],
    "class weights": ["loss.class_weights=[1,1,1,1,1,1,1,1,1,2]"],
    "cutmix": ["mix={name='cutmix'}"],
    "cutmix for each sample": ["mix={name='cutmix',per_sample=true}"],
    "mixup": ["mix={name='mixup'}"],
    "mixup for each sample": ["mix={name='mixup',per_sample=true}"],
    "cutmix or mixup": ["mix={name='cutmix_or_mixup',p=0.5,start=0.5}", SAM],
    "autoaugment": ["augment=['crop(4)','flip','autoaugment','cutout(16,p=0.5)']"],
    "randaugment": ["augment=['flip','randaugment']"],
    "trivialaugment": ["augment=['crop(4)','trivialaugment','rotate(15)']"],
}
TWO_PHASES = ("asam, late", "hardest samples")
COMPILED = ("working copy", "fp16", "fp32", "asam", "accumulate", "muon")


@pytest.fixture(scope="module")
def found(null_device: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Report]:
    wanted = [("graph", name) for name in CAPTURED] + [("auto", name) for name in COMPILED]
    jobs = [
        Job("steps", {"recipe": "smoke/deep-bn", "changes": [*BASE, f"engine.mode={mode}", *CAPTURED[name]]})
        for mode, name in wanted
    ]
    return dict(
        zip(wanted, on_null_device(jobs, tmp_path_factory.mktemp("options") / "child", deadline_s=1700), strict=True)
    )


def check(report: Report, phases: int = 1) -> None:
    assert_clean(report)
    assert_steps_are_replayed(report)
    # A whole batch, and an odd last one, each in every kind of step that the run has.
    assert [rows for rows, _ in report.captures()] == [24] * phases + [13] * phases


@pytest.mark.parametrize("name", CAPTURED)
def test_an_option_is_captured(found: dict[tuple[str, str], Report], name: str) -> None:
    report = found["graph", name]
    check(report, phases=2 if name in TWO_PHASES else 1)
    assert report.facts["mode"] == "graph"


@pytest.mark.parametrize("name", COMPILED)
def test_an_option_is_compiled_and_captured(found: dict[tuple[str, str], Report], name: str) -> None:
    report = found["auto", name]
    check(report)
    assert report.facts["mode"] == "compile+graph"
    assert report.captures()[0][1].kinds()["generated"] > 0
