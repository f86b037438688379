"""``python -m fastcifar`` and the ``fastcifar`` command."""

from fastcifar import interrupt


def main() -> None:
    """Handle signals before anything that takes time is imported, then run the command line."""
    interrupt.install()
    from fastcifar.cli.main import main

    main()


if __name__ == "__main__":
    main()
