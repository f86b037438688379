"""The command line as a user meets it; in a process of its own where signals and locks are what is tested."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastcifar.cli.run_command import go_on
from tests.command import fastcifar
from tests.forked import Forked

TINY = """
[data]
source = "synthetic"
subset = 200
test_subset = 100
[model]
name = "lenet5"
[optimizer]
name = "adam"
lr = 1e-3
[train]
epochs = 2
batch_size = 32
[engine]
device = "cpu"
"""


@pytest.fixture
def tiny(tmp_path) -> Path:
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def test_help_imports_nothing_heavy():
    code = (
        "import sys, fastcifar.cli.main; heavy = {'torch', 'numpy', 'numba', 'pydantic', 'sklearn'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_run_prints_its_summary_as_json_on_stdout_alone(tiny):
    done = fastcifar("run", "tiny.toml", "--json", cwd=tiny)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["status"] == "finished"
    assert (tiny / summary["run"] / "summary.json").is_file()
    assert "epoch 2/2" in done.stderr


def test_resume_auto_takes_up_the_unfinished_run(tiny):
    done = fastcifar("run", "tiny.toml", "--stop-after", "1", "--json", cwd=tiny)
    first = json.loads(done.stdout)
    assert f"stopped at epoch 1 of 2; go on with `fastcifar run --resume {first['run']}`" in done.stderr
    second = json.loads(fastcifar("run", "tiny.toml", "--resume", "auto", "--json", cwd=tiny).stdout)
    third = json.loads(fastcifar("run", "--resume", second["run"], "--json", cwd=tiny).stdout)
    assert first["status"] == "stopped"
    assert first["run"] == second["run"] == third["run"]
    assert second["status"] == third["status"] == "finished"


def test_a_published_accuracy_is_not_shown_as_that_of_a_changed_recipe(tmp_path):
    changes = ["data.source=synthetic", "data.subset=200", "data.test_subset=100", "train.epochs=1", "seed=1"]
    settings = [word for text in (*changes, "engine.device=cpu", "data.loader.workers=1") for word in ("--set", text)]
    done = fastcifar("run", "lenet5", *settings, "--out", "run", cwd=tmp_path)
    keys = ["data.source", "data.subset", "data.test_subset", "train.epochs"]
    assert f"published 59.48% best (this recipe differs: {', '.join(keys)})\n" in done.stdout, done.stderr
    assert "go on with" not in done.stderr
    again = fastcifar("run", "--resume", "run", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["recipe_differs"] == keys


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nothing.toml"], "nothing.toml: no such recipe file"),
        (["run", "lenet"], "Did you mean lenet5"),
        (["run"], "which recipe?"),
        (["run", "tiny.toml", "--set", "train.epoch=3"], 'train.epoch: unknown key (did you mean "epochs"?)'),
        (["run", "tiny.toml", "--set", "engine.device=cuda"], "no CUDA GPU is available"),
        (["run", "--resume", "nowhere"], "nowhere: is not a run directory"),
        (["run", "tiny.toml", "--data", "nowhere", "--set", "data.source=cifar10"], "nowhere"),
        (["run", "tiny.toml", "--out", "tiny.toml/x"], "tiny.toml/x: cannot be written"),
        (["run", "tiny.toml", "--set", "data.holdout=100000"], "holdout"),
    ],
)
def test_bad_input_gives_one_message_and_status_2(tiny, words, message):
    done = fastcifar(*words, cwd=tiny)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_run_is_not_overwritten(tiny):
    assert fastcifar("run", "tiny.toml", "--out", "here", "--quiet", cwd=tiny).returncode == 0
    done = fastcifar("run", "tiny.toml", "--out", "here", cwd=tiny)
    assert done.returncode == 2
    assert "holds a run already" in done.stderr


def test_a_resumed_run_keeps_its_recipe(tiny):
    assert fastcifar("run", "tiny.toml", "--out", "here", "--stop-after", "1", "--quiet", cwd=tiny).returncode == 0
    done = fastcifar("run", "tiny.toml", "--set", "seed=1", "--resume", "here", cwd=tiny)
    assert done.returncode == 2
    assert "a resumed run keeps its own" in done.stderr


def test_a_resumed_run_stays_in_its_folder(tiny):
    assert fastcifar("run", "tiny.toml", "--out", "here", "--stop-after", "1", "--quiet", cwd=tiny).returncode == 0
    done = fastcifar("run", "--resume", "here", "--out", "there", cwd=tiny)
    assert done.returncode == 2
    assert "--out there: a resumed run stays in its folder, here; leave --out away" in done.stderr
    assert not (tiny / "there").exists()
    assert fastcifar("run", "--resume", "here", "--out", str(tiny / "here"), cwd=tiny).returncode == 0


@pytest.fixture
def start(tiny):
    """Return a function that starts a long run in a session of its own and waits until it trains."""
    children = []

    def start(*words: str) -> Forked:
        child = Forked("run", "tiny.toml", "--out", "here", "--set", "train.epochs=5000", *words, cwd=tiny)
        children.append(child)
        child.wait_for("here/checkpoints/epoch-*/state.json", tiny)
        return child

    yield start
    for child in children:  # a failed test must not leave one training
        child.kill()


def test_two_processes_cannot_train_one_run_and_a_killed_one_leaves_it_free(tiny, start):
    child = start()
    done = fastcifar("run", "--resume", "here", cwd=tiny)
    assert done.returncode == 2
    assert f"here: process {child.pid} is at work on this run" in done.stderr
    child.kill()
    done = fastcifar("run", "--resume", "here", "--stop-after", "1", cwd=tiny)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_with_a_checkpoint_and_the_way_to_go_on(tiny, start, number):
    child = start()
    os.kill(child.pid, number)
    assert child.status() == 128 + number, child.printed()
    assert "go on with `fastcifar run --resume here`" in child.printed()
    assert "Traceback" not in child.printed()
    assert not list((tiny / "here").rglob("*.tmp"))


def test_the_way_to_go_on_names_the_data_and_works_in_a_shell():
    assert go_on(Path("here"), None) == "go on with `fastcifar run --resume here`"
    assert go_on(Path("my run"), Path("d")) == "go on with `fastcifar run --resume 'my run' --data d`"


def test_ctrl_c_with_worker_processes_is_no_error_of_theirs(start):
    child = start("--set", "data.loader.name=torchvision")
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the whole group, workers included
    assert child.status() == 130, child.printed()
    assert "go on with `fastcifar run --resume here`" in child.printed()
    assert "DataLoader" not in child.printed()
    assert "Traceback" not in child.printed()


ENDLESS = """
import os, sys, time
from fastcifar import interrupt
interrupt.install()
with interrupt.deferred():
    print("training", flush=True)
    time.sleep(300)  # a step that does not end
"""


def test_a_second_signal_ends_at_once_without_a_traceback():
    child = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "training\n"
    child.send_signal(signal.SIGTERM)
    assert "finishing this step" in child.stderr.readline()
    child.send_signal(signal.SIGTERM)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 143
    assert "Traceback" not in stderr


def test_a_signal_during_the_imports_ends_at_once():
    code = "import os, signal, sys; from fastcifar import __main__ as m, interrupt; interrupt.install();"
    hook = "sys.addaudithook(lambda e, a: e == 'import' and a[0] == 'typer' and os.kill(os.getpid(), signal.SIGINT));"
    done = subprocess.run([sys.executable, "-c", code + hook + "m.main()"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130
    assert done.stderr == "fastcifar: SIGINT: stopped\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["run", "tiny.toml", "--out", ""], "--out"), (["run", "tiny.toml", "--out="], "--out"), (["run", ""], "run")],
)
def test_an_empty_argument_is_not_the_current_folder(tmp_path, monkeypatch, capsys, words, said):
    from fastcifar.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fastcifar", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert f"fastcifar: {said}: is empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
