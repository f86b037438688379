"""Records of ladder runs, written from run directories.

``python -m tools.records add RUN_DIR...`` takes ended runs into ``records/<date>-<row>-<hardware>/`` and writes the
generated tables anew.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fastcifar.config import Recipe
from fastcifar.config.shipped import differences
from fastcifar.errors import UserError, nearest
from fastcifar.ladder.records import FILES, NAME, Record, SeedResult, read_records, record_of
from fastcifar.ladder.rows import catalogue
from fastcifar.ladder.state import result_row
from fastcifar.locations import records_folder
from fastcifar.run_directory import RunDirectory, write_json
from tools import tables

Results = dict[int, tuple[RunDirectory, SeedResult]]
"""Runs of one row on one kind of hardware, and what they came to, by seed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.records", description="Keep the records of ladder runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="take ended runs into records/, and write the tables anew")
    adding.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    given = parser.parse_args(arguments)
    try:
        for folder in add(given.runs):
            print(f"wrote {folder.name}")
    except UserError as error:
        print(f"fastcifar: {error}", file=sys.stderr)
        return 2
    return tables.main([])


def add(folders: Sequence[Path], root: Path | None = None) -> list[Path]:
    """Take runs into records, one per row and hardware, and return the records' folders.

    A run joins the record that its row has on its hardware, in the place of a run of the same seed that got no further
    and is no newer; the record's folder then bears the date of its newest run. Nothing is written unless every run is
    accepted.

    Args:
        folders: run directories.
        root: where the records are; None for the repository's own.

    Raises:
        UserError: not an ended run, not of a shipped recipe, of other settings than that recipe has, of a revision
            that is dirty or unknown, of several revisions or kinds of hardware, the second of its row, hardware and
            seed, or of less worth than the recorded one.
    """
    root = root or records_folder()
    groups = grouped([RunDirectory.open(folder) for folder in folders])
    held = {(record.row, record.hardware): record for record in read_records(root)}
    for key in groups.keys() & held.keys():
        refuse_lesser(groups[key], held[key])
    return [_write(root, key, group, held.get(key)) for key, group in groups.items()]


def grouped(runs: Sequence[RunDirectory]) -> dict[tuple[str, str], Results]:
    """Return the runs and what they came to, by row and hardware.

    Raises:
        UserError: as `add`.
    """
    groups: dict[tuple[str, str], Results] = {}
    for run in runs:
        row, hardware, result = checked_row(run), hardware_of(run), seed_result(run)
        group = groups.setdefault((row, hardware), {})
        if result.seed in group:
            raise UserError(
                f"{run.folder}: is a run of {row} with seed {result.seed} on {hardware}, as "
                f"{group[result.seed][0].folder} is; add only one of them"
            )
        group[result.seed] = run, result
    return groups


def refuse_lesser(group: Results, old: Record) -> None:
    """Refuse to put a run in the place of one that got further, or as far at a later date.

    Raises:
        UserError: one would be.
    """
    for held in old.seeds:
        run, result = group.get(held.seed, (None, held))
        if run and result.rank < held.rank:
            raise UserError(
                f"{run.folder}: ended {_progress(result)}, but the record {old.folder_name} has a run of seed "
                f"{held.seed} that ended {_progress(held)}; leave this one away"
            )


def _progress(seed: SeedResult) -> str:
    return f"after {seed.epochs_done} of {seed.epochs} epochs on {seed.date}"


def _write(root: Path, key: tuple[str, str], group: Results, old: Record | None) -> Path:
    row, hardware = key
    seeds = {seed.seed: seed for seed in old.seeds} if old else {}
    seeds |= {number: seed for number, (_, seed) in group.items()}
    recipe = next(recipe for recipe in catalogue().values() if recipe.name == row)
    published = recipe.published.model_dump() if recipe.published else None
    record = record_of(row, hardware, published, seeds.values())
    folder = root / record.folder_name
    if old and old.folder_name != record.folder_name:
        (root / old.folder_name).rename(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for run, seed in group.values():
        _copy(run, folder / f"seed-{seed.seed}", [name for name in FILES if name not in seed.absent])
    write_json(folder / NAME, record.model_dump())
    return folder


def _copy(run: RunDirectory, folder: Path, names: Sequence[str]) -> None:
    """Copy files of a run, in the place of those of an older run of the same seed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in names:
        shutil.copyfile(run.folder / name, folder / name)


def checked_row(run: RunDirectory) -> str:
    """Return the name of the row that a run is a result of.

    Raises:
        UserError: as `add`.
    """
    shipped = {r.name: r for name, r in catalogue().items() if not name.startswith("smoke/")}
    name = run.recipe.name
    if name not in shipped:
        raise UserError(f'{run.folder}: is a run of "{name}", which is no row{nearest(name, shipped)}')
    if changed := differences(run.recipe, shipped[name]):
        raise UserError(f"{run.folder}: is no result of {name}, for it differs from the recipe in {', '.join(changed)}")
    return name


def hardware_of(run: RunDirectory) -> str:
    """Return what a run ran on.

    Raises:
        UserError: its environment does not say, or it went on on other hardware.
    """
    hardware = run.environment.get("hardware")
    if not hardware:
        raise UserError(f"{run.folder}: environment.json does not name the hardware; train the run again")
    refuse_change(run, "hardware", str(hardware))
    return str(hardware)


def refuse_change(run: RunDirectory, key: str, begun: str) -> None:
    """Refuse a run that went on with other code or on other hardware than it began with.

    Raises:
        UserError: it did.
    """
    for place in run.environment.get("resumed", []):
        if place.get(key) != begun:
            raise UserError(
                f"{run.folder}: began with {key} {begun} and went on after epoch {place['epochs_done']} with "
                f"{place.get(key) or 'an unknown one'}; a record is of one: train it again"
            )


def seed_result(run: RunDirectory) -> SeedResult:
    """Return what a run came to, accuracies in percent.

    Raises:
        UserError: its git revision is unknown or dirty, or it went on with another one.
    """
    row = result_row(run)
    git = clean_revision(run, row["git"])
    refuse_change(run, "git", git)
    kept = {key: row[key] for key in SeedResult.model_fields if key not in ("seed", "git", "precision", "absent")}
    absent = [name for name in FILES if not (run.folder / name).is_file()]
    told = run.recipe.engine.precision if isinstance(run.recipe, Recipe) else "auto"
    precision = run.environment.get("precision") if told == "auto" else told
    return SeedResult(seed=run.summary["seed"], git=git, precision=precision, absent=absent, **kept)


def clean_revision(run: RunDirectory, git: str | None) -> str:
    """Return a run's git revision where it says which code ran.

    Raises:
        UserError: it is unknown, or files differed from it.
    """
    if not git:
        raise UserError(f"{run.folder}: its git revision is unknown; train it in a clone with its history")
    if git.endswith("+"):
        raise UserError(f"{run.folder}: files differed from its git revision {git}; commit them and train it again")
    if not re.fullmatch(r"[0-9a-f]{7,40}", git):
        raise UserError(f"{run.folder}: its git revision {json.dumps(git)[:60]} is none; train it again in a clone")
    return git


if __name__ == "__main__":
    sys.exit(main())
