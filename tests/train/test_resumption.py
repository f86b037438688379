"""A run that goes on with other code or on another machine says so, and keeps it."""

import pytest

from fastcifar.analysis.html import build_report
from fastcifar.environment import describe
from fastcifar.run_directory import RunDirectory
from fastcifar.train.resumption import record_resumption
from fastcifar.train.run import train
from tests.train.tiny import recipe


@pytest.fixture
def folder(tmp_path):
    """A run that stopped after its first epoch."""
    run = RunDirectory.create(tmp_path / "run", recipe(), describe())
    train(recipe(), run, stop_after=1, quiet=True)
    return run.folder


def go_on(folder, epochs):
    train(recipe(), RunDirectory.open(folder), stop_after=epochs, quiet=True)
    return RunDirectory.open(folder)


def test_a_run_that_goes_on_as_it_began_says_nothing(folder, capsys):
    assert "resumed" not in go_on(folder, 2).environment
    assert "goes on after" not in capsys.readouterr().err


def test_other_code_hardware_and_versions_are_said_once_and_kept(folder, capsys, monkeypatch):
    begun = RunDirectory.open(folder).environment
    packages = {**begun["packages"], "torch": "9.9"}
    del packages["numpy"]
    there = describe() | {"git": "1234567890", "hardware": "another", "packages": packages}
    monkeypatch.setattr("fastcifar.train.resumption.describe", lambda: there)
    run = go_on(folder, 2)
    told = " ".join(capsys.readouterr().err.split())
    assert "goes on after epoch 1 with hardware another (was" in told
    assert f"revision 1234567890 (was {begun['git']})" in told
    assert f"numpy missing (was {begun['packages']['numpy']}), torch 9.9 (was {begun['packages']['torch']})" in told
    place = {"epochs_done": 1, "hardware": "another", "git": "1234567890", "packages": packages}
    assert run.environment == begun | {"resumed": [place]}
    assert run.summary["environment"] == run.environment
    assert "after epoch 1 on another, revision 1234567890" in (folder / "README.md").read_text()
    assert "revision 1234567890" in build_report([run], None)[0]
    assert go_on(folder, 3).environment["resumed"] == [place]
    assert "goes on after" not in capsys.readouterr().err
    monkeypatch.undo()
    assert [entry["git"] for entry in go_on(folder, 4).environment["resumed"]] == ["1234567890", begun["git"]]


def test_what_an_environment_of_an_older_version_does_not_say_has_not_changed(tmp_path):
    run = RunDirectory.create(tmp_path / "run", recipe(), {"hardware": "one"})
    record_resumption(run, 1, {"hardware": "one", "git": "1234567890", "packages": {"torch": "9.9"}})
    assert RunDirectory.open(run.folder).environment == {"hardware": "one"}
