"""The guides are true: their files are written, their commands and scripts run, and say what the guides say."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from fastcifar.cli.main import app
from fastcifar.config import load_recipe
from tests.command import fastcifar

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/.-]+\.(?:py|toml))\n")
COMMAND = re.compile(r"^(?:[$>]\s+)?(?:\.venv/bin/)?fastcifar ([a-z].*?)(?:\s+#.*)?$")
USAGE_ERROR = typer.BadParameter.__base__
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
        program, *words = shlex.split(command.partition(" #")[0])
        assert program == "fastcifar"
        done = fastcifar(*words, cwd=folder)
        lines = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
        for line in expected.splitlines():
            assert line in lines, (command, done)
        assert done.returncode == (2 if "fastcifar: " in expected else 0), (command, done)


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


def documented_commands() -> list[tuple[str, str]]:
    """Return each page with each ``fastcifar`` command in its blocks, without prompt, comment and shell loop."""
    found = []
    for page in [*sorted(DOCS.glob("*.md")), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"]:
        for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language in ("console", "sh", "bash", "text"):
                lines = re.sub(r"\\\n>?\s*", "", block).splitlines()
                found += [(page.name, command[1]) for line in lines if (command := COMMAND.match(line))]
    return found


def test_every_documented_command_is_one_that_the_program_has():
    """Nothing runs: names of commands, options and shipped recipes are what a change of the program leaves behind."""
    commands = documented_commands()
    assert len(commands) > 40
    for page, line in commands:
        try:
            options = parse(typer.main.get_command(app), shlex.split(line))
        except USAGE_ERROR as error:
            pytest.fail(f"{page}: fastcifar {line}: {error.format_message()}")
        recipe = options.get("recipe")
        if recipe and not recipe.endswith(".toml"):  # a file is one that the page writes
            load_recipe(recipe)


def parse(program: Any, words: list[str]) -> dict[str, Any]:
    """Return the options of the last of these nested commands.

    Raises:
        USAGE_ERROR: there is no such command or option, or a value of another kind.
    """
    name, context = "fastcifar", typer.Context(program)
    while hasattr(program, "resolve_command"):
        name, program, words = program.resolve_command(context, words)
        context = typer.Context(program, parent=context, info_name=name)
    return program.make_context(name, words, parent=context.parent).params


@pytest.mark.parametrize("words", ["trian lenet5", "run lenet5 --stop-afer 1", "data convrt raw", "run --devices two"])
def test_a_wrong_command_is_found(words):
    with pytest.raises(USAGE_ERROR):
        parse(typer.main.get_command(app), words.split())
