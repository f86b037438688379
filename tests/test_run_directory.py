"""Run directories: made by one process alone, every file hashed, nothing damaged used, nothing half written left."""

import json
import os
import random
import time
import tomllib
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from hypothesis import seed as seeded

from fastcifar import environment, run_directory
from fastcifar import open_run as opening
from fastcifar.errors import UserError
from fastcifar.locks import locked
from fastcifar.manifest import parse
from fastcifar.open_run import open_run
from fastcifar.run_directory import RunDirectory
from tests.command import fastcifar
from tests.forked import CONTEXT
from tests.run_directories import make_members, recipe
from tests.storm import run_directories
from tests.storm.tally import Tally
from tests.storm.test_properties import SEED


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A finished run with a holdout, training logits and made-up weights and checkpoint."""
    made = make_members(tmp_path, (1.0,), holdout=20, train=20, test=30)["m0"]
    made.commit({"weights/last.safetensors": tensors()})
    return RunDirectory.open(made.folder)


def tensors() -> bytes:
    import torch
    from safetensors.torch import save

    return save({"weight": torch.arange(12.0)})


def read_everything(run: RunDirectory) -> None:
    run.recipe, run.summary, run.environment  # noqa: B018
    run.metrics()
    for key in run.logits_keys():
        run.logits(key)
    run.weights("last")
    run.read("README.md")


def opened_at_once(rate: float, cwd: Path, start: Barrier, told: Connection) -> None:
    """Open a new run when all others do, tell its folder, and hold it until the other end has heard of all."""
    os.chdir(cwd)
    environment.describe = lambda: {"hardware": "a test"}
    wanted = recipe("same", optimizer={"name": "adam", "lr": rate})
    start.wait(500)
    with open_run(wanted, None, None) as run:
        told.send(str(run.folder))
        told.recv()


def test_processes_started_at_once_each_have_their_own_folder_and_recipe(tmp_path):
    rates = [k * 1e-3 for k in range(1, 5)]
    start, pipes = CONTEXT.Barrier(len(rates)), [CONTEXT.Pipe() for _ in rates]
    children = [
        CONTEXT.Process(target=opened_at_once, args=(rate, tmp_path, start, there))
        for rate, (_, there) in zip(rates, pipes, strict=True)
    ]
    for child in children:
        child.start()
    assert all(here.poll(500) for here, _ in pipes)
    folders = [here.recv() for here, _ in pipes]
    for (here, _), child in zip(pipes, children, strict=True):
        here.send("done")
        child.join(500)
        assert child.exitcode == 0
    assert len(set(folders)) == len(rates)
    recorded = [tomllib.loads((tmp_path / f / "recipe.toml").read_text())["optimizer"]["lr"] for f in folders]
    assert recorded == rates


def test_an_own_folder_is_not_taken_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    folders = []
    for _ in range(3):
        with open_run(recipe("a"), None, None) as run:
            folders.append(run.folder.name)
    assert folders == ["a-seed42-now", "a-seed42-now-2", "a-seed42-now-3"]


def test_every_file_is_in_the_manifest(run):
    there = {p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.is_file()}
    assert there - {".lock", "manifest.json"} == set(run.manifest().files)
    assert all(len(hashes) == 1 for hashes in run.manifest().files.values())


def test_a_file_that_a_finished_run_has_lost_does_not_come_back_by_resuming_it(run):
    (run.folder / "logits.npz").unlink()
    with pytest.raises(UserError, match=r"logits\.npz: is missing; restore it from a copy, or train the run again"):
        RunDirectory.open(run.folder).logits("test/last/raw")


def test_a_flipped_bit_in_any_file_is_named(run, seed):
    chance = random.Random(seed)
    for path in sorted(p for p in run.folder.rglob("*") if p.is_file() and p.name != ".lock"):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            read_everything(found := RunDirectory.open(run.folder))
            named = path.name == "recipe.toml" and found.recipe == run.recipe  # a flip in white space, say
        except UserError as error:
            named = path.name in str(error)
        assert named, path
        path.write_bytes(whole)
    read_everything(RunDirectory.open(run.folder))


def test_an_edited_recipe_is_named_by_key_with_the_way_to_branch_off(run):
    path = run.folder / "recipe.toml"
    path.write_text(path.read_text().replace("batch_size = 128", "batch_size = 64"))
    with pytest.raises(UserError, match=r"train\.batch_size is 64, was 128\..*`fastcifar run .*recipe\.toml`"):
        _ = RunDirectory.open(run.folder).recipe


def test_another_layout_of_the_same_recipe_passes(run):
    path = run.folder / "recipe.toml"
    path.write_text("# a remark\n" + path.read_text())
    assert RunDirectory.open(run.folder).recipe == run.recipe


def test_a_run_without_its_manifest_is_refused(run):
    (run.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: is missing"):
        RunDirectory.open(run.folder)


def test_metrics_that_were_removed_are_missed(run):
    (run.folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: is missing"):
        RunDirectory.open(run.folder).metrics()


@seeded(SEED)
@given(seed=strategies.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None, database=None)
def test_no_mutated_run_is_used_without_a_word(seed):
    tally = Tally("run directories")
    run_directories.storm(tally, seed, 1)
    assert not tally.failures


NAME = "a-seed42-20261125-120000"


def killed_before_its_recipe(folder: Path) -> Path:
    """Make what a process leaves that was killed between making its folder and writing its recipe."""
    folder.mkdir(parents=True)
    for name in (".lock", ".lock-owner", "environment.json", ".recipe.toml.7.tmp"):
        (folder / name).write_text("")
    return folder


def test_an_empty_run_goes_with_the_next_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    killed_before_its_recipe(tmp_path / "runs" / NAME)
    (tmp_path / "runs" / f"{NAME}-2").mkdir()  # killed before the lock
    with open_run(recipe("a"), None, None) as run:
        assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.folder.name]


def test_what_is_no_empty_run_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    kept = [runs / "mine", runs / f"{NAME}-2", runs / f"{NAME}-3"]
    kept[0].mkdir(parents=True)  # not the name of a run
    (killed_before_its_recipe(kept[1]) / "notes.txt").write_text("mine")
    with locked(killed_before_its_recipe(kept[2]) / ".lock"):  # its process lives
        with open_run(recipe("a"), None, None) as run:
            assert {path.name for path in runs.iterdir()} == {run.folder.name, *(path.name for path in kept)}
    assert (kept[1] / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("still", ["removed", "being removed"])
def test_a_folder_that_is_taken_for_empty_before_its_lock_is_no_loss(tmp_path, monkeypatch, still):
    monkeypatch.chdir(tmp_path)
    make, made, stack = opening._new_folder, [], ExitStack()

    def removed_at_once(*words) -> Path:
        made.append(make(*words))
        if len(made) == 1 and still == "removed":
            opening.remove_empty_runs(Path("runs"))
            assert not made[0].exists()
        elif len(made) == 1:
            stack.enter_context(locked(made[0] / ".lock"))
        return made[-1]

    monkeypatch.setattr(opening, "_new_folder", removed_at_once)
    with stack, open_run(recipe("a"), None, None) as run:
        assert run.folder == made[-1]
        assert len(made) == (1 if still == "removed" else 2)
        assert RunDirectory.open(run.folder).recipe == recipe("a")


def test_a_named_folder_in_which_a_run_was_killed_before_it_began_is_used(tmp_path):
    folder = killed_before_its_recipe(tmp_path / "mine")
    with open_run(recipe("a"), folder, None) as run:
        assert run.recipe == recipe("a")
    assert not list(folder.glob("*.tmp"))
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("cut", ["before the manifest", "after the manifest", "after the file"])
def test_a_process_killed_within_a_commit_leaves_an_intact_run(run, monkeypatch, cut):
    old = run.metrics()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if cut == "before the manifest":
            patch.setattr(RunDirectory, "_write_manifest", killed)
        else:
            patch.setattr(Path, "replace", kill_at(2 if cut == "after the manifest" else 3, Path.replace))
        patch.setattr(run_directory, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            run.commit(run.metrics_file(old[:2]), remove=["summary.json"])
    found = RunDirectory.open(run.folder)
    assert found.metrics() == (old[:2] if cut == "after the file" else old)
    with found.alone():
        assert not list(run.folder.rglob("*.tmp"))
        found.write_metrics(old[:1])
    assert RunDirectory.open(run.folder).metrics() == old[:1]


def kill_at(count: int, replace):
    """Return a ``Path.replace`` that ends the process instead of being called for the last of so many times."""
    calls = []

    def counted(*words):
        calls.append(words)
        if len(calls) == count:
            raise KeyboardInterrupt
        return replace(*words)

    return counted


def test_left_overs_go_with_the_next_start_but_not_under_another_process(run):
    half = run.folder / "checkpoints" / "epoch-00009"
    half.mkdir(parents=True)
    (half / "state.safetensors").write_bytes(b"half")
    for name in (".metrics.jsonl.1.tmp", "weights/.last.safetensors.1.tmp", "checkpoints/.epoch-00001.tmp"):
        (run.folder / name).write_bytes(b"half")
    read_everything(RunDirectory.open(run.folder))
    assert half.exists(), "a reader removes nothing"
    with run.alone():
        pass
    assert not half.exists()
    assert not list(run.folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "[]", "valid dictionary"),
        ("summary.json", '{"format": 2, "status": "finished"}', "Field required"),
        ("summary.json", "[" * 100_000, "damaged"),
        ("summary.json", b"\xff\xfe", "damaged"),
        ("metrics.jsonl", '{"epoch": NaN}\n', "NaN is not a JSON number"),
        ("metrics.jsonl", '{"epoch": "1"}\n', "line 1: epoch"),
        ("environment.json", '{"packages": 3}', "packages"),
        ("logits.npz", b"", "damaged"),
        ("logits.npz", b"PK\x05\x06" + bytes(18), "nothing in it"),
    ],
)
def test_wrong_kinds_are_named_even_where_the_hash_is_right(run, name, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    run.commit({name: data})
    with pytest.raises(UserError, match=message) as refusal:
        read_everything(RunDirectory.open(run.folder))
    assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"test/last/raw": np.array([object()] * 3)}, "object"),
        ({"test/last/raw": np.zeros(3, np.float32)}, r"\(3,\)"),
        ({"test/last/raw": np.zeros((3, 2), np.float32), "test/labels": np.zeros(4, np.int64)}, "3 rows for 4 labels"),
        ({"test/last/raw": np.zeros((3, 2), np.float32), "test/labels": np.full(3, 2)}, "beyond the 2 classes"),
        ({"holdout/indices": np.array([-1])}, "negative"),
        ({"test/last/raw": np.full((3, 2), np.nan, np.float32)}, "not all finite"),
        ({"../x": np.zeros(3)}, "no array of a run"),
    ],
)
def test_wrong_arrays_are_named(run, tmp_path, arrays, message):
    np.savez(tmp_path / "other.npz", **arrays)
    run.commit({"logits.npz": (tmp_path / "other.npz").read_bytes()})
    with pytest.raises(UserError, match=message):
        read_everything(RunDirectory.open(run.folder))


def test_a_compressed_bomb_is_not_unpacked(run, tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", **{"test/last/raw": np.zeros((1 << 20, 10), np.float32)})
    run.commit({"logits.npz": (tmp_path / "bomb.npz").read_bytes()})
    with pytest.raises(UserError, match="compressed"):
        RunDirectory.open(run.folder).logits_keys()


def test_the_manifest_knows_itself(run):
    path = run.folder / "manifest.json"
    content = json.loads(path.read_text())
    content["files"]["recipe.toml"] = ["0" * 64]
    with pytest.raises(UserError, match="is damaged"):
        parse(json.dumps(content).encode(), path)


def test_a_folder_removed_during_the_run_is_one_message(run):
    import shutil

    with run.alone():
        shutil.rmtree(run.folder)
        with pytest.raises(UserError, match="its folder is gone"):
            run.write_metrics([])


def test_a_folder_moved_during_the_run_is_not_made_anew(run, tmp_path):
    moved = tmp_path / "moved"
    with run.alone():
        rows = run.metrics()
        run.folder.rename(moved)
        for write in (
            lambda: run.write_metrics(rows), lambda: run.append_epoch(rows[0]),
            lambda: run.commit({"weights/best.safetensors": tensors()}),
            lambda: run.commit({"checkpoints/epoch-00001/state.json": "{}"}),
        ):  # fmt: skip
            with pytest.raises(UserError, match=r"its folder is gone, moved .*`fastcifar run --resume NEW_PLACE`"):
                write()
    assert not run.folder.exists()
    read_everything(RunDirectory.open(moved))


@contextmanager
def without_roots_rights():
    """Read files as a user does: root may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_run_that_may_not_be_read_is_one_message(run):
    run.folder.chmod(0)
    try:
        with without_roots_rights(), pytest.raises(UserError, match="m0: cannot be read: Permission denied"):
            RunDirectory.open(run.folder)
    finally:
        run.folder.chmod(0o755)


@pytest.mark.parametrize(
    "words", [("evaluate",), ("report",), ("run", "--resume"), ("run", "smoke/lenet5", "--resume", "auto", "--out")]
)
def test_a_name_that_is_too_long_is_one_message(tmp_path, words):
    done = fastcifar(*words, "x" * 300, cwd=tmp_path)
    assert done.returncode == 2
    assert "x: cannot be read: File name too long" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
