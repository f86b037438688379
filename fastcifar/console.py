"""Where text goes: results as JSON to stdout, everything for people to stderr."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

# Without markup and emoji codes: the name of a folder, a class or a recipe is printed as it is, whatever is in it.
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(*parts: str | tuple[str, str]) -> None:
    """Print one line for people, of texts and of pairs (text, style); long ones are not broken."""
    err.print(Text.assemble(*parts), soft_wrap=True)


def out(obj: Any) -> None:
    """Print one JSON object to stdout; NaN and infinities, which JSON does not have, are a `ValueError`."""
    sys.stdout.write(json.dumps(obj, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
