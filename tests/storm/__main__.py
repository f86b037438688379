"""``make storm``: thousands of bad inputs against fastcifar, then one table: tried, refused, survived, failed.

    python -m tests.storm [SUBJECT...] [--seed N] [--count N]

A subject is a module of this package with ``COUNT`` (how many inputs, unless ``--count`` says otherwise) and
``storm(tally, seed, count)``. The seed is printed; the same seed gives the same inputs. Ends with status 1 where
anything failed. With its full count, a subject's row in docs/robustness.md is written anew.
"""

import argparse
import importlib
import secrets
import sys
import time
from typing import Any

from tests.storm import results
from tests.storm.tally import Tally, report

SUBJECTS: tuple[str, ...] = ("recipes", "stores", "run_directories", "resumes", "kills", "signals", "full_disks")


def main(arguments: list[str] | None = None) -> int:
    """Run the subjects that were asked for (all by default); return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)}; default: all")
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one, printed")
    parser.add_argument("--count", type=int, default=None, help="inputs per subject; default: each subject's own")
    given = parser.parse_args(arguments)
    if unknown := set(given.subjects) - set(SUBJECTS):
        parser.error(f"no such subject: {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    seed = secrets.randbelow(2**32) if given.seed is None else given.seed
    print(f"storm: seed {seed}", file=sys.stderr, flush=True)
    tallies = [_storm(name, seed, given.count) for name in given.subjects or SUBJECTS]
    report(tallies)
    return 1 if any(tally.failed for tally in tallies) else 0


def _storm(name: str, seed: int, count: int | None) -> Tally:
    module: Any = importlib.import_module(f"tests.storm.{name}")
    tally, began = Tally(name.replace("_", " ")), time.monotonic()
    module.storm(tally, seed, module.COUNT if count is None else count)
    seconds = time.monotonic() - began
    print(f"storm: {tally.subject}: {seconds:.0f} s", file=sys.stderr, flush=True)
    if count is None:
        results.record(tally, seed, seconds)
    return tally


if __name__ == "__main__":
    sys.exit(main())
