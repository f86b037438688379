"""The process that runs on the null device: ``python -m tests.nullgpu.child FOLDER``; see harness.py.

It executes the jobs of ``FOLDER/jobs.json`` one after the other and pickles a report of each.
"""

import json
import os
import pickle
import sys
import threading
import time
import warnings
from pathlib import Path


def main(folder: Path) -> None:
    """Execute the jobs; stop quietly where one of them ends the process."""
    warnings.filterwarnings("ignore")
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
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


def end_with_parent(parent: int) -> None:
    """End this process when the one that started it is gone, and with it the deadline."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
