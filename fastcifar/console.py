"""Where text goes: what a command answers to stdout, as JSON or for people; progress, notes and errors to stderr."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from rich.console import Console
from rich.text import Text

# Without markup and emoji codes: the name of a folder, a class or a recipe is printed as it is, whatever is in it.
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


# Of what goes into a file or a program, unless COLUMNS says otherwise: grep finds whole rows of a table.
PIPE_WIDTH = 1000


def say(*parts: str | tuple[str, str]) -> None:
    """Print one line for people to stderr, of texts and of pairs (text, style); long ones are not broken."""
    err.print(Text.assemble(*parts), soft_wrap=True)


def answers(json_: bool = False) -> Console:
    """Return where a command's answer for people goes: to stdout, or to stderr where JSON has stdout for itself."""
    if json_:
        return err
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does with a name that is no text
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def answer(*parts: str | tuple[str, str]) -> None:
    """Print one line of a command's answer to stdout; see `say`."""
    answers().print(Text.assemble(*parts), soft_wrap=True)


@contextmanager
def progress_bar(before: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """Yield a progress callback, ``(what, done, total)``, that draws a bar on stderr, where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task, now = bar.add_task("", total=None), ""

        def show(what: str, done: int, total: int) -> None:
            nonlocal now
            if what != now:  # another step: its time left says nothing about this one's
                bar.reset(task, description=before + what, total=total)
                now = what
            bar.update(task, completed=done, total=total)

        yield show


def out(obj: Any) -> None:
    """Print one JSON object to stdout; NaN and infinities, which JSON does not have, are a `ValueError`."""
    text = json.dumps(obj, ensure_ascii=False, indent=1, allow_nan=False)
    try:
        sys.stdout.write(text + "\n")
    except UnicodeEncodeError:  # the name of a file may be any bytes, and stdout may know few characters
        sys.stdout.write(json.dumps(obj, indent=1) + "\n")
