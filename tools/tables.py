"""Generated text: tables in README.md and benchmarks/README.md and the ``# ours:`` line of every recipe.

- ``python -m tools.tables`` writes them from ``benchmarks/results/*.json``.
- ``python -m tools.tables --check`` ends with status 1 and a list where any is out of date.
- ``python -m tools.tables add RUN_DIR...`` takes results of ladder runs into ``benchmarks/results/ladder.json``.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastcifar.config import CombineRecipe, Recipe
from fastcifar.errors import UserError, nearest
from fastcifar.ladder.metrics import (
    NOT_MEASURED,
    RESULTS,
    Metrics,
    difference,
    ours_in_words,
    read_results,
    recorded,
)
from fastcifar.ladder.rows import catalogue, ladder_rows
from fastcifar.ladder.state import result_row
from fastcifar.run_directory import RunDirectory, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
# What may differ from the shipped recipe without making a run one of other settings: how it is carried out, not what.
CARRYING_OUT = {"name", "title", "stage", "published", "target", "seed", "engine", "eval", "checkpoint"}
RESULT_KEYS = ["last", "best", "selected", "epochs_done", "epochs", "hardware", "date", "training_s", "images_per_s"]
RESULT_KEYS += ["git", "complete"]
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
    """Carry out the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.tables", description="Write the generated text.")
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add", help="take the results of ladder runs into benchmarks/results/ladder.json")
    adding.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    given = parser.parse_args(arguments)
    try:
        if given.command == "add":
            add(given.runs)
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
    results = read_results(root / "benchmarks" / "results" / RESULTS.name)
    blocks = {"ladder": ladder_table(results), "beyond": beyond_table(results), "speed": speed_table(root)}
    blocks |= benchmark_tables(root)
    for page in (root / "README.md", root / "benchmarks" / "README.md"):
        if page.is_file():
            yield page, fill(page.read_text(encoding="utf-8"), blocks, page)
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


def ladder_table(results: list[dict[str, Any]]) -> str:
    """Return the table of the ladder's rows: published and own accuracies in percent."""
    header = ("row", "what it is", "epochs", "published best (last)", "ours best (last)", "difference", "measured")
    return markdown(header, [_ladder_cells(name, results) for name in ladder_rows()])


def _ladder_cells(name: str, results: list[dict[str, Any]]) -> list[str]:
    recipe = catalogue()[name]
    published, metrics = recipe.published, recorded(recipe.name, results)
    best = published.best if published else None
    goal = f"{best:.2f}" + (f" ({published.last:.2f})" if published and published.last else "")
    return [
        f"[`{name}`](recipes/{name}.toml)",
        recipe.title,
        _epochs(recipe),
        goal,
        best_and_last(metrics),
        str((difference(metrics.best, best) if metrics and metrics.complete else None) or NOT_MEASURED),
        measured(metrics),
    ]


def beyond_table(results: list[dict[str, Any]]) -> str:
    """Return the table of the recipes beyond the ladder."""
    rows = [(name, recipe) for name, recipe in catalogue().items() if name.startswith("beyond/")]
    cells = [
        [
            f"[`{name}`](recipes/{name}.toml)",
            recipe.title,
            _epochs(recipe),
            f"{recipe.target:.2f}" if isinstance(recipe, Recipe) and recipe.target else "none",
            best_and_last(recorded(recipe.name, results)),
            measured(recorded(recipe.name, results)),
        ]
        for name, recipe in rows
    ]
    return markdown(("recipe", "what it is", "epochs", "target", "ours best (last)", "measured"), cells)


def _epochs(recipe: Recipe | CombineRecipe) -> str:
    return f"{len(recipe.combine.members)} models" if isinstance(recipe, CombineRecipe) else str(recipe.train.epochs)


def best_and_last(metrics: Metrics | None) -> str:
    """Return ``best (last)``, each with its standard error where there are several seeds."""
    if metrics is None:
        return NOT_MEASURED
    if not metrics.complete:
        return f"{NOT_MEASURED} ({metrics.last} last after {metrics.epochs_done} of {metrics.epochs} epochs)"
    return f"{metrics.best or 'none'} ({metrics.last})"


def measured(metrics: Metrics | None) -> str:
    """Return how many seeds ran, on what, and when."""
    if metrics is None:
        return NOT_MEASURED
    seeds = "1 seed" if metrics.n == 1 else f"{metrics.n} seeds"
    return f"{seeds}, {metrics.hardware}, {metrics.date}"


# --------------------------------------------------------------------------------------------------------- benchmarks


def benchmark_tables(root: Path) -> dict[str, str]:
    """Return a table per benchmark, named ``bench:NAME``: the newest full result on each hardware."""
    from fastcifar.cli.bench import NAMES

    reports = list(_reports(root / "benchmarks" / "results"))
    # A report bears its file's name, a command its hyphens.
    by_name = {n: [r for r in reports if r["benchmark"].replace("_", "-") == n] for n in NAMES}
    tables = {f"bench:{name}": _benchmark(name, found) for name, found in by_name.items()}
    return tables | {"bench:launches": launches_table(root)}


def _reports(folder: Path) -> Iterator[dict[str, Any]]:
    from fastcifar.cli.bench import OWN_FILES
    from fastcifar.cli.bench import read_results as read_benchmarks

    for path in sorted(folder.glob("*.json")):
        if path.name not in (RESULTS.name, *OWN_FILES.values()):
            yield from (report for report in read_benchmarks(path)["benchmarks"] if not report.get("quick"))


def _benchmark(name: str, reports: list[dict[str, Any]]) -> str:
    if not reports:
        return f"{NOT_MEASURED}: `fastcifar bench {name}`"
    newest = {report["environment"]["hardware"]: report for report in sorted(reports, key=_date)}
    return "\n\n".join(_benchmark_table(report) for report in newest.values())


def speed_table(root: Path) -> str:
    """Return the table of the `HEADLINES`: a line for each and for each hardware that measured it."""
    reports, cells = sorted(_reports(root / "benchmarks" / "results"), key=_date), []
    for file, name, baseline, words in HEADLINES:
        newest = {r["environment"]["hardware"]: r for r in reports if r["benchmark"] == file}
        found = [
            [words, baseline.split(": ")[-1], f"{_number(row['value'])} {row['unit']}", _times(row), on]
            for on, report in newest.items()
            for row in report["results"]
            if (row["name"], row["baseline"]) == (name, baseline)
        ]
        cells += found or [[words, baseline.split(": ")[-1], NOT_MEASURED, NOT_MEASURED, NOT_MEASURED]]
    return markdown(("what", "against", "ours", "times faster", "on"), cells)


LAUNCHES_HEADER = (
    "recipe", "batch", "launches a step", "generated, own, ATen, copies", "library calls", "generated traffic",
    "evaluation of a batch", "peak memory", "kernels", "most registers", "compile",
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
    moved, compiled = entry.get("generated_bytes"), entry.get("compile_cpu_s")
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
    ]


def _times(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} ({_span(row['ratio_spread'])})"


def _date(report: dict[str, Any]) -> str:
    return str(report["environment"]["date"])


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


# ---------------------------------------------------------------------------------------------------------------- add


def add(folders: Sequence[Path], path: Path = RESULTS) -> None:
    """Take the results of runs into the results file; a run of the same row and seed takes the older one's place.

    Raises:
        UserError: not an ended run, not of a shipped recipe, or of other settings than that recipe has.
    """
    added = [entry_of(RunDirectory.open(folder)) for folder in folders]
    keys = {(row["id"], row["seed"]) for row in added}
    kept = [row for row in read_results(path) if (row["id"], row["seed"]) not in keys]
    order = [recipe.name for recipe in catalogue().values()]
    rows = sorted([*kept, *added], key=lambda row: (order.index(row["id"]), row["seed"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"rows": rows})


def entry_of(run: RunDirectory) -> dict[str, Any]:
    """Return a run's entry of the results file; accuracies in percent.

    Raises:
        UserError: as `add`.
    """
    shipped = {r.name: r for name, r in catalogue().items() if not name.startswith("smoke/")}
    name = run.recipe.name
    if name not in shipped:
        raise UserError(f'{run.folder}: is a run of "{name}", which is no row{nearest(name, shipped)}')
    # The loader decides how images arrive, not which.
    changed = [key for key in differences(run.recipe, shipped[name]) if key != "data.loader"]
    if changed:
        raise UserError(f"{run.folder}: is no result of {name}, for it differs from the recipe in {', '.join(changed)}")
    row = result_row(run)
    return {"id": name, "seed": run.summary["seed"], **{key: row[key] for key in RESULT_KEYS}}


def differences(one: Recipe | CombineRecipe, other: Recipe | CombineRecipe) -> list[str]:
    """Return the key paths in which two recipes differ in what is trained, two levels deep."""
    a, b = one.model_dump(exclude=CARRYING_OUT), other.model_dump(exclude=CARRYING_OUT)
    found = []
    for key in {**a, **b}:
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += [f"{key}.{inner}" for inner in {**x, **y} if x.get(inner) != y.get(inner)]
        elif x != y:
            found.append(key)
    return found


if __name__ == "__main__":
    sys.exit(main())
