"""What a run shows, in a terminal of 80 columns and in a pipe."""

import io
import time

import pytest
from rich.console import Console

from fastcifar.train import display as module
from fastcifar.train.display import Display, Steps


def row(epoch: int, **changes) -> dict:
    metrics = {"raw": {"accuracy": 80.25}, "ema": {"accuracy": 81.5}}
    found = {"epoch": epoch, "train_loss": 1.5, "train_accuracy": 70.125, "test": metrics, "images": 50_000,
             "images_per_s": 12_345.0, "seconds": 999.0}  # fmt: skip
    return found | changes


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets; rich keeps its own."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    yield now
    monkeypatch.undo()
    assert time.perf_counter() != now[0]


def console(terminal: bool) -> Console:
    return Console(width=80, force_terminal=terminal, file=io.StringIO(), highlight=False, _environ={"TERM": "xterm"})


def run(shown: Display, clock: list[float], epochs: int = 2) -> None:
    with shown:
        shown.begin(0)
        clock[0] += 500  # compilation
        for epoch in range(1, epochs + 1):
            for step in range(1, 101):
                clock[0] += 0.1
                shown.step(epoch, step)
            clock[0] += 2  # evaluation
            shown.epoch(row(epoch))


def live_line(shown: Display) -> str:
    """Return what the bar's line looks like at this moment."""
    canvas = Console(width=80, file=io.StringIO(), force_terminal=False)
    canvas.print(shown._progress.get_renderable())
    return canvas.file.getvalue()


def test_the_live_line_fits_80_columns_with_bar_accuracy_and_time_left(clock):
    shown = Display("pyramid-shakedrop-with-a-long-name", 400, 100, 128, console=console(True))
    run(shown, clock, epochs=120)
    clock[0] += 0.6
    shown.step(121, 6)
    line = live_line(shown)
    assert len(line.splitlines()) == 1
    assert "epoch 121/400" in line
    assert "images/s" in line
    assert "test 81.50%" in line
    assert " left" in line
    assert "\u2026" not in line, "something was cut off"
    # Without colour only the part of the bar that is done shows: three tenths of 14 columns.
    assert line.count("\u2501") == 4


@pytest.mark.parametrize("terminal", [True, False])
def test_one_line_per_epoch_stays(clock, terminal):
    target = console(terminal)
    run(Display("tiny", 3, 100, 128, console=target), clock, epochs=3)
    lines = [line for line in target.file.getvalue().splitlines() if "loss 1.5000" in line]
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert f"epoch {number}/3  loss 1.5000  train 70.12%  test raw 80.25% ema 81.50%" in line


def test_the_first_time_left_counts_neither_compilation_nor_warm_up(clock):
    target = console(False)
    shown = Display("tiny", 11, 100, 128, console=target)
    run(shown, clock, epochs=1)
    # 50,000 images at 12,345 images/s are 4.05 s, ten times; the 500 s before the first step do not count.
    assert "40.5 s left" in target.file.getvalue()
    shown = Display("tiny", 11, 100, 128, console=console(True))
    with shown:
        shown.begin(0)
        clock[0] += 500
        for step in range(1, 31):
            clock[0] += 0.1
            shown.step(1, step)
        # 1,100 steps of 0.1 s, less those done at the last refresh.
        assert "1 min 47 s left" in live_line(shown)


def test_an_epoch_that_was_all_warm_up_has_no_time_left_yet(clock):
    target = console(False)
    run(Display("tiny", 3, 100, 128, console=target), clock, epochs=0)
    shown = Display("tiny", 3, 1, 128, console=target)
    shown.begin(0)
    shown.epoch(row(1, images_per_s=0.0))
    assert "left" not in target.file.getvalue()


def test_quiet_shows_nothing(clock):
    target = console(True)
    run(Display("tiny", 3, 100, 128, quiet=True, console=target), clock, epochs=3)
    assert target.file.getvalue() == ""


def test_a_conversion_says_each_step_once(monkeypatch):
    said = []
    monkeypatch.setattr(module, "tell", said.append)
    steps = Steps()
    for what, done in (("read", 0), ("read", 1), ("write train as raw", 0), ("read", 2)):
        steps(what, done, 2)
    assert said == ["converting the data: read", "converting the data: write train as raw"]


def test_in_a_notebook_each_epoch_is_a_line_of_output_and_no_bar_is_drawn(clock, monkeypatch):
    given = []
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: given.append(text))
    run(Display("tiny", 2, 100, 128, console=Console(force_jupyter=True, width=200, highlight=False)), clock)
    lines = [line for text in given for line in text.splitlines() if line]
    assert [line[:9] for line in lines] == ["epoch 1/2", "epoch 2/2"]
