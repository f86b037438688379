"""The ratchet: a captured step has no more launches than the committed ledger says. And the ledger itself."""

import ast
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastcifar.errors import UserError
from tests.nullgpu.checks import SPILL_BYTES, STACK, assert_clean, assert_steps_are_replayed
from tests.nullgpu.harness import ROOT, Job, on_null_device
from tests.nullgpu.report import Capture, Graph, Kernel, Region, Report

sys.path.insert(0, str(ROOT / "benchmarks"))
import launches

COMMITTED = launches.read_ledger().get(launches.NULL, {})
CHEAP = "lenet5"  # measured in every test run, by test_small.py; the others with `make nullgpu`
NO_DENSE_GRADIENTS = ("beyond/vit", "beyond/convnextv2", "beyond/shake-shake", "beyond/residual-attention92")
ONCE_PER_CODE = (
    *NO_DENSE_GRADIENTS, "beyond/cct", "beyond/pyramid-aligned", "pyramid", "aug-mixup", "wrn-sgd",
)  # fmt: skip
"""Counted again only when their entry in the ledger is of other code or versions: half an hour of one core.

The former are no rows of the ladder, and few layers of each are captured every time, in test_architectures.py; the
passes of the last three are those of pyramid400, aug-cutmix and wrn-200, which are counted every time.
"""


def steps_of(recipe: str, folder: Path, deadline_s: float) -> Report:
    """Take a recipe's step in whole batches only: odd ones and evaluation are compiled in test_recipes.py."""
    arguments = {"recipe": recipe, "changes": [], "odd": False, "evaluate": False}
    (report,) = on_null_device([Job("steps", arguments)], folder, deadline_s=deadline_s)
    return report


def assert_not_grown(recipe: str, report: Report) -> None:
    assert_clean(report, dense_gradients=recipe not in NO_DENSE_GRADIENTS)
    assert_steps_are_replayed(report)
    message = launches.grown(recipe, COMMITTED[recipe], report.captures()[0][1])
    assert message is None, message


def assert_recorded_clean(entry: launches.Entry) -> None:
    """Check what an entry of this very code says of its step, as far as it does."""
    assert (entry["mode"], entry["fallback"]) == ("compile+graph", None)
    assert all(size <= STACK.get(name, SPILL_BYTES) for name, size in entry["stack"].items()), entry["stack"]


@pytest.mark.nullgpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", [name for name in COMMITTED if name != CHEAP])
def test_a_step_has_no_more_launches_than_committed(null_device: Path, tmp_path: Path, recipe: str) -> None:
    if recipe in ONCE_PER_CODE and not launches.due([recipe], launches.NULL, named=False):
        assert_recorded_clean(COMMITTED[recipe])
    else:
        assert_not_grown(recipe, steps_of(recipe, tmp_path / "child", deadline_s=1700))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [name for name in ("lenet5", "deep-bn") if name in COMMITTED])
def test_a_gpu_launches_what_the_ledger_says(recipe: str) -> None:
    """The first thing to compare on a real GPU; on the first one there were one or two launches more, see NOTES.md."""
    found = launches.measure_gpu(recipe)
    assert launches.compare(recipe, COMMITTED[recipe], found) == [], found["names"]


# ------------------------------------------------------------------------------------- the ledger, without any device


def report() -> Report:
    step = Capture(
        launches=Counter({"triton_a": 2, "augment_kernel": 1, "at::add": 4}), graphs=[0, 1], number=1, whole=True
    )
    step.library["convolution"] = 2
    steps = Region(kind="step", rows=128, captures=[step])
    evaluation = Region(kind="evaluation", rows=256, launches=Counter({"at::add": 3}))
    facts = {"mode": "compile+graph", "fallback": None, "peak_bytes": 10, "compile_cpu_s": 1.26}
    graphs = {0: Graph(False, 100, 7), 1: Graph(True, 50, 7)}
    kernels = [Kernel("triton_a", 40, 0, "sm_90"), Kernel("augment_kernel", 30, 8, "sm_90")]
    return Report(facts=facts, regions=[steps, evaluation], graphs=graphs, kernels=kernels)


def made() -> launches.Entry:
    again = report()
    again.facts["compile_cpu_s"] = 0.44
    return launches.entry_of("lenet5", report(), again)


def test_an_entry_says_what_was_seen() -> None:
    entry = made()
    assert entry["step"] == {"launches": {"aten": 4, "generated": 2, "own": 1}, "library": {"convolution": 2}}
    assert launches.total(entry["step"]) == 7
    assert entry["evaluation"] == {"launches": {"aten": 3}, "library": {}}
    assert (entry["generated_bytes"], entry["compile_cpu_s"], entry["cached_cpu_s"]) == (150, 1.3, 0.4)
    assert (entry["kernels"], entry["registers"], entry["stack"]) == (2, 40, {"augment_kernel": 8})
    assert launches.entry_of("lenet5", report())["cached_cpu_s"] is None


def test_bytes_out_of_a_cache_are_unknown() -> None:
    seen = report()
    seen.regions[0].captures[0].graphs.append(-1)
    assert launches.entry_of("lenet5", seen, seen)["generated_bytes"] is None


def test_a_failed_step_is_no_entry() -> None:
    failed = Report(error="Traceback\nValueError: no\n")
    for runs in ((failed, report()), (report(), failed)):
        with pytest.raises(UserError, match="lenet5: ValueError: no"):
            launches.entry_of("lenet5", *runs)


def test_more_launches_are_told_with_what_to_do() -> None:
    entry, seen = made(), report()
    step = seen.regions[0].captures[0]
    assert launches.grown("lenet5", entry, step) is None
    step.launches["triton_b"] += 2
    message = launches.grown("lenet5", entry, step)
    assert message is not None
    assert "has 9 launches, and 7 in launches.json (generated 2 -> 4)" in message
    assert "python benchmarks/launches.py lenet5" in message
    step.launches["at::add"] = 0  # fewer in all: some moved from one origin to another
    assert launches.grown("lenet5", entry, step) is None


def test_entries_are_kept_one_by_one_in_the_order_of_the_ladder(tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    for name in ("wrn-200", "lenet5", "wrn-200"):
        launches.write_entry("null device", made() | {"recipe": name}, path)
    assert list(launches.read_ledger(path)["null device"]) == ["lenet5", "wrn-200"]
    path.write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"launches\.json"):
        launches.read_ledger(path)


def test_only_what_changed_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"d": {"lenet5": {"fingerprint": launches.fingerprint("lenet5")}, "deep-bn": {"fingerprint": "other"}}}
    monkeypatch.setattr(launches, "read_ledger", lambda: held)
    assert launches.due(["lenet5", "deep-bn", "wrn-200"], "d", named=False) == ["deep-bn", "wrn-200"]
    assert launches.due(["lenet5"], "d", named=True) == ["lenet5"]


def test_words_are_no_change_and_code_is() -> None:
    def code(text: str) -> str:
        return ast.dump(launches.without_docstrings(ast.parse(text)))

    plain = code("def f(x):\n    return x + 1")
    assert code('"""Words."""\ndef f(x):  # more\n    """Words."""\n    return x + 1') == plain
    assert code("def f(x):\n    return x + 2") != plain
    tree = ast.parse("def f():\n    from fastcifar.kernels import philox\nfrom fastcifar.train.muon import Muon")
    found = {str(path.relative_to(ROOT / "fastcifar")) for path in launches.imports(tree)}
    assert found == {"kernels/__init__.py", "kernels/philox.py", "train/muon.py"}


def test_a_gpu_is_compared_by_origin() -> None:
    names = {
        "triton_poi_fused_add_0": "generated", "augment_kernel": "own", "Memcpy DtoD (Device -> Device)": "copy",
        "void at::native::vectorized_elementwise_kernel<4>(int)": "aten", "sm90_xmma_fprop_implicit_gemm": "library",
        "void (anonymous namespace)::softmax_warp_forward<float>(float*)": "aten",
        "void cudnn::(anonymous namespace)::nhwcToNchw(float*)": "library",
    }  # fmt: skip
    assert {name: launches.real_origin(name) for name in names} == names
    entry = made()
    assert launches.compare("lenet5", entry, entry) == []
    other = entry | {"step": {"launches": {"generated": 3, "own": 1, "aten": 4, "copy": 9}, "library": {}}}
    assert launches.compare("lenet5", entry, other) == ["lenet5: generated: 2 launches in the ledger, 3 on the GPU"]


def test_a_gpu_is_held_against_the_null_device(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = made()
    monkeypatch.setattr(launches, "read_ledger", lambda: {launches.NULL: {"lenet5": entry}})
    assert launches.against_null({"lenet5": entry, "wrn-200": entry}) == [
        "the GPU launches what the ledger says, for lenet5"
    ]
    other = entry | {"mode": "eager"}
    assert launches.against_null({"lenet5": other}) == [
        f'lenet5: mode "{entry["mode"]}" in the ledger, "eager" on the GPU'
    ]
