"""A row's process without a training: ``python -m tests.ladder.fake_row ROW SEED OUT`` writes a real run directory.

It says in OUT/<pid>.json what share of the machine it was given, and goes on after epoch 1 only when OUT/go is there.
"""

import json
import os
import sys
import time
from pathlib import Path

from fastcifar import interrupt
from fastcifar.ladder.rows import Job, catalogue, run_folder
from tests.ladder.fakes import FakeRows

SHARE = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def main(row: str, seed: str, out: Path) -> None:
    def before_epoch(job, epoch):
        interrupt.stop_if_requested()
        while epoch == 2 and not (out / "go").exists():
            interrupt.stop_if_requested()
            time.sleep(0.02)

    recipe = catalogue()[row].model_copy(update={"seed": int(seed)})
    job = Job(row, int(seed), recipe, run_folder(out, row, int(seed)), {}, 0)  # a real cost needs torch
    (out / f"{os.getpid()}.json").write_text(json.dumps({name: os.environ.get(name) for name in SHARE}))
    with interrupt.handled("stopped"), interrupt.deferred():
        try:
            FakeRows(before_epoch)(job, None, lambda text: None)
        except interrupt.Interrupted as end:
            sys.exit(end.status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
