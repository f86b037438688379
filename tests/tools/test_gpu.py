"""`make gpu`: the first piece, and what becomes of a command that is interrupted."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from fastcifar.cli.ladder import seconds
from tests.command import signals_heard
from tests.ladder.test_runner import alive
from tests.tools.test_gpu_pack import script


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The script, with its folder under tmp_path and little patience."""
    module = script("gpu")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "GRACE_S", 60.0)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_first_commands_test_and_compare_the_launches_with_the_ledger(gpu):
    tests, launches = gpu.commands(gpu.PIECES[0], 9.0)
    assert "pytest" in tests
    assert launches[-2:] == ["bench", "launches"]


def test_files_without_gpu_tests_are_not_imported_on_a_gpu_machine(gpu):
    """Some import packages that it does not have, and one such file ends pytest before any test."""
    found = gpu.gpu_tests()
    assert "tests/kernels/test_sam.py" in found
    assert "tests/config/test_json_schema.py" not in found
    texts = [(gpu.ROOT / path).read_text(encoding="utf-8") for path in found]
    names = {name for text in texts for name in re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)}
    ours = {"fastcifar", "tests", "launches"}
    assert names - ours - set(sys.stdlib_module_names) <= {"numpy", "pytest", "scipy", "torch", "triton"}


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(1)", 1),
        ("raise SystemExit(130)", 3),
        ("raise SystemExit(143)", 3),
        ("raise SystemExit(129)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 3),
    ],
)
def test_statuses(gpu, tmp_path, code, status):
    assert gpu.limited(python(code), 120, tmp_path / "log") == status


def test_at_the_limit_a_command_can_save_and_leaves_nothing_running(gpu, tmp_path):
    """The command ends as ``fastcifar bench`` does, at once and without its child, which would hold the log open."""
    child = f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import os, signal, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.signal(2, 1); ' + {child!r}])\n"
        f"def saved(*_): open({str(tmp_path / 'saved')!r}, 'w').close(); os._exit(130)\n"
        "signal.signal(signal.SIGINT, saved)\n"
        "while True: signal.pause()\n"
    ).replace("signal.signal(2, 1)", "signal.signal(2, signal.SIG_IGN)")
    assert gpu.limited(python(code), 5, tmp_path / "log") == gpu.UNFINISHED
    assert (tmp_path / "saved").exists()
    assert gone(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_too_and_is_the_status(gpu, tmp_path, number):
    """The script runs as a program whose only piece's command waits for ever."""
    waiting = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(600)"
    text = (gpu.ROOT / "tools" / "gpu.py").read_text(encoding="utf-8")
    text = text.replace(
        'if __name__ == "__main__":\n',
        f'if __name__ == "__main__":\n    FOLDER = Path({str(tmp_path)!r})\n    prepare = lambda: None\n'
        f"    commands = lambda *_: [[sys.executable, '-c', {waiting!r}]]\n",
    )
    with signals_heard():
        process = subprocess.Popen(
            [*python(text.replace("__file__", repr(str(gpu.ROOT / "tools" / "gpu.py")))), "--piece", "1"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
    try:
        pid = tmp_path / "pid"
        while not (pid.exists() and pid.read_text().endswith(".")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert f"gpu: {number.name}: stopped; the same command goes on from here" in said
    assert "Traceback (" not in said
    assert gone(int(pid.read_text().rstrip(".")))


@pytest.mark.parametrize("minutes", ["0.5", "-1", "nan", "inf", "soon"])
def test_too_few_minutes_are_refused(gpu, monkeypatch, capsys, minutes):
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"--minutes={minutes}"])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
    assert f"--minutes: {minutes}: give a number of minutes, at least 1" in capsys.readouterr().err


def test_the_ladder_has_time_in_the_fewest_minutes(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 30.0)
    ladder = next(piece for piece in gpu.PIECES if piece.rows)
    ((*_, until),) = gpu.commands(ladder, gpu.minutes("1"))
    assert seconds(until) == 30


def gone(process: int) -> bool:
    """Return whether a process has ended, within a minute; one that nobody has waited for has ended too."""
    for _ in range(600):
        if not alive(process):
            return True
        time.sleep(0.1)
    return False


def test_an_interrupted_piece_is_run_again_and_a_failed_one_is_not(gpu, monkeypatch):
    statuses = {"a": [3, 3, 0], "b": [1], "c": [0]}
    monkeypatch.setattr(gpu, "PIECES", tuple(gpu.Piece(name, benchmarks=(name,)) for name in statuses))
    monkeypatch.setattr(gpu, "commands", lambda piece, minutes: [[piece.name]])
    monkeypatch.setattr(gpu, "limited", lambda command, left_s, log: statuses[command[0]].pop(0))
    monkeypatch.setattr(gpu, "RESUMABLE", ("a",))
    assert gpu.all_pieces(9.0) == 1
    assert statuses == {"a": [], "b": [], "c": []}
    assert [gpu.mark(piece).exists() for piece in gpu.PIECES] == [True, False, True]


def test_a_failed_command_keeps_no_other_from_being_gone_on_with(gpu, monkeypatch, capsys):
    statuses, started = {"tests": [1], "step": [3, 0], "models": [2], "seeds": [3, 3, 0]}, []
    piece = gpu.Piece("suite", benchmarks=tuple(statuses))
    monkeypatch.setattr(gpu, "PIECES", (piece,))
    monkeypatch.setattr(gpu, "commands", lambda piece, minutes: [[name] for name in piece.benchmarks])
    monkeypatch.setattr(gpu, "RESUMABLE", tuple(statuses))

    def limited(command, left_s, log):
        started.append(command[0])
        return statuses[command[0]].pop(0)

    monkeypatch.setattr(gpu, "limited", limited)
    assert gpu.attempt(piece, 9.0) == gpu.UNFINISHED
    assert "run it again, failed so far: command 1, 3" in capsys.readouterr().err
    assert gpu.all_pieces(9.0) == 1  # another process would go on just so
    assert statuses == {"tests": [], "step": [], "models": [], "seeds": []}
    assert started == ["tests", "step", "models", "seeds", "step", "seeds", "seeds"]
    assert "suite: failed (status 1)" in capsys.readouterr().err
    statuses |= {"tests": [0], "models": [0]}  # what had failed is tried again once all others are done
    assert gpu.attempt(piece, 9.0) == 0
    assert started[7:] == ["tests", "models"]
    assert gpu.mark(piece).exists()


def test_a_piece_without_progress_is_given_up(gpu, monkeypatch):
    tried = []
    monkeypatch.setattr(gpu, "PIECES", (gpu.Piece("a", benchmarks=("step-times",)),))
    monkeypatch.setattr(gpu, "limited", lambda command, left_s, log: tried.append(command) or gpu.UNFINISHED)
    assert gpu.all_pieces(9.0) == 1
    assert len(tried) == gpu.TRIES


def test_fallbacks_are_errors_except_in_the_tests(gpu, tmp_path, monkeypatch):
    monkeypatch.delenv("FASTCIFAR_STRICT", raising=False)
    code = "import os; raise SystemExit(40 + int(os.environ.get('FASTCIFAR_STRICT', 0)))"
    assert gpu.limited(python(code), 120, tmp_path / "log") == 41
    assert gpu.limited([*python(code), "pytest"], 120, tmp_path / "log") == 40
    assert "FASTCIFAR_STRICT" not in os.environ
