"""Signals set a flag where training asks for it, and are never lost: not in a callback, not at a block's end."""

import os
import signal

import pytest

from fastcifar import interrupt


def test_a_signal_that_its_block_did_not_look_at_is_not_forgotten():
    def finish() -> None:
        with interrupt.deferred():
            os.kill(os.getpid(), signal.SIGTERM)

    with interrupt.handled("go on"), pytest.raises(interrupt.Interrupted, match="SIGTERM: go on") as caught:
        finish()
    assert caught.value.status == 143


def test_a_signal_within_a_callback_of_numba_is_not_lost():
    import numba
    from numba.core import event

    class Sender(event.Listener):
        sent = 0

        def on_start(self, event):
            self.sent += 1
            if self.sent == 1:
                os.kill(os.getpid(), signal.SIGINT)

        def on_end(self, event):
            pass

    def compile_with(sender: Sender) -> None:
        with interrupt.deferred(), event.install_listener("numba:compile", sender):
            assert numba.njit(lambda x: x + 1)(1) == 2, "the compilation comes to its end"
            assert interrupt.requested() == signal.SIGINT

    sender = Sender()
    with interrupt.handled("go on"), pytest.raises(interrupt.Interrupted):
        compile_with(sender)
    assert sender.sent


def test_importing_the_handlers_takes_next_to_nothing():
    """What is imported before them is time in which a signal ends the process without a word."""
    import subprocess
    import sys

    code = "import sys; before = set(sys.modules); import fastcifar.__main__; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"fastcifar.interrupt", "signal"} <= set(done.stdout.split())
    assert not {"dataclasses", "inspect", "re", "typing", "typer"} & set(done.stdout.split())
