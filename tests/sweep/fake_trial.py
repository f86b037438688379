"""A trial's process without a training: takes ``fastcifar run``'s words, goes past epoch 1 once ``go`` is there.

It holds the run's lock to its end, as a training does.
"""

import sys
import time
from pathlib import Path

from fastcifar import interrupt
from fastcifar.config import load_recipe
from fastcifar.ladder.execute import Deadline
from fastcifar.ladder.rows import Job
from fastcifar.run_directory import RunDirectory
from tests.sweep.fakes import FakeRuns


def main(words: list[str]) -> None:
    folder = Path(words[words.index("--resume" if "--resume" in words else "--out") + 1])
    recipe = RunDirectory.open(folder).recipe if "--resume" in words else load_recipe(words[words.index("--out") - 1])

    def before_epoch(job, epoch):
        interrupt.stop_if_requested()
        while epoch == 2 and not (folder.parent / "go").exists():
            interrupt.stop_if_requested()
            time.sleep(0.02)

    folder.mkdir(parents=True, exist_ok=True)
    with interrupt.handled("stopped"), interrupt.deferred(), RunDirectory(folder).alone():
        try:
            FakeRuns(before_epoch)(Job(folder.name, 42, recipe, folder, {}, 0), Deadline(), lambda text: None)
        except interrupt.Interrupted as end:
            sys.exit(end.status)


if __name__ == "__main__":
    main(sys.argv[1:])
