"""One run on several devices: starting its ranks, finding out which one this process is, and ending them together.

A rank is a process with a device of its own. torchrun starts them, or `launch`, which is torchrun's elastic agent used
as a library (``fastcifar run RECIPE --devices N``). Either way each rank runs the same command and finds its number in
the environment. What the ranks do together is in `fastcifar.train.ranks`.

Whatever ends a run ends all of it, with one message: `one_voice` lets the first rank that fails speak, and the agent
ends the others. torch is imported only where there are ranks.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcifar import interrupt
from fastcifar.errors import UserError

LOST = 75
"""The exit status of a rank that ended because another one did."""
LINGER_S = 20
"""How long such a rank waits to be ended by its agent, so that the agent sees who failed first."""
HINT = "FASTCIFAR_LAUNCH_HINT"
"""The file, made by `launch`, in which rank 0 says how to go on with the run."""


class LostRankError(Exception):
    """Another rank of the run has ended, so that this one cannot go on."""


@dataclass(frozen=True)
class Place:
    """Which of the ranks this process is.

    Attributes:
        rank: 0..world-1.
        world: how many there are, on all machines together.
        local_rank: which one of this machine, the number of its GPU.
        restarts: how often the agent has started the ranks anew.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    restarts: int = 0


def place() -> Place:
    """Return the place that torchrun (or whoever started the ranks) has written into the environment."""
    values = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")]
    rank, world, local_rank, restarts = (int(value) if value.isdecimal() else 0 for value in values)
    if world < 2 or not os.environ.get("MASTER_ADDR"):
        return Place(restarts=restarts)
    return Place(rank, world, local_rank, restarts)


# ------------------------------------------------------------------------------------------------------------ starting


def launch(devices: int, words: list[str]) -> None:
    """Run ``fastcifar WORDS`` as so many ranks on this machine; returns when all have ended well.

    Args:
        devices: number of ranks.
        words: the command's arguments, without ``--devices``.

    Raises:
        SystemExit: a rank failed and has said why.
        UserError: a rank was killed.
        Interrupted: a signal came; the run is saved.
    """
    import logging

    logging.disable(logging.CRITICAL)  # what the agent would say is said here, in one line
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="fastcifar-launch-") as folder, _environment(devices, Path(folder)) as hint:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=devices, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            run_id="fastcifar", max_restarts=0, local_addr="localhost", logs_specs=DefaultLogsSpecs(log_dir=folder),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", "fastcifar", *words)
        except SignalException as error:
            raise interrupt.Interrupted(f"{error.sigval.name}: stopped{_how_to_go_on(hint)}", error.sigval) from None
        except ChildFailedError as error:
            _end(dict(error.failures), hint)


@contextmanager
def _environment(devices: int, folder: Path) -> Iterator[Path]:
    """Tell the ranks how many threads each may use, and where to say how to go on; yields that file."""
    hint, cores = folder / "hint", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(max(1, (cores or 1) // devices))
    added = {HINT: str(hint)} | {
        name: threads for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS") if name not in os.environ
    }
    os.environ.update(added)
    try:
        yield hint
    finally:
        for name in added:
            del os.environ[name]


def _end(failures: dict[int, Any], hint: Path) -> None:
    """End the launching process as its ranks ended."""
    rank, first = min(failures.items(), key=lambda item: (item[1].exitcode == LOST, item[1].timestamp))
    status = first.exitcode
    if status < 0:
        name = signal.Signals(-status).name
        raise UserError(f"rank {rank} was killed by {name}, and the run ended with it{_how_to_go_on(hint)}")
    if status - 128 in set(signal.Signals):
        name = signal.Signals(status - 128).name
        raise interrupt.Interrupted(f"{name}: stopped{_how_to_go_on(hint)}", status - 128)
    if status == LOST:
        raise UserError(f"rank {rank} lost the others{_how_to_go_on(hint)}")
    raise SystemExit(status)


def _how_to_go_on(hint: Path) -> str:
    with suppress(OSError):
        return f"; {hint.read_text()}"
    return ""


# ------------------------------------------------------------------------------------------------------------- a rank


@contextmanager
def one_voice(here: Place) -> Iterator[Any]:
    """Join the store of the ranks (yielded; None where there is one process) and see to it that one of them speaks.

    Within the block an error is raised on the rank that came upon one first; the others end without a word, as do those
    that only lost the connection to it. A signal is spoken of by rank 0, or by `launch`.

    Raises:
        UserError: what the block raised, with the number of the rank where that is not 0; the ranks cannot meet.
        SystemExit: another rank has spoken.
    """
    if here.world == 1:
        yield None
        return
    from torch.distributed import PrefixStore

    if here.rank or HINT in os.environ:
        interrupt.be_silent()
    store = meet(here)
    try:
        yield store
    except interrupt.Interrupted as error:
        if here.rank or HINT in os.environ:
            raise SystemExit(error.status) from None
        raise
    except Exception as error:
        if is_lost(error):
            _linger()
            raise SystemExit(LOST) from None
        if PrefixStore("fastcifar", store).add("spoken", 1) > 1:
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        if here.rank and isinstance(error, UserError):
            raise UserError(f"rank {here.rank}: {error}") from None
        raise


def meet(here: Place) -> Any:
    """Return the store of the ranks, which rank 0 serves at ``MASTER_ADDR`` and ``MASTER_PORT``.

    Raises:
        UserError: ``MASTER_PORT`` is no port or another program's, or nobody answers at the address.
    """
    from torch.distributed import DistError, rendezvous

    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    refuse_port(port)
    try:
        store, _, _ = next(rendezvous("env://", here.rank, here.world))
    except DistError as error:
        reason = str(error).partition("[")[0].strip()  # torch's log lines and stack follow
        raise UserError(f"the ranks cannot meet at MASTER_ADDR {address}, MASTER_PORT {port}: {reason}") from None
    return store


def refuse_port(text: str) -> None:
    """Make sure that ``MASTER_PORT`` says where the ranks meet.

    Args:
        text: its value; empty where it is not set.

    Raises:
        UserError: it is no port.
    """
    if not (text.isdecimal() and 0 < int(text) < 2**16):
        raise UserError(
            f"MASTER_PORT {f'is {text}' if text else 'is not set'}, though WORLD_SIZE and MASTER_ADDR say that this is "
            "one rank of several: set it to a free port from 1 to 65535 for all of them, or start them with "
            "`fastcifar run RECIPE --devices N`"
        )


def is_lost(error: BaseException) -> bool:
    """Tell whether an error only says that another rank has ended."""
    from torch.distributed import DistError

    # Gloo's errors have no type of their own; those of a backward pass come through autograd.
    return isinstance(error, LostRankError | DistError) or "/gloo/" in str(error)


def _linger() -> None:
    """Wait for the agent, which has the rank that failed to report, to end this one."""
    for number in interrupt.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(LINGER_S)


def say_how_to_go_on(text: str) -> None:
    """Leave for the launching process what to say when the run ends early."""
    if HINT in os.environ and place().rank == 0:
        Path(os.environ[HINT]).write_text(text)
