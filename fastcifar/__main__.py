"""``python -m fastcifar`` and the ``fastcifar`` command."""

import signal
from contextlib import suppress

# From its first line on, Ctrl-C ends this process without a traceback: by itself until the handlers are there, a few
# milliseconds later. What comes before is Python's own start.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with suppress(ValueError):  # imported in a thread, which nobody interrupts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

from fastcifar import interrupt


def main() -> None:
    """Handle signals before anything that takes time is imported, then run the command line."""
    interrupt.install()
    from fastcifar.cli.main import main

    main()


if __name__ == "__main__":
    main()
