"""The one exception that a user is meant to see."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input of any kind: a file, a key, a value, a missing package, a full disk.

    The message names what was wrong and its cure. The command line prints it alone, without a traceback, and
    ends with exit status 2.
    """


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean "x"?)`` for the closest allowed spelling, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
