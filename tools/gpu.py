"""On a machine with a GPU: tests, benchmarks and the ladder, in order of value, in pieces of under ten minutes.

    python tools/gpu.py                       every piece that is not done, one after the other
    python tools/gpu.py --piece K             one piece; again, until it says that it is done
    python tools/gpu.py --list                the pieces

It needs no network; where the parts of gpu-pack/ lie here they are unpacked first. Results: runs/gpu/ (the ladder's
runs and table, a log per piece) and benchmarks/results/. ``--collect FOLDER`` also packs them, less weights and
checkpoints, into one archive. FASTCIFAR_GPU_REHEARSAL=1 walks through every piece on a CPU, with tiny settings, into
runs/gpu-rehearsal/.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = os.environ.get("FASTCIFAR_GPU_REHEARSAL") == "1"
FOLDER = ROOT / "runs" / ("gpu-rehearsal" if REHEARSAL else "gpu")
DATA = ROOT / "gpu-pack" / "ready"
# A ladder stops its rows so long before a piece's limit and is killed as long after it. Rows have a minute to end, in
# which the ladder has to be there: a row leads a group of its own, and would be left on the GPU.
GRACE_S = 45.0
UNFINISHED = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = {128 + number for number in SIGNALS}
"""Statuses of a command that a signal stopped: what it had done is kept, and it wants to be run again."""
RESUMABLE = ("launches", "step-times", "--contract")
"""Benchmarks, or an option of one, that keep each recipe's or run's result at once, so that another start goes on."""
LEAST_MINUTES = 1.0
"""Less would leave the ladder no time besides the half minute that it has for saving."""
TRIES = 20
"""How often a piece is started at most, so that one without progress does not keep a machine for ever."""


class Stopped(BaseException):
    """This process was asked to end; not an `Exception`, so that nothing but ``finally`` delays it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Piece:
    """One part of the work; ``benchmarks`` with ``options`` (after ``tests``), or ``rows`` (with ``seeds``)."""

    name: str
    tests: bool = False
    benchmarks: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    quick: bool = False
    rows: tuple[str, ...] = ()
    seeds: int = 1


PIECES = (
    Piece("tests", benchmarks=("launches",), tests=True),
    Piece("suite-quick", benchmarks=("all",), quick=True),
    Piece("ladder-cheap", rows=("lenet5", "lenet5-kaiming", "deep", "deep-*"), seeds=3),
    Piece("suite-step", benchmarks=("ceilings", "optimizer", "kernels", "augment", "step")),
    Piece("suite-rest", benchmarks=("loaders", "models", "large-data", "seeds", "jobs")),
    Piece("step-times", benchmarks=("step-times",)),
    Piece("wrn-200", rows=("wrn-200",)),
    Piece("contract", benchmarks=("time-to-accuracy",), options=("--contract", "--runs", "40")),
    Piece("ladder-augmentation", rows=("aug-*",)),
    Piece("ladder-residual", rows=("residual", "residual-deep")),
    Piece("ladder-wrn", rows=("wrn-*",)),
    Piece("pyramid-aligned", rows=("beyond/pyramid-aligned",)),
    Piece("ladder-pyramid", rows=("pyramid", "pyramid-shakedrop", "pyramid-asam", "pyramid200", "pyramid400")),
    Piece("ladder-combined", rows=("ensemble-*", "stacking")),
)


def main() -> None:
    """Run one piece or all that are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece", help=f"1 to {len(PIECES)}, or a name")
    parser.add_argument("--minutes", type=minutes, default=9.0, help="after so long a piece stops, to be resumed")
    parser.add_argument("--collect", type=Path, help="folder for the archive of the results")
    parser.add_argument("--list", action="store_true", help="list the pieces and which are done")
    arguments = parser.parse_args()
    if arguments.list:
        for number, piece in enumerate(PIECES, 1):
            print(f"{number:3} {piece.name:20} {'done' if mark(piece).exists() else ''}")
        return
    end_with_command()
    prepare()
    if arguments.piece:
        status = attempt(chosen(arguments.piece), arguments.minutes)
    else:
        status = all_pieces(arguments.minutes)
    if arguments.collect:
        collect(arguments.collect)
    sys.exit(status)


def minutes(text: str) -> float:
    """Return the value of ``--minutes``.

    Raises:
        argparse.ArgumentTypeError: it is no number, or too small.
    """
    with suppress(ValueError):
        if LEAST_MINUTES <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: give a number of minutes, at least {LEAST_MINUTES:g}")


def end_with_command() -> None:
    """From here on let a signal end this process's command first, with time to save; ``nohup`` ignores SIGHUP."""

    def end(number: int, frame: object) -> None:
        raise Stopped(number)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def prepare() -> None:
    """Unpack what was carried here, and see to it that there is a GPU."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if any((ROOT / "gpu-pack").glob("part-*")) and not REHEARSAL:
        subprocess.run([sys.executable, str(ROOT / "tools" / "gpu_unpack.py")], check=True)
    import torch

    if not torch.cuda.is_available() and not REHEARSAL:
        sys.exit("gpu: torch sees no GPU here; a rehearsal on the CPU: FASTCIFAR_GPU_REHEARSAL=1 make gpu")


def chosen(word: str) -> Piece:
    """Return the piece of that number or name."""
    for number, piece in enumerate(PIECES, 1):
        if word in (str(number), piece.name):
            return piece
    sys.exit(f"gpu: no piece {word}; there are 1 to {len(PIECES)}: {', '.join(p.name for p in PIECES)}")


def all_pieces(minutes: float) -> int:
    """Run every piece that is not done, each until it is done; go past one that fails, and report it at the end."""
    failed = []
    for piece in PIECES:
        status, tries = UNFINISHED, 0
        while status == UNFINISHED and not mark(piece).exists() and (piece.rows or tries < TRIES):
            status, tries = attempt(piece, minutes), tries + 1
        if not mark(piece).exists():
            failed.append(piece.name)
    if failed:
        print(f"gpu: failed: {', '.join(failed)}; their logs are in {FOLDER}", file=sys.stderr)
    return 1 if failed else 0


def attempt(piece: Piece, minutes: float) -> int:
    """Go on with a piece for at most so long: 0 when it is done, 3 when it wants to be run again, else it failed.

    Each command leaves a mark when it is done; those that have one are skipped. So are those that have failed, until
    all others are done: the time is these others', and the failure is the piece's status only then.
    """
    from fastcifar.run_directory import write_json

    started, failures, unfinished = time.monotonic(), failed_before(piece), False
    for number, command in enumerate(commands(piece, minutes), 1):
        done = FOLDER / f"{piece.name}-{number}.done"
        if done.exists() or number in failures:
            continue
        left_s = 60 * minutes - (time.monotonic() - started)
        status = outcome(piece, command, left_s, minutes)
        if status == 0:
            done.touch()
        elif status == UNFINISHED:
            unfinished = True
        else:
            failures[number] = status
            write_json(failure_file(piece), failures)
    status = UNFINISHED if unfinished else next(iter(failures.values()), 0)
    if not unfinished:
        failure_file(piece).unlink(missing_ok=True)  # another start tries them again
    if status == 0:
        mark(piece).touch()
    word = {0: "done", UNFINISHED: "stopped at its time limit; run it again"}.get(status, f"failed (status {status})")
    if unfinished and failures:
        word += f", failed so far: command {', '.join(map(str, failures))}"
    print(f"gpu: {piece.name}: {word} after {time.monotonic() - started:.0f} s", file=sys.stderr)
    return status


def outcome(piece: Piece, command: list[str], left_s: float, minutes: float) -> int:
    """Run a command for at most so long: 0 when it is done, 3 when it wants to be run again, else it failed."""
    status = limited(command, left_s, FOLDER / f"{piece.name}.log")
    if status == 0 and piece.rows and not ladder_done(piece):
        return UNFINISHED
    if status == UNFINISHED and not resumable(piece, command) and left_s > 55 * minutes:
        return 1  # it had nearly all the time there is, so another try would end the same
    return status


def failed_before(piece: Piece) -> dict[int, int]:
    """Return the status of each command that failed in an attempt since which others are not finished, by number."""
    path = failure_file(piece)
    return {int(number): status for number, status in json.loads(path.read_text()).items()} if path.exists() else {}


def failure_file(piece: Piece) -> Path:
    """Return the file that keeps a piece's failures from one attempt to the next, each of which may be a process."""
    return FOLDER / f"{piece.name}.failed"


def resumable(piece: Piece, command: list[str]) -> bool:
    """Return whether a command that had all the time there is goes on at its next start."""
    return bool(piece.rows) or any(name in command for name in RESUMABLE)


def commands(piece: Piece, minutes: float) -> list[list[str]]:
    """Return the piece's commands; in a rehearsal with the smallest settings."""
    command = [sys.executable, "-m", "fastcifar"]
    if piece.benchmarks or piece.tests:
        quick = ["--quick"] if piece.quick or REHEARSAL else []
        options = ["--contract"] * ("--contract" in piece.options) if REHEARSAL else piece.options
        to = ["--out", str(FOLDER / "results.json")] if REHEARSAL else []
        # pytest-benchmark, where a machine has it, warns about pytest-xdist, and our tests take warnings for errors.
        without = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
        tests = [[sys.executable, "-m", "pytest", "-q", "-m", "gpu", *without, *gpu_tests()]]
        benchmarks = [[*command, "bench", name, *options, *quick, *to] for name in every(piece.benchmarks)]
        return [*(tests if piece.tests else []), *benchmarks]
    return [[*command, "ladder", *ladder_options(piece), "--until", f"{60 * minutes - GRACE_S:.0f}s"]]


def gpu_tests() -> list[str]:
    """Return the files that hold tests for a GPU: the others' imports may need packages that such a machine lacks."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in found if "mark.gpu" in path.read_text(encoding="utf-8")]


def every(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names with ``all`` spelled out, so that a piece can be resumed between benchmarks."""
    from fastcifar.cli.bench import NAMES

    return NAMES if names == ("all",) else names


def ladder_options(piece: Piece) -> list[str]:
    """Return which rows to run and where; a rehearsal takes each row's smoke config on synthetic images, one seed."""
    rows = [f"smoke/{row.removeprefix('beyond/')}" if REHEARSAL else row for row in piece.rows]
    rows = ["smoke/pyramid" if row == "smoke/pyramid-aligned" else row for row in rows]
    only = [word for row in rows for word in ("--only", row)]
    return [*only, "--seeds", str(1 if REHEARSAL else piece.seeds), "--out", str(FOLDER / "ladder")]


def ladder_done(piece: Piece) -> bool:
    """Return whether every run of the piece has finished."""
    command = [sys.executable, "-m", "fastcifar", "ladder", *ladder_options(piece), "--dry-run", "--json"]
    table = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE).stdout)
    return all(row["state"] == "done" for row in table["rows"])


def limited(command: list[str], limit_s: float, log: Path) -> int:
    """Run a command, its output on the screen and in a log; interrupt it at the limit.

    Returns:
        Its exit status, or `UNFINISHED` where it was interrupted, by this limit or by anyone else.
    """
    if limit_s < 1:
        return UNFINISHED
    environment = {**os.environ}
    if "pytest" not in command:  # the tests try out what falls back
        environment.setdefault("FASTCIFAR_STRICT", "1")
    if (DATA / "cifar-10-batches-bin").is_dir():
        environment.setdefault("FASTCIFAR_DATA", str(DATA))
    print(f"$ {' '.join(command)}", file=sys.stderr)
    with subprocess.Popen(["tee", "-a", str(log)], stdin=subprocess.PIPE, start_new_session=True) as tee:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=tee.stdin, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = UNFINISHED
        finally:  # also where this process is interrupted
            stop(process)
    return UNFINISHED if status in INTERRUPTED or -status in (signal.SIGINT, signal.SIGTERM) else status


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a command and what it has started, so that it can end well, and kill what is left of its group.

    ``fastcifar bench`` and ``fastcifar ladder`` end their processes, which lead groups of their own, before they end.
    """
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
    finally:  # also where a second signal comes
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def mark(piece: Piece) -> Path:
    """Return the file that says that a piece is done."""
    return FOLDER / f"{piece.name}.done"


def collect(folder: Path) -> None:
    """Pack logs, results and runs, less weights and checkpoints, into one archive."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "fastcifar-gpu.tar.gz"

    def light(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if Path(info.name).name in ("checkpoints", "weights") else info

    with tarfile.open(archive, "w:gz") as tar:
        tar.add(FOLDER, FOLDER.name, filter=light)
        tar.add(ROOT / "benchmarks" / "results", "results")
    print(f"gpu: {archive}, {archive.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except Stopped as stopped:
        with suppress(OSError):  # after SIGHUP there may be no terminal any more
            name = signal.Signals(stopped.number).name
            print(f"gpu: {name}: stopped; the same command goes on from here", file=sys.stderr, flush=True)
        sys.exit(128 + stopped.number)
