"""Where text goes: results as JSON to stdout, everything for people to stderr."""

import json
import sys
from typing import Any

from rich.console import Console

err = Console(stderr=True, highlight=False)


def out(obj: Any) -> None:
    """Print one JSON object to stdout."""
    json.dump(obj, sys.stdout, ensure_ascii=False, indent=1)
    sys.stdout.write("\n")
