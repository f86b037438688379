"""The process that runs on the null device: ``python -m tests.nullgpu.child FOLDER``; see harness.py.

It carries out the jobs of ``FOLDER/jobs.json`` one after the other and pickles a report of each.
"""

import json
import pickle
import sys
import warnings
from pathlib import Path


def main(folder: Path) -> None:
    """Carry out the jobs; stop quietly where one of them ends the process."""
    warnings.filterwarnings("ignore")
    from tests.nullgpu import internals, nullops, observe, scenarios

    settings = json.loads((folder / "jobs.json").read_text())
    nullops.install()
    observe.watch_inductor()
    if settings["one_configuration"]:
        observe.compile_one_configuration()
    internals.watch(observe.mark)
    for number, job in enumerate(settings["jobs"]):
        scenario = getattr(scenarios, job["scenario"])
        report = observe.observe(lambda s=scenario, j=job: s(**j["arguments"]), folder / f"log-{number}.tsv")
        part = folder / f"report-{number}.part"
        part.write_bytes(pickle.dumps(report))
        part.replace(folder / f"report-{number}.pickle")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
