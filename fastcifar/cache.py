"""Where converted data and computed tables are kept between runs of the program."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where converted data is kept: ``FASTCIFAR_CACHE``, else ``~/.cache/fastcifar``."""
    return Path(os.environ.get("FASTCIFAR_CACHE") or Path.home() / ".cache" / "fastcifar")
