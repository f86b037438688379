"""Generated text: tables in README.md and benchmarks/README.md, the ``# ours:`` line of every recipe, docs/keys.md.

- ``python -m tools.tables`` writes them from ``records/``, ``benchmarks/results/*.json`` and the recipes' models.
- ``python -m tools.tables --check`` ends with status 1 and a list where any is out of date.

`tools.records` adds records.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastcifar.analysis.statistics import difference
from fastcifar.config import CombineRecipe, Recipe
from fastcifar.errors import UserError, nearest
from fastcifar.ladder.metrics import NOT_MEASURED, Metrics, ours_in_words, recorded
from fastcifar.ladder.records import read_records, result_rows, tested
from fastcifar.ladder.rows import catalogue, ladder_rows
from fastcifar.run_directory import write_atomic
from tools.keys_page import keys_page

ROOT = Path(__file__).resolve().parents[1]
# Two sides of the benchmarks, as benchmarks/common.py labels them.
THEIR_LOOP = "our reimplementation of windopper/cifar's training loop"
THEIR_LOADER = "our reimplementation of windopper/cifar's DataLoader"
# What README.md tells of the benchmarks: file, row and baseline, in words. The rest is in benchmarks/README.md.
HEADLINES = [
    ("augment", "standard: fastcifar", f"standard: {THEIR_LOADER}, 4 workers", "crop, flip, rotate and normalize"),
    ("augment", "autoaugment: fastcifar", f"autoaugment: {THEIR_LOADER}, 4 workers", "AutoAugment and normalize"),
    ("augment", "autoaugment: fastcifar", "autoaugment: DALI auto_augment", "AutoAugment and normalize"),
    ("loaders", "resident: epochs of 50,000 cifar10 images", THEIR_LOADER, "loading, set on the device"),
    ("loaders", "ffcv: epochs of 50,000 cifar10 images", "stock ffcv", "loading from `.beton`"),
    ("loaders", "dali: epochs of 50,000 cifar10 images", "stock dali", "loading from WebDataset"),
    ("step", "lenet5", "bare PyTorch loop over tensors in memory", "training LeNet-5"),
    ("step", "deep-bn: eager", THEIR_LOOP, "training the deep baseline"),
    ("optimizer", "wrn16_8: flat against foreach", "foreach", "SGD and EMA of WRN-16-8"),
    ("optimizer", "deep_baseline_bn: flat against fused SGD", "fused SGD", "SGD and EMA of the deep baseline"),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.tables", description="Write the generated text.")
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    given = parser.parse_args(arguments)
    try:
        stale = out_of_date()
        if given.check:
            for path in stale:
                print(f"{path.relative_to(ROOT)} is out of date: run `make tables`", file=sys.stderr)
            return 1 if stale else 0
        for path, text in stale.items():
            write_atomic(path, text)
            print(f"wrote {path.relative_to(ROOT)}")
    except UserError as error:
        print(f"fastcifar: {error}", file=sys.stderr)
        return 2
    return 0


def out_of_date(root: Path = ROOT) -> dict[Path, str]:
    """Return the files whose generated text differs from the results, with the text that they should have."""
    wanted = dict(generated(root))
    return {path: text for path, text in wanted.items() if path.read_text(encoding="utf-8") != text}


def generated(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield each file that has generated parts, with the text that it should have."""
    results = result_rows(read_records(root / "records"))
    blocks = {"measured": measured_so_far(results), "ladder": ladder_table(results), "beyond": beyond_table(results)}
    blocks |= {"speed": speed_table(root), **benchmark_tables(root)}
    for page in (root / "README.md", root / "benchmarks" / "README.md"):
        if page.is_file():
            yield page, fill(page.read_text(encoding="utf-8"), blocks, page)
    if (root / "docs" / "keys.md").is_file():
        yield root / "docs" / "keys.md", keys_page()
    for name, recipe in catalogue().items():
        path = root / "recipes" / f"{name}.toml"
        if not name.startswith("smoke/"):
            yield path, with_ours(path.read_text(encoding="utf-8"), ours_in_words(recorded(recipe.name, results)))


def fill(text: str, blocks: dict[str, str], page: Path) -> str:
    """Put each block between its markers ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

    Raises:
        UserError: a marker without its partner, or of a table that there is not.
    """
    for name in re.findall(r"<!-- ([\w:-]+):begin -->", text):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if name not in blocks:
            raise UserError(f"{page}: {begin}: there is no such table{nearest(name, blocks)}")
        before, _, rest = text.partition(begin)
        if end not in rest:
            raise UserError(f"{page}: {begin} has no {end}")
        text = f"{before}{begin}\n{blocks[name]}\n{end}{rest.partition(end)[2]}"
    return text


def with_ours(text: str, ours: str) -> str:
    """Return a recipe's text with its line ``# ours:`` saying that."""
    return re.sub(r"^# ours: .*$", lambda _: f"# ours: {ours}", text, count=1, flags=re.MULTILINE)


# ------------------------------------------------------------------------------------------------------------- ladder


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def measured_so_far(results: list[dict[str, Any]]) -> str:
    """Return in a sentence how much of the ladder has been trained to the end, on what, and how it compares."""
    rows = ladder_rows()
    found = {name: recorded(catalogue()[name].name, results) for name in rows}
    complete = {name: by_hardware for name, by_hardware in found.items() if _complete(by_hardware)}
    if not complete:
        return f"Of these {len(rows)} rows none has been trained to the end here yet."
    measured_on = [(name, metrics) for name, by_hardware in complete.items() for metrics in by_hardware]
    where = "; ".join(dict.fromkeys(metrics.hardware for _, metrics in measured_on))
    published = {name: catalogue()[name].published for name in complete}
    ps = [tested(metrics, goal.model_dump())[0] for name, metrics in measured_on if (goal := published[name])]
    known = sorted(p for p in ps if p is not None)
    spread = f" The p-values against the published accuracies are {known[0]:.2f} to {known[-1]:.2f}." if known else ""
    return f"Of these {len(rows)} rows {len(complete)} have been trained to the end here so far, on {where}.{spread}"


def _complete(found: Sequence[Metrics]) -> bool:
    """Return whether a row was trained to the end; then all that `recorded` gives of it were."""
    return bool(found) and found[0].complete


def ladder_table(results: list[dict[str, Any]]) -> str:
    """Return the ladder: a table of the measured rows by hardware, in percent, then a line per stage of the others."""
    header = ("row", "what it is", "epochs", "published best (last)", "ours best (last)", "difference", "p", "measured")
    return _measured_first(header, ladder_rows(), results, _ladder_cells)


def beyond_table(results: list[dict[str, Any]]) -> str:
    """Return the same for the recipes beyond the ladder."""
    header = ("recipe", "what it is", "epochs", "target", "ours best (last)", "measured")
    return _measured_first(header, [n for n in catalogue() if n.startswith("beyond/")], results, _beyond_cells)


def _measured_first(
    header: Sequence[str], names: Sequence[str], results: list[dict[str, Any]],
    cells: Callable[[str, Metrics], list[str]],
) -> str:
    found = {name: recorded(catalogue()[name].name, results) for name in names}
    complete = {name: by_hardware for name, by_hardware in found.items() if _complete(by_hardware)}
    lines = [cells(name, metrics) for name, by_hardware in complete.items() for metrics in by_hardware]
    others = {name: next(iter(by_hardware), None) for name, by_hardware in found.items() if name not in complete}
    return "\n\n".join([*([markdown(header, lines)] if lines else []), *_unmeasured_lines(others)])


def _unmeasured_lines(found: dict[str, Metrics | None]) -> list[str]:
    """Return, as one paragraph of Markdown, a line per stage of rows that have not been trained to the end."""
    by_stage: dict[str, list[str]] = {}
    for name, metrics in found.items():
        by_stage.setdefault(catalogue()[name].stage, []).append(_unmeasured(name, metrics))
    lines = [f"- {stage.lstrip('0123456789 ').capitalize()}: {', '.join(rows)}" for stage, rows in by_stage.items()]
    head = f"{NOT_MEASURED.capitalize()}, with what was published or is the target:\n"
    return ["\n".join([head, *lines])] if lines else []


def _unmeasured(name: str, metrics: Metrics | None) -> str:
    goal = _goal(catalogue()[name])
    link = f"[`{name.removeprefix('beyond/')}`](recipes/{name}.toml)" + ("" if goal == "none" else f" {goal}")
    if metrics is None:
        return link
    return f"{link} (ours {metrics.last} last after {metrics.epochs_done} of {metrics.epochs} epochs)"


def _goal(recipe: Recipe | CombineRecipe) -> str:
    """Return the published best (last), else the target, else ``none``."""
    published, target = recipe.published, getattr(recipe, "target", None)
    if published:
        return f"{published.best:.2f}" + (f" ({published.last:.2f})" if published.last else "")
    return f"{target:.2f}" if target else "none"


def _ladder_cells(name: str, metrics: Metrics) -> list[str]:
    recipe = catalogue()[name]
    published = recipe.published
    p, test = tested(metrics, published.model_dump() if published else None)
    return [
        f"[`{name}`](recipes/{name}.toml)",
        recipe.title,
        _epochs(recipe),
        _goal(recipe),
        best_and_last(metrics),
        str(difference(metrics.best, published.best if published else None) or "none"),
        test if p is None else f"{p:.3f}",
        measured(metrics),
    ]


def _beyond_cells(name: str, metrics: Metrics) -> list[str]:
    recipe = catalogue()[name]
    return [
        f"[`{name}`](recipes/{name}.toml)",
        recipe.title,
        _epochs(recipe),
        _goal(recipe),
        best_and_last(metrics),
        measured(metrics),
    ]


def _epochs(recipe: Recipe | CombineRecipe) -> str:
    return f"{len(recipe.combine.members)} models" if isinstance(recipe, CombineRecipe) else str(recipe.train.epochs)


def best_and_last(metrics: Metrics) -> str:
    """Return ``best (last)``, each with its standard error where there are several seeds, and what TTA makes of it."""
    augmented = f"; {metrics.tta} with TTA" if metrics.tta else ""
    return f"{metrics.best or 'none'} ({metrics.last}){augmented}"


def measured(metrics: Metrics) -> str:
    """Return how many seeds ran, in which precision if they say, on what, and when."""
    seeds = "1 seed" if metrics.n == 1 else f"{metrics.n} seeds"
    precision = f" in {metrics.precision}" if metrics.precision else ""
    return f"{seeds}{precision}, {metrics.hardware}, {metrics.date}"


# --------------------------------------------------------------------------------------------------------- benchmarks


def benchmark_tables(root: Path) -> dict[str, str]:
    """Return a table per benchmark, named ``bench:NAME``: the newest full result on each hardware.

    An unfinished one is shown where there is no complete one.
    """
    from fastcifar.cli.bench import NAMES

    reports = list(_reports(root / "benchmarks" / "results"))
    commands = {name: name for name in NAMES} | {"time-to-accuracy-contract": "time-to-accuracy --contract"}
    # A report bears its file's name, a command its hyphens.
    by_name = {n: [r for r in reports if r["benchmark"].replace("_", "-") == n] for n in commands}
    tables = {f"bench:{name}": _benchmark(commands[name], found) for name, found in by_name.items()}
    return tables | {"bench:launches": launches_table(root)}


def _reports(folder: Path) -> Iterator[dict[str, Any]]:
    from fastcifar.cli.bench import OWN_FILES
    from fastcifar.cli.bench import read_results as read_benchmarks

    for path in sorted(folder.glob("*.json")):
        if path.name not in OWN_FILES.values():
            yield from (report for report in read_benchmarks(path)["benchmarks"] if not report.get("quick"))


def _benchmark(name: str, reports: list[dict[str, Any]]) -> str:
    if not reports:
        return f"{NOT_MEASURED}: `fastcifar bench {name}`"
    newest = {_what(report): report for report in sorted(reports, key=_worth)}
    return "\n\n".join(_benchmark_table(report) for report in newest.values())


def _what(report: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return what a newer report has to share with an older one to stand in its place: hardware, recipes asked for."""
    from fastcifar.cli.bench import recipes_of

    return report["environment"]["hardware"], recipes_of(report)


def speed_table(root: Path) -> str:
    """Return the table of the `HEADLINES`: a line for each and for each hardware that measured it."""
    reports, cells = sorted(_reports(root / "benchmarks" / "results"), key=_worth), []
    for file, name, baseline, words in HEADLINES:
        newest = {_what(r): r for r in reports if r["benchmark"] == file}
        found = [
            [words, baseline.split(": ")[-1], f"{_number(row['value'])} {row['unit']}", _times(row), on]
            for (on, _), report in newest.items()
            for row in report["results"]
            if (row["name"], row["baseline"]) == (name, baseline)
        ]
        cells += found or [[words, baseline.split(": ")[-1], NOT_MEASURED, NOT_MEASURED, NOT_MEASURED]]
    return markdown(("what", "against", "ours", "times faster", "on"), cells)


LAUNCHES_HEADER = (
    "recipe", "batch", "launches a step", "generated, own, ATen, copies", "library calls", "generated traffic",
    "evaluation of a batch", "peak memory", "kernels", "most registers", "compile", "from the caches",
)  # fmt: skip


def launches_table(root: Path) -> str:
    """Return the ledger of launches: a table for each device that counted them."""
    path = root / "benchmarks" / "results" / "launches.json"
    if not path.is_file():
        return f"{NOT_MEASURED}: `fastcifar bench launches`"
    devices = json.loads(path.read_text(encoding="utf-8"))["devices"]
    tables = []
    for device, entries in devices.items():
        versions = sorted({f"torch {e['torch']}, triton {e['triton']}" for e in entries.values()})
        table = markdown(LAUNCHES_HEADER, [_launches_cells(entry) for entry in entries.values()])
        tables.append(f"{device}, {'; '.join(versions)}\n\n{table}")
    return "\n\n".join(tables)


def _launches_cells(entry: dict[str, Any]) -> list[str]:
    step, evaluation = entry["step"], entry["evaluation"]
    parts = [f"{step['launches'].get(kind, 0):,}" for kind in ("generated", "own", "aten", "copy")]
    moved, compiled, cached = (entry.get(key) for key in ("generated_bytes", "compile_cpu_s", "cached_cpu_s"))
    return [
        f"`{entry['recipe']}`" + (f" ({entry['mode']})" if entry["fallback"] else ""),
        str(entry["batch_size"]),
        f"{sum(step['launches'].values()):,}",
        ", ".join(parts),
        f"{sum(step['library'].values()):,}",
        NOT_MEASURED if moved is None else f"{_number(moved / 1e6)} MB",
        f"{sum(evaluation['launches'].values()):,} and {sum(evaluation['library'].values()):,} library",
        f"{entry['peak_bytes'] / 1e9:.3g} GB",
        str(entry.get("kernels", NOT_MEASURED)),
        str(entry.get("registers", NOT_MEASURED)),
        NOT_MEASURED if compiled is None else f"{_number(compiled)} CPU s",
        NOT_MEASURED if cached is None else f"{_number(cached)} CPU s",
    ]


def _times(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} ({_span(row['ratio_spread'])})"


def _date(report: dict[str, Any]) -> str:
    return str(report["environment"]["date"])


def _worth(report: dict[str, Any]) -> tuple[bool, str]:
    """Return what decides between two reports of the same: a complete one before an unfinished one, then the newer."""
    from fastcifar.cli.bench import is_complete

    return is_complete(report), _date(report)


def _benchmark_table(report: dict[str, Any]) -> str:
    environment = report["environment"]
    rows = [
        [row["name"], f"{_number(row['value'])} {row['unit']}", _span(row["spread"]), str(row["n"]), _ratio(row)]
        for row in report["results"]
    ]
    torch = environment.get("packages", {}).get("torch", "unknown")
    head = f"{environment['hardware']}, torch {torch}, {_date(report)[:10]}"
    return f"{head}\n\n{markdown(('what', 'median', 'spread', 'n', 'times faster than'), rows)}"


def _number(value: float) -> str:
    """Return four digits, and whole numbers from 1,000 on: ``0.1685``, ``289,712``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _span(pair: list[float]) -> str:
    return f"{_number(pair[0])} to {_number(pair[1])}"


def _ratio(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return "no comparison"
    return f"{_times(row)} {row['baseline']}"


if __name__ == "__main__":
    sys.exit(main())
