"""``fastcifar bench``: names, the results file, failures."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fastcifar.cli import bench
from fastcifar.errors import UserError
from tests.command import fastcifar, signals_heard
from tests.ladder.test_runner import alive, wait_for

ENVIRONMENT = {"date": "2026-01-31T12:00:00+00:00", "hardware": "NVIDIA H200"}


def report(name: str, value: float, quick: bool = False) -> dict:
    row = {"name": "a", "value": value, "unit": "s"}
    return {"benchmark": name, "quick": quick, "environment": ENVIRONMENT, "results": [row]}


def test_every_name_has_its_file():
    folder = bench.benchmarks_folder()
    assert [name for name in bench.NAMES if not (folder / f"{name.replace('-', '_')}.py").is_file()] == []


def test_names_are_taken_in_the_order_of_the_suite():
    assert bench.chosen(["step", "ceilings"]) == ["ceilings", "step"]
    assert bench.chosen(["time_to_accuracy"]) == ["time-to-accuracy"]
    assert bench.chosen(["all"]) == list(bench.NAMES)


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match='did you mean "loaders"'):
        bench.chosen(["loader"])


@pytest.mark.parametrize("names", [["step"], ["time_to_accuracy"]])
def test_a_recipe_is_for_what_takes_one(names):
    assert bench.options_of(names, False, ["wrn-sgd"], None) == ["--recipe=wrn-sgd"]
    with pytest.raises(UserError, match="stacking: is a combination"):
        bench.options_of(names, False, ["stacking"], None)


@pytest.mark.parametrize(
    ("names", "contract", "recipes", "runs"), [(["step"], False, [], 3), (["step"], True, [], None),
        (None, False, ["smoke"], None), (["step", "models"], False, ["smoke"], None)],
)  # fmt: skip
def test_options_of_other_benchmarks_are_refused(names, contract, recipes, runs):
    with pytest.raises(UserError, match="are of time-to-accuracy"):
        bench.options_of(names, contract, recipes, runs)


def test_results_are_named_by_date_and_hardware():
    assert bench.results_name(ENVIRONMENT) == "2026-01-31-nvidia-h200.json"
    assert bench.hardware({"hardware": "AMD EPYC, 2 cores"}) == "amd-epyc-2-cores"


def test_merging_replaces_the_same_benchmark_only(tmp_path):
    path = tmp_path / "new" / "results.json"
    for each in (report("step", 1.0), report("augment", 2.0), report("step", 3.0)):
        bench.merge(path, each)
    held = bench.read_results(path)
    assert held["environment"] == ENVIRONMENT
    assert [(b["benchmark"], b["results"][0]["value"]) for b in held["benchmarks"]] == [("augment", 2.0), ("step", 3.0)]


def test_a_quick_result_never_replaces_a_full_one(tmp_path):
    path = tmp_path / "results.json"
    bench.merge(path, report("step", 1.0, quick=True))
    bench.merge(path, report("step", 2.0))
    bench.merge(path, report("step", 3.0, quick=True))
    assert bench.read_results(path)["benchmarks"][0]["results"][0]["value"] == 2.0


def test_an_unfinished_report_never_replaces_a_complete_one(tmp_path):
    path = tmp_path / "results.json"

    def values() -> list[float]:
        return [b["results"][0]["value"] for b in bench.read_results(path)["benchmarks"]]

    bench.merge(path, report("step_times", 1.0))
    bench.merge(path, report("step_times", 2.0) | {"complete": False})
    bench.merge(path, report("step_times", 3.0) | {"complete": False})
    assert values() == [1.0, 3.0]
    bench.merge(path, report("step_times", 4.0, quick=True))
    assert values() == [1.0, 3.0]
    bench.merge(path, report("step_times", 5.0))
    assert values() == [5.0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmarks": [1]}', '{"benchmarks": [{"results": []}]}'])
def test_another_file_is_not_overwritten(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        bench.merge(path, report("step", 1.0))
    assert path.read_text() == text


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Path:
    """A suite of two: step works, models fails."""
    (tmp_path / "step.py").write_text(f"print({json.dumps(json.dumps(report('step', 1.0)))})")
    (tmp_path / "models.py").write_text("raise SystemExit('models: no GPU')")
    monkeypatch.setattr(bench, "benchmarks_folder", lambda: tmp_path)
    monkeypatch.setattr(bench, "new_results_folder", lambda: tmp_path / "results")
    return tmp_path


def test_a_run_prints_one_object_and_keeps_the_results(suite, capfd):
    bench.bench(["step"], json_=True)
    assert json.loads(capfd.readouterr().out)["benchmarks"][0]["benchmark"] == "step"
    assert bench.read_results(suite / "results" / "2026-01-31-nvidia-h200.json")


def test_a_failed_benchmark_does_not_stop_the_others(suite, capfd):
    with pytest.raises(typer.Exit) as stopped:
        bench.bench(["step", "models"], json_=True, to=suite / "results.json")
    assert stopped.value.exit_code == 1
    printed = capfd.readouterr()
    assert json.loads(printed.out)["failed"] == ["models"]
    assert "models: no GPU" in printed.err
    assert bench.read_results(suite / "results.json")["benchmarks"][0]["benchmark"] == "step"


@pytest.mark.parametrize("path", ["{}", "{}/file/x.json", "/dev/null/x.json", "{}/other.json"])
def test_a_results_file_that_cannot_be_written_is_refused_before_anything_is_measured(suite, path):
    (suite / "file").touch()
    (suite / "other.json").write_text("[]")
    (suite / "step.py").write_text("raise SystemExit('measured')")
    done = fastcifar("bench", "step", "--out", path.format(suite), cwd=suite)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "choose " in done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_benchmark_and_what_it_has_started(suite, number, status):
    (suite / "step.py").write_text(ENDLESS)
    with signals_heard():
        process = subprocess.Popen([sys.executable, "-c", COMMAND], cwd=suite, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (suite / "pids").exists() or process.poll() is not None)
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == status, said
    assert f"{number.name}: ending the benchmark" in said
    # SIGKILL is sent by then; the kernel takes a moment to execute it.
    for pid in (suite / "pids").read_text().split():
        wait_for(lambda pid=pid: not alive(int(pid)), 60.0)


# With a process that is deaf to Ctrl-C, as a benchmark's own processes may be.
ENDLESS = """
import os, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(999)"
other = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.DEVNULL)
with open("new", "w") as file:
    file.write(f"{os.getpid()} {other.pid}")
os.rename("new", "pids")
try:
    time.sleep(999)
except KeyboardInterrupt:
    sys.exit(130)
"""
COMMAND = """
import sys
from pathlib import Path
from fastcifar import interrupt
interrupt.install()
from fastcifar.cli import bench
bench.benchmarks_folder = Path.cwd
sys.argv = ["fastcifar", "bench", "step", "--out", "results.json"]
from fastcifar.cli.main import main
main()
"""


def test_what_measured_nothing_is_not_kept(suite, capfd):
    (suite / "step.py").write_text(f"print({json.dumps(json.dumps(report('step', 1.0) | {'results': []}))})")
    bench.bench(["step"], json_=True)
    assert json.loads(capfd.readouterr().out)["failed"] == []
    assert not (suite / "results").exists()


def test_ceilings_run_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "fastcifar", "bench", "ceilings", "--quick", "--json"]
    command += ["--out", str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed, held = json.loads(done.stdout), bench.read_results(tmp_path / "results.json")
    assert printed["benchmarks"] == held["benchmarks"]
    assert all(row["value"] > 0 for row in held["benchmarks"][0]["results"])
