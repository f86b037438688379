"""The guides are true: their files are written, their commands and scripts run, and say what the guides say."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.command import fastcifar

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/.-]+\.(?:py|toml))\n")
GUIDES = ["own-model", "own-augmentation", "own-optimizer", "python-api", "trackers"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
        del sys.modules[name]


def execute(block: str, folder: Path) -> None:
    """Run the commands of a console block; the lines after each are among what it prints."""
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
        program, *words = split(command.partition(" #")[0])
        assert program == "fastcifar"
        done = fastcifar(*words, cwd=folder)
        lines = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
        for line in expected.splitlines():
            assert line in lines, (command, done)
        assert done.returncode == (2 if "fastcifar: " in expected else 0), (command, done)


def split(command: str) -> list[str]:
    """Split as a shell does, but keep the quotes within a word such as ``augment=["flip"]``."""
    return [word if "=[" in word else shlex.split(word)[0] for word in command.split()]


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_works_as_written(guide, folder):
    text = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    blocks, names = BLOCK.findall(text), {}
    assert len(blocks) > 2
    for language, block in blocks:
        if file := FILE.match(block):
            path = folder / file[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block, encoding="utf-8")
        elif language == "console":
            execute(block, folder)
        elif language == "python":
            exec(compile(block, f"{guide}.md", "exec"), names)
        else:
            pytest.fail(f"a block of {language} that nothing runs")


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_is_one_page_and_its_links_lead_somewhere(guide):
    text = (DOCS / f"{guide}.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("https://")]
    assert [link for link in links if not (DOCS / link).exists()] == []
