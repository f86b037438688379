"""What a training step is made of on a GPU: launches, library calls, bytes, memory, kernels, for each kind of recipe.

    python benchmarks/launches.py [RECIPE ...] [--cached] [--quick] [--json]

Without a GPU the step is compiled and captured on the null device (``tests/nullgpu``), which computes nothing and so
measures no time; with one, the launches of a replayed step are counted by torch's profiler. Both go into
``results/launches.json``, under the name of the device. A recipe that was measured with the very same sources and
versions is left out, so that an interrupted run goes on where it was; naming a recipe measures it again.

The tests hold the present launches against that file: whoever adds some says so by committing a new one.
"""

import argparse
import ast
import datetime
import hashlib
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from common import Row, be_strict, describe, report_of, result, show
from fastcifar.config import load_recipe, to_toml
from fastcifar.errors import UserError
from fastcifar.run_directory import write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests.nullgpu, which is no part of the installed package

from tests.nullgpu.build import missing  # noqa: E402
from tests.nullgpu.harness import Job, on_null_device  # noqa: E402
from tests.nullgpu.report import Capture, Report, origin  # noqa: E402

LEDGER = ROOT / "benchmarks" / "results" / "launches.json"
NULL = "null device"
RECIPES = (
    "lenet5", "deep-bn", "aug-cutmix", "aug-mixup", "beyond/speed94", "beyond/speed96", "residual", "residual-deep",
    "wrn-sgd", "wrn-200", "pyramid", "pyramid400", "beyond/pyramid-aligned", "beyond/cct", "beyond/vit",
    "beyond/convnextv2", "beyond/shake-shake", "beyond/residual-attention92",
)  # fmt: skip
QUICK = ("lenet5",)
DEADLINE_S = 3600.0
STEP = ("augment/augment.py", "augment/mix.py", "models/__init__.py", "train/evaluate.py", "train/step.py")
"""Files of fastcifar that make a step; what they import decides what it launches, as far as it is in these folders."""
PATH_FOLDERS = ("augment", "kernels", "models", "train")

Entry = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- ledger


def read_ledger(path: Path = LEDGER) -> dict[str, dict[str, Entry]]:
    """Return the ledger: device -> recipe -> entry.

    Raises:
        UserError: the file is not a ledger.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text())["devices"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a ledger of launches ({error!r}); remove it") from None


def write_entry(device: str, entry: Entry, path: Path = LEDGER) -> None:
    """Put an entry into the ledger at once, in place of an older one of the same device and recipe."""
    devices = read_ledger(path)
    held = devices.setdefault(device, {}) | {entry["recipe"]: entry}
    order = [*RECIPES, *held]
    devices[device] = dict(sorted(held.items(), key=lambda item: order.index(item[0])))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"devices": devices})


def fingerprint(recipe: str) -> str:
    """Return a hash of all that decides what a recipe's step launches: code, the recipe, torch and Triton.

    Comments, docstrings and code that no step imports do not count.
    """
    versions = describe()["packages"]
    digest = hashlib.sha256(f"{versions.get('torch')} {versions.get('triton')} {code_of_a_step()}".encode())
    digest.update(to_toml(load_recipe(recipe)).encode())
    return digest.hexdigest()[:16]


@cache
def code_of_a_step() -> str:
    """Return a hash of the code that a step is made of, whatever the recipe."""
    package, digest = ROOT / "fastcifar", hashlib.sha256()
    found, waiting = {}, [package / name for name in STEP]
    while waiting:
        path = waiting.pop()
        if path not in found:
            tree = ast.parse(path.read_text())
            waiting += [each for each in imports(tree) if each.relative_to(package).parts[0] in PATH_FOLDERS]
            found[path] = ast.dump(without_docstrings(tree))
    for _, code in sorted(found.items()):
        digest.update(code.encode())
    return digest.hexdigest()


def imports(tree: ast.AST) -> set[Path]:
    """Return the files of fastcifar that a module imports anywhere."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastcifar."):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = {ROOT / f"{str(name).replace('.', '/')}{end}" for name in names for end in (".py", "/__init__.py")}
    return {path for path in paths if path.is_file()}


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Return a module's tree without any statement that is only a string."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [each for each in body if not _is_docstring(each)]  # type: ignore[attr-defined]
    return tree


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def entry_of(recipe: str, report: Report, again: Report | None = None) -> Entry:
    """Return a recipe's entry from what the null device saw of its `steps`.

    Args:
        recipe: its name.
        report: with nothing in the compilers' caches.
        again: of another process that finds in them what the first one compiled, or None.

    Raises:
        UserError: the step failed or was not captured.
    """
    for seen in (report, again or report):
        if seen.error is not None or not seen.captures():
            reason = (seen.error or "the step was not captured").strip().splitlines()[-1]
            raise UserError(f"{recipe}: {reason}")
    (rows, step), evaluation = report.captures()[0], report.of("evaluation")[0]
    captured = [capture for _, capture in report.captures("evaluation")]
    return {
        **_head(recipe),
        "batch_size": rows,
        "mode": report.facts["mode"],
        "fallback": report.facts["fallback"],
        "step": _work(step),
        "evaluation": _work(captured[0] if captured else evaluation),
        "generated_bytes": report.generated_bytes(step),
        "peak_bytes": report.facts["peak_bytes"],
        "compile_cpu_s": round(report.facts["compile_cpu_s"], 1),
        "cached_cpu_s": round(again.facts["compile_cpu_s"], 1) if again else None,
        "kernels": len(report.kernels),
        "registers": max((kernel.registers for kernel in report.kernels), default=0),
        "stack": {kernel.name: kernel.stack_bytes for kernel in report.kernels if kernel.stack_bytes},
        "names": dict(step.launches.most_common()),
    }


def _head(recipe: str) -> Entry:
    environment = describe()
    versions = {name: environment["packages"].get(name) for name in ("torch", "triton")}
    date = datetime.date.today().isoformat()
    return {"recipe": recipe, "fingerprint": fingerprint(recipe), "date": date, "git": environment["git"], **versions}


def _work(work: Any) -> Entry:
    """Return the launches of a capture or region by origin, and the library calls by operator."""
    return {"launches": dict(sorted(work.kinds().items())), "library": dict(sorted(work.library.items()))}


def total(work: Entry) -> int:
    """Return the launches of an entry's ``step`` or ``evaluation``, beside library calls."""
    return sum(work["launches"].values())


def measure_null(recipe: str, cached: bool = False) -> Entry:
    """Return a recipe's entry as the null device sees it, compiled anew.

    Args:
        recipe: its name.
        cached: go through its first step once more, in a process that finds the compilers' caches filled.

    Raises:
        UserError: the null device cannot run here, or the step failed on it.
    """
    if (why := missing()) is not None:
        raise UserError(why)
    job = Job("steps", {"recipe": recipe, "changes": [], "odd": False})
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            on_null_device([job], Path(folder) / run, deadline_s=DEADLINE_S, compiled=Path(folder) / "compiled")[0]
            for run in (("first", "second") if cached else ("first",))
        ]
    return entry_of(recipe, *runs)


# ------------------------------------------------------------------------------------------------------------ ratchet


def grown(recipe: str, committed: Entry, step: Capture) -> str | None:
    """Return what to say where a captured step has more launches than the ledger, or more library calls; else None."""
    held = committed["step"]
    now = _work(step)
    more = [
        f"{name} {held[kind].get(name, 0)} -> {count}"
        for kind in ("launches", "library")
        for name, count in now[kind].items()
        if count > held[kind].get(name, 0)
    ]
    if total(now) <= total(held) and sum(now["library"].values()) <= sum(held["library"].values()):
        return None
    return (
        f"{recipe}: a step has {total(now):,} launches, and {total(held):,} in {LEDGER.name} ({', '.join(more)}). "
        f"If that is on purpose: `python benchmarks/launches.py {recipe}`, `make tables`, and commit both"
    )


# -------------------------------------------------------------------------------------------------------------- a GPU


def measure_gpu(recipe: str) -> Entry:
    """Return what torch's profiler counts in one replayed step and one batch of evaluation on the GPU at hand.

    Bytes and registers are the null device's business; time is that of other benchmarks.
    """
    from tests.nullgpu.internals import IMAGE_SHAPE, Bench

    bench = Bench(recipe, [])
    bench.step.begin_epoch(0)
    bench.step(bench.batch(0))
    peak = torch.cuda.max_memory_allocated()
    bench.step(bench.batch(1))
    names = profiled(lambda: bench.step(bench.batch(0)))
    bench.evaluator.warm_up(IMAGE_SHAPE)
    evaluation = profiled(bench.evaluate)
    execution = bench.step.execution
    return {
        **_head(recipe), "batch_size": bench.size, "mode": execution.mode, "fallback": execution.fallback,
        "step": _counted(names), "evaluation": _counted(evaluation), "peak_bytes": peak, "names": dict(names),
    }  # fmt: skip


def profiled(work: Any) -> Counter[str]:
    """Return the names of everything that ran on the GPU in a call, with how often."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return Counter(event.name for event in profile.events() if event.device_type == on_gpu)


def _counted(names: Counter[str]) -> Entry:
    launches: Counter[str] = Counter()
    library: Counter[str] = Counter()
    for name, count in names.items():
        kind = real_origin(name)
        (library if kind == "library" else launches)[kind] += count
    return {"launches": dict(launches), "library": dict(library)}


def real_origin(name: str) -> str:
    """Return the origin of a kernel by the name that the profiler gives: as `origin`, or ``library``."""
    if name.startswith(("Memcpy", "Memset")):
        return "copy"
    if "at::native" in name or ("anonymous namespace" in name and not re.search("cudnn|cublas|cutlass", name)):
        return "aten"  # softmax and a few others are in no namespace of torch's
    if re.fullmatch(r"\w+", name) and (name.startswith("triton_") or name.endswith("_kernel")):
        return origin(name)
    return "library"


def compare(recipe: str, ledger: Entry, real: Entry) -> list[str]:
    """Return in what a GPU's step differs from the ledger's: origins whose launches are not the same.

    Library calls are left out: a call is as many kernels as the library likes. Copies of the batch into the graph's
    input are in the profile and not in the capture, so more copies are no difference.
    """
    held, found = ledger["step"]["launches"], real["step"]["launches"]
    lines = [
        f"{recipe}: {kind}: {held.get(kind, 0)} launches in the ledger, {found.get(kind, 0)} on the GPU"
        for kind in ("generated", "own", "aten")
        if held.get(kind, 0) != found.get(kind, 0)
    ]
    if ledger["mode"] != real["mode"]:
        lines.append(f'{recipe}: mode "{ledger["mode"]}" in the ledger, "{real["mode"]}" on the GPU')
    return lines


def against_null(entries: dict[str, Entry]) -> list[str]:
    """Return, in words, how a GPU's entries differ from those of the null device; they are findings, not failures."""
    held = read_ledger().get(NULL, {})
    both = [name for name in entries if name in held]
    lines = [line for name in both for line in compare(name, held[name], entries[name])]
    return lines or [f"the GPU launches what the ledger says, for {', '.join(both) or 'no recipe (none is in both)'}"]


# --------------------------------------------------------------------------------------------------------------- main


def due(names: Iterable[str], device: str, named: bool) -> list[str]:
    """Return the recipes to measure: those that were named, else those whose entry is of other sources."""
    held = read_ledger().get(device, {})
    return [n for n in names if named or n not in held or held[n]["fingerprint"] != fingerprint(n)]


def rows_of(entries: dict[str, Entry]) -> list[Row]:
    """Return the rows that every benchmark prints."""
    rows = []
    for name, entry in entries.items():
        rows.append(result(f"{name}: launches of a step", [total(entry["step"])], "launches"))
        rows.append(result(f"{name}: library calls of a step", [sum(entry["step"]["library"].values())], "calls"))
        if entry.get("generated_bytes") is not None:
            rows.append(result(f"{name}: generated traffic", [entry["generated_bytes"] / 1e6], "MB"))
    return rows


def main() -> None:
    """Measure what is due, recipe by recipe, and print the whole."""
    parser = argparse.ArgumentParser(prog="benchmarks/launches.py")
    parser.add_argument("recipes", nargs="*", help="recipes to measure in any case; default: all that are due")
    parser.add_argument("--cached", action="store_true", help="compile twice, the second time out of the caches")
    parser.add_argument("--quick", action="store_true", help="one cheap recipe, and the ledger is left alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    arguments = parser.parse_args()
    be_strict()
    try:
        entries = execute(arguments.recipes, arguments.quick, arguments.cached)
    except UserError as error:
        sys.exit(f"benchmarks/launches.py: {error}")
    report = report_of("launches", arguments.quick, rows_of(entries))
    show(report)
    if torch.cuda.is_available():
        print("\n".join(against_null(entries)), file=sys.stderr)
    if arguments.json:
        json.dump(report, sys.stdout, indent=1)
        print()


def execute(names: list[str], quick: bool, cached: bool = False) -> dict[str, Entry]:
    """Measure and return the device's entries by recipe; each is in the ledger as soon as it is known.

    A recipe whose step fails does not keep the others from being measured.

    Raises:
        UserError: a step failed.
    """
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else NULL
    measure = measure_gpu if gpu else partial(measure_null, cached=cached)
    if quick:
        return {name: measure(name) for name in QUICK}
    failed = []
    for name in due(names or RECIPES, device, bool(names)):
        print(f"launches: {name} on the {device}", file=sys.stderr)
        try:
            write_entry(device, measure(name))
        except UserError as error:
            failed.append(str(error))
    if failed:
        raise UserError("; ".join(failed))
    return read_ledger()[device]


if __name__ == "__main__":
    main()
