"""``python -m fastcifar``."""

from fastcifar.cli import main

main()
