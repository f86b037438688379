"""``python -m fastcifar``."""

from fastcifar.cli.main import main

main()
