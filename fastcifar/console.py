"""Where text goes: results as JSON to stdout, everything for people to stderr."""

import json
import sys
from typing import Any

from rich.console import Console

err = Console(stderr=True, highlight=False)


def out(obj: Any) -> None:
    """Print one JSON object to stdout; NaN and infinities, which JSON does not have, are a `ValueError`."""
    sys.stdout.write(json.dumps(obj, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
