"""The revision that a run notes: a clone's, an archive's, or none."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from fastcifar import environment

ROOT = Path(__file__).resolve().parents[1]


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with this project's own two files about archives, and one commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in (".git_archival.txt", ".gitattributes"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "t")
    return folder


def test_a_clone_and_its_archive_have_the_same_revision(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(repository, "archive", "-o", str(tmp_path / "a.tar"), "HEAD")
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path / "archive", filter="data")
    head = git(repository, "rev-parse", "--short=10", "HEAD")
    for folder in (repository, tmp_path / "archive"):
        monkeypatch.setattr(environment, "clone", lambda folder=folder: folder)
        assert environment.git_revision() == head
    (repository / ".gitattributes").write_text("changed\n")
    monkeypatch.setattr(environment, "clone", lambda: repository)
    assert environment.git_revision() == head + "+"


def test_results_that_were_written_do_not_make_the_revision_another(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, code = ["benchmarks/results/launches.json", "records/row/record.json"], "benchmarks/launches.py"
    for name in (*results, code):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("before\n")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "t")
    head = git(repository, "rev-parse", "--short=10", "HEAD")
    monkeypatch.setattr(environment, "clone", lambda: repository)
    (repository / results[0]).write_text("after\n")
    (repository / results[1]).unlink()
    assert environment.git_revision() == head
    (repository / code).write_text("after\n")
    assert environment.git_revision() == head + "+"


@pytest.mark.parametrize("content", [None, b"node: $Format:%H$\n", b"node: abc\n", b"\xff", b""])
def test_a_copy_without_a_history_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / ".git_archival.txt").write_bytes(content)
    monkeypatch.setattr(environment, "clone", lambda: tmp_path)
    assert environment.git_revision() is None
