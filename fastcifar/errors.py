"""The one exception that a user is meant to see."""

import difflib
import re
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Bad input of any kind: a file, a key, a value, a missing package, a full disk.

    The message names what was wrong and its fix. The command line prints it alone, without a traceback, and
    ends with exit status 2.
    """


def shown(value: object, limit: int = 60) -> str:
    """Return a value in at most ``limit`` characters of one printable line, as Python writes it.

    But truth values as recipes and JSON write them, ``true`` and ``false``.
    """
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, too deep a list
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def plain(text: str, limit: int = 60) -> str:
    """Return a text as it is where it is short and printable, else as `shown` writes it."""
    return text if text.isprintable() and 0 < len(text) <= limit else shown(text, limit)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean "x"?)`` for the closest allowed spelling, or nothing when none is close."""
    return did_you_mean(closest(word, allowed))


def closest(word: str, allowed: Iterable[str], similarity: float = 0.6) -> list[str]:
    """Return the closest allowed spelling, alone in a list, or an empty list where none is as similar (0 to 1)."""
    if len(word) > 100:  # nobody's misspelling, and the search is quadratic
        return []
    return difflib.get_close_matches(word, list(allowed), n=1, cutoff=similarity)


def did_you_mean(words: Sequence[str]) -> str:
    """Return `` (did you mean "x", "y" or "z"?)``, or nothing without any words."""
    quoted = [f'"{word}"' for word in words]
    listed = " or ".join([", ".join(quoted[:-1]), quoted[-1]] if quoted[1:] else quoted)
    return f" (did you mean {listed}?)" if quoted else ""


def root_cause(error: BaseException) -> str:
    """Return the innermost message of a chain of errors in one line: what failed, not through how many layers."""
    while (inner := error.__cause__ or getattr(error, "inner_exception", None)) is not None and inner is not error:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Triton and Inductor print the source first and the reason last.
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
    return named[-1] if named else f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
