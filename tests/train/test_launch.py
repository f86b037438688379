"""``fastcifar run --devices 2``, as a person has it: one message, no process left, a status that says why."""

import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastcifar.cli.run_command import refuse_devices, without_devices
from fastcifar.errors import UserError
from fastcifar.launch import Place, _end, place
from fastcifar.run_directory import RunDirectory
from tests.command import fastcifar
from tests.forked import Forked

DEADLINE_S = 300
ENDLESS = ["smoke/lenet5", "--set", "train.epochs=100000", "--set", "engine.device=cpu", "--set", "eval.every_epochs=9"]


def ranks_of(launcher: Forked) -> list[int]:
    """Return the processes that it started."""
    listed = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in listed if b"fastcifar" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def trained(folder: Path, epochs: int) -> bool:
    """Wait until a run has finished so many epochs."""
    until, metrics = time.monotonic() + DEADLINE_S, folder / "metrics.jsonl"
    while time.monotonic() < until:
        if metrics.is_file() and len(metrics.read_bytes().splitlines()) >= epochs:
            return True
        time.sleep(0.1)
    return False


def ended(pids: list[int]) -> bool:
    """Wait until none of the processes is left."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.1)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_ctrl_c_then_a_rank_that_is_killed(tmp_path):
    """A signal saves once and says how to go on; a rank's death ends the run that went on, with one line."""
    folder = tmp_path / "run"
    launcher = Forked("run", *ENDLESS, "--out", str(folder), "--devices", "2", cwd=tmp_path)
    try:
        assert trained(folder, 1)
        ranks = ranks_of(launcher)
        os.kill(launcher.pid, signal.SIGINT)
        status, said = launcher.status(DEADLINE_S), launcher.printed()
    finally:
        launcher.kill()
    assert status == 130, said
    assert said.splitlines()[-1] == f"fastcifar: SIGINT: stopped; go on with `fastcifar run --resume {folder}`"
    assert said.count("SIGINT") == 1
    assert len(ranks) == 2
    assert ended(ranks)
    done = len(RunDirectory.open(folder).metrics())

    (tmp_path / "printed.txt").unlink()
    launcher = Forked("run", "--resume", str(folder), "--devices", "2", cwd=tmp_path)
    try:
        assert trained(folder, done + 1)
        first, second = ranks_of(launcher)
        os.kill(second, signal.SIGKILL)
        status, said = launcher.status(DEADLINE_S), launcher.printed()
    finally:
        launcher.kill()
    assert status == 2, said
    lines = [line for line in said.splitlines() if not line.startswith(("epoch", "importing", "smoke-lenet5:"))]
    assert lines == [
        "fastcifar: rank 1 was killed by SIGKILL, and the run ended with it; "
        f"go on with `fastcifar run --resume {folder}`"
    ], said
    assert ended([first, second])
    assert len(RunDirectory.open(folder).metrics()) > done


def test_what_is_wrong_is_said_before_anything_starts():
    with pytest.raises(UserError, match="is a combination, which trains nothing"):
        refuse_devices("ensemble-hard", [], 2)
    with pytest.raises(UserError, match="did you mean"):
        refuse_devices("lenet5", ["train.epoch=2"], 2)


def test_the_ranks_are_given_the_same_words():
    words = ["run", "--devices", "2", "lenet5", "--set", "seed=1", "--json"]
    assert without_devices(words) == ["run", "lenet5", "--set", "seed=1", "--json"]
    assert without_devices(["run", "lenet5", "--devices=2"]) == ["run", "lenet5"]


def test_a_status_above_128_that_is_no_signals_is_handed_on(tmp_path):
    failed = SimpleNamespace(exitcode=255, timestamp=0)  # of sys.exit(-1) somewhere
    with pytest.raises(SystemExit) as end:
        _end({0: failed}, tmp_path / "hint")
    assert end.value.code == 255


@pytest.mark.parametrize(("port", "said"), [(None, "is not set"), ("http", "is http"), ("65536", "is 65536")])
def test_ranks_that_are_not_told_where_to_meet_are_refused(tmp_path, monkeypatch, port, said):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    done = fastcifar("run", "smoke/lenet5", "--out", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"fastcifar: MASTER_PORT {said}")
    assert len(done.stderr.splitlines()) == 1


def test_ranks_whose_port_another_program_has_are_refused(tmp_path, monkeypatch):
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        done = fastcifar("run", "smoke/lenet5", "--out", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    said = f"fastcifar: the ranks cannot meet at MASTER_ADDR localhost, MASTER_PORT {port}: "
    assert done.stderr.startswith(said)
    assert "address already in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_place_is_read_from_torchruns_environment(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(3, 8, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert place() == Place()
