"""What `make storm` found last: one row for each subject in docs/storm.json, and as a table in docs/robustness.md.

A subject that was run with its full count replaces its row; the others stay, each with its own seed, day and machine.
"""

import json
import time
from pathlib import Path
from typing import Any

from fastcifar.environment import cpu_name, git_revision
from fastcifar.run_directory import write_atomic, write_json
from tests.storm.tally import Tally, aligned

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- storm:begin -->", "<!-- storm:end -->"


def record(tally: Tally, seed: int, seconds: float, docs: Path = DOCS) -> None:
    """Keep what became of a subject, and write the table anew."""
    path = docs / "storm.json"
    rows = json.loads(path.read_text()) if path.is_file() else {}
    rows[tally.subject] = {
        "tried": tally.tried, "refused": tally.refused, "survived": tally.survived, "failed": tally.failed,
        "reached": tally.reached, "seed": seed, "seconds": round(seconds), "date": time.strftime("%Y-%m-%d"),
        "machine": cpu_name(), "git": git_revision(),
    }  # fmt: skip
    write_json(path, rows)
    page = docs / "robustness.md"
    text = page.read_text()
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    write_atomic(page, f"{text[:before]}\n{written(rows)}\n{text[after:]}")


def written(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, and below it what each subject reached."""
    head = ["subject", "tried", "refused", "survived", "failed", "seed", "minutes", "on"]
    table = [head]
    for subject, row in rows.items():
        counts = [f"{row[key]:,}" for key in head[1:5]]
        minutes, where = f"{row['seconds'] / 60:.0f}", f"{row['machine']}, {row['date']}"
        table.append([subject, *counts, str(row["seed"]), minutes, where])
    reached = [
        f"- {subject}: " + ", ".join(f"{what} {count:,}" for what, count in sorted(row["reached"].items()))
        for subject, row in rows.items() if row["reached"]
    ]  # fmt: skip
    return "\n".join([aligned(table, numbers=range(1, 7)), *(["", *reached] if reached else [])])
